"""Tiny checkpoints of both layouts, written by the safetensors library and plain numpy.

Made from `tree`, the leaves as they should be in memory, by code that shares nothing with
`gptoss_jax.weights`. All sizes are distinct where two could be swapped.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from gptoss_jax.config import ModelConfig
from gptoss_jax.model import Transformer

V, L, D, N, K, H, E, A, F, W = 97, 4, 64, 8, 2, 10, 5, 3, 96, 6
DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "float16": np.float16,
}
ROPE = {
    "rope_type": "yarn",
    "factor": 8.0,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "original_max_position_embeddings": 512,
    "truncate": False,
}
HF_CONFIG = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "head_dim": H,
    "hidden_act": "silu",
    "hidden_size": D,
    "intermediate_size": F,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "max_position_embeddings": 4096,
    "model_type": "gpt_oss",
    "num_attention_heads": N,
    "num_experts_per_tok": A,
    "num_hidden_layers": L,
    "num_key_value_heads": K,
    "num_local_experts": E,
    "rms_norm_eps": 1e-5,
    "rope_scaling": ROPE,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.9,
    "sliding_window": W,
    "swiglu_limit": 5.0,
    "tie_word_embeddings": False,
    "vocab_size": V,
}
OPENAI_CONFIG = {
    "num_hidden_layers": L,
    "num_experts": E,
    "experts_per_token": A,
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "swiglu_limit": 5.0,
    "head_dim": H,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "sliding_window": W,
    "initial_context_length": 512,
    "rope_theta": 10000.0,
    "rope_scaling_factor": 8.0,
    "rope_ntk_alpha": 2.0,
    "rope_ntk_beta": 16.0,
}


def make_tree(*, packed: bool, dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Return path -> leaf as it should be in memory; MXFP4 as `path.blocks` and `path.scales`."""
    rng = np.random.default_rng(seed)
    shapes = {
        "embedding/weight": (V, D),
        "final_norm/scale": (D,),
        "unembedding/weight": (V, D),
        "layers/attention_norm/scale": (L, D),
        "layers/attention/q_weight": (L, N, H, D),
        "layers/attention/k_weight": (L, K, H, D),
        "layers/attention/v_weight": (L, K, H, D),
        "layers/attention/o_weight": (L, D, N, H),
        "layers/attention/q_bias": (L, N, H),
        "layers/attention/k_bias": (L, K, H),
        "layers/attention/v_bias": (L, K, H),
        "layers/attention/o_bias": (L, D),
        "layers/attention/sinks": (L, N),
        "layers/moe_norm/scale": (L, D),
        "layers/router/weight": (L, E, D),
        "layers/router/bias": (L, E),
        "layers/experts/gate_up_bias": (L, E, 2, F),
        "layers/experts/down_bias": (L, E, D),
    }
    experts = {
        "layers/experts/gate_up_weight": (L, E, 2, F, D),
        "layers/experts/down_weight": (L, E, D, F),
    }
    tree: dict[str, np.ndarray] = {}
    for path, shape in (shapes if packed else shapes | experts).items():
        tree[path] = (rng.standard_normal(shape) * 0.1).astype(DTYPES[dtype])
    for path, shape in experts.items() if packed else ():
        groups = (*shape[:-1], shape[-1] // 32)
        tree[f"{path}.blocks"] = rng.integers(0, 256, (*groups, 16), dtype=np.uint8)
        tree[f"{path}.scales"] = rng.integers(110, 126, groups, dtype=np.uint8)
    return tree


def _interleave(x: np.ndarray) -> np.ndarray:
    """[E, 2, F, ...] -> [E, 2F, ...], rows gate, up, gate, up."""
    out = np.empty((x.shape[0], 2 * x.shape[2], *x.shape[3:]), x.dtype)
    out[:, 0::2], out[:, 1::2] = x[:, 0], x[:, 1]
    return out


def hf_tensors(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {
        "model.embed_tokens.weight": tree["embedding/weight"],
        "model.norm.weight": tree["final_norm/scale"],
        "lm_head.weight": tree["unembedding/weight"],
    }
    for n in range(L):
        t = {path[7:]: leaf[n] for path, leaf in tree.items() if path.startswith("layers/")}
        at = f"model.layers.{n}."
        out[at + "input_layernorm.weight"] = t["attention_norm/scale"]
        out[at + "post_attention_layernorm.weight"] = t["moe_norm/scale"]
        for x in "qkv":
            out[at + f"self_attn.{x}_proj.weight"] = t[f"attention/{x}_weight"].reshape(-1, D)
            out[at + f"self_attn.{x}_proj.bias"] = t[f"attention/{x}_bias"].reshape(-1)
        out[at + "self_attn.o_proj.weight"] = t["attention/o_weight"].reshape(D, N * H)
        out[at + "self_attn.o_proj.bias"] = t["attention/o_bias"]
        out[at + "self_attn.sinks"] = t["attention/sinks"]
        out[at + "mlp.router.weight"] = t["router/weight"]
        out[at + "mlp.router.bias"] = t["router/bias"]
        experts = at + "mlp.experts."
        out[experts + "gate_up_proj_bias"] = _interleave(t["experts/gate_up_bias"])
        out[experts + "down_proj_bias"] = t["experts/down_bias"]
        if "experts/down_weight" in t:
            gate_up = _interleave(t["experts/gate_up_weight"])
            out[experts + "gate_up_proj"] = np.einsum("efd->edf", gate_up)
            out[experts + "down_proj"] = np.einsum("edf->efd", t["experts/down_weight"])
            continue
        for field in ("blocks", "scales"):
            gate_up = _interleave(t[f"experts/gate_up_weight.{field}"])
            out[experts + f"gate_up_proj_{field}"] = gate_up
            out[experts + f"down_proj_{field}"] = t[f"experts/down_weight.{field}"]
    return out


def openai_tensors(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    out = {
        "embedding.weight": tree["embedding/weight"],
        "norm.scale": tree["final_norm/scale"],
        "unembedding.weight": tree["unembedding/weight"],
    }
    for n in range(L):
        t = {path[7:]: leaf[n] for path, leaf in tree.items() if path.startswith("layers/")}
        at = f"block.{n}."
        out[at + "attn.norm.scale"] = t["attention_norm/scale"]
        out[at + "mlp.norm.scale"] = t["moe_norm/scale"]
        rows = [t[f"attention/{x}_weight"].reshape(-1, D) for x in "qkv"]
        out[at + "attn.qkv.weight"] = np.concatenate(rows)
        rows = [t[f"attention/{x}_bias"].reshape(-1) for x in "qkv"]
        out[at + "attn.qkv.bias"] = np.concatenate(rows)
        out[at + "attn.out.weight"] = t["attention/o_weight"].reshape(D, N * H)
        out[at + "attn.out.bias"] = t["attention/o_bias"]
        out[at + "attn.sinks"] = t["attention/sinks"]
        out[at + "mlp.gate.weight"] = t["router/weight"]
        out[at + "mlp.gate.bias"] = t["router/bias"]
        out[at + "mlp.mlp1_bias"] = _interleave(t["experts/gate_up_bias"])
        out[at + "mlp.mlp2_bias"] = t["experts/down_bias"]
        for suffix in ("", ".blocks", ".scales"):
            if f"experts/down_weight{suffix}" in t:
                gate_up = _interleave(t[f"experts/gate_up_weight{suffix}"])
                out[at + f"mlp.mlp1_weight{suffix}"] = gate_up
                out[at + f"mlp.mlp2_weight{suffix}"] = t[f"experts/down_weight{suffix}"]
    return out


def tensors_of(tree: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    return hf_tensors(tree) if layout == "hf" else openai_tensors(tree)


def config_of(tree: dict[str, np.ndarray], layout: str) -> dict[str, Any]:
    if layout == "openai":
        return dict(OPENAI_CONFIG)
    raw = json.loads(json.dumps(HF_CONFIG))
    if "layers/experts/down_weight.blocks" in tree:
        kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
        raw["quantization_config"] = {
            "modules_to_not_convert": [*kept, "lm_head"],
            "quant_method": "mxfp4",
        }
    return raw


def write(
    folder: Path, tree: dict[str, np.ndarray], layout: str, *, shards: int = 1
) -> dict[str, np.ndarray]:
    """Write the checkpoint and return its tensors by name."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of(tree, layout)))
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors_of(tree, layout).items()}
    write_tensors(folder, tensors, shards=shards)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], *, shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i:05d}-of-{shards - 1:05d}.safetensors"  # as published: from zero
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def small_model(**fields) -> tuple[Transformer, dict[str, Any]]:
    """Return a model of our own making, whatever its switches, and parameters that are all 1."""
    small = ModelConfig(
        vocab_size=97,
        num_layers=3,
        d_model=32,
        num_heads=6,
        num_kv_heads=2,
        head_dim=8,
        num_experts=5,
        active_experts=2,
        d_expert=64,
        window=7,
    )
    model = Transformer(dataclasses.replace(small, **fields))
    return model, jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), model.abstract_params())
