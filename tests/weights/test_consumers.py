"""What is exported, held against what servers and converters look up: name, shape, dtype, order.

Read in their sources (2026): vLLM's and TensorRT-LLM's loaders of GptOssForCausalLM, llama.cpp's
converter from Hugging Face (convert_hf_to_gguf.py, conversion/gpt_oss), and the script of OpenAI's
gpt-oss that makes the file of its Metal sampler (gpt_oss/metal/scripts/create-local-model.py).
The tables say what each asks for, in our words; none of them is installed here.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors import safe_open
from tiny_checkpoint import A, D, E, F, H, K, L, N, V, W

from gptoss_jax import loading, weights
from gptoss_jax.config import LoRAConfig
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.parameters.tree import flatten, nest

BF16, U8 = "BF16", "U8"
GROUP = 32  # values that share a scale; their nibbles are 16 bytes

# The Hugging Face layout. vLLM and TensorRT-LLM choose by `q_proj` in a name; both have q, k, v
# apart and join them. vLLM passes over names that it does not know, so none may be misspelt.
HF = {
    "model.embed_tokens.weight": (V, D),
    "model.norm.weight": (D,),
    "lm_head.weight": (V, D),
}
HF_LAYER = {
    "input_layernorm.weight": (D,),
    "post_attention_layernorm.weight": (D,),
    "self_attn.q_proj.weight": (N * H, D),
    "self_attn.q_proj.bias": (N * H,),
    "self_attn.k_proj.weight": (K * H, D),
    "self_attn.k_proj.bias": (K * H,),
    "self_attn.v_proj.weight": (K * H, D),
    "self_attn.v_proj.bias": (K * H,),
    "self_attn.o_proj.weight": (D, N * H),
    "self_attn.o_proj.bias": (D,),
    "self_attn.sinks": (N,),
    "mlp.router.weight": (E, D),
    "mlp.router.bias": (E,),
    "mlp.experts.gate_up_proj_bias": (E, 2 * F),
    "mlp.experts.down_proj_bias": (E, D),
}
# Packed: [E, rows, groups of the input, 16] and a scale a group. vLLM views the blocks as
# [E, rows, bytes], TensorRT-LLM flattens their last two axes, llama.cpp asks for four of them.
HF_PACKED = {
    "mlp.experts.gate_up_proj_blocks": (E, 2 * F, D // GROUP, 16),
    "mlp.experts.gate_up_proj_scales": (E, 2 * F, D // GROUP),
    "mlp.experts.down_proj_blocks": (E, D, F // GROUP, 16),
    "mlp.experts.down_proj_scales": (E, D, F // GROUP),
}
# In bfloat16 the inputs come first: vLLM permutes by (0, 2, 1), llama.cpp transposes the last two,
# TensorRT-LLM takes gate and up from every other column.
HF_DENSE = {
    "mlp.experts.gate_up_proj": (E, D, 2 * F),
    "mlp.experts.down_proj": (E, F, D),
}
# OpenAI's, for the Metal converter, which copies bytes as it finds them: all must be bfloat16.
OPENAI = {"embedding.weight": (V, D), "norm.scale": (D,), "unembedding.weight": (V, D)}
OPENAI_LAYER = {
    "attn.norm.scale": (D,),
    "attn.qkv.weight": ((N + 2 * K) * H, D),
    "attn.qkv.bias": ((N + 2 * K) * H,),
    "attn.sinks": (N,),
    "attn.out.weight": (D, N * H),
    "attn.out.bias": (D,),
    "mlp.norm.scale": (D,),
    "mlp.gate.weight": (E, D),
    "mlp.gate.bias": (E,),
    "mlp.mlp1_bias": (E, 2 * F),
    "mlp.mlp2_bias": (E, D),
}
OPENAI_PACKED = {
    "mlp.mlp1_weight.blocks": (E, 2 * F, D // GROUP, 16),
    "mlp.mlp1_weight.scales": (E, 2 * F, D // GROUP),
    "mlp.mlp2_weight.blocks": (E, D, F // GROUP, 16),
    "mlp.mlp2_weight.scales": (E, D, F // GROUP),
}
# None of the four needs this form; the names are those of OpenAI's reference model.
OPENAI_DENSE = {"mlp.mlp1_weight": (E, 2 * F, D), "mlp.mlp2_weight": (E, D, F)}
METAL_SCALE_BIAS = 14  # is added to each scale byte, which must not wrap
CONSUMERS = {
    ("hf", "mxfp4"): (HF, HF_LAYER, HF_PACKED, "model.layers.{n}."),
    ("hf", "dense"): (HF, HF_LAYER, HF_DENSE, "model.layers.{n}."),
    ("openai", "mxfp4"): (OPENAI, OPENAI_LAYER, OPENAI_PACKED, "block.{n}."),
    ("openai", "dense"): (OPENAI, OPENAI_LAYER, OPENAI_DENSE, "block.{n}."),
}
# Fields of config.json that they read, with the tiny model's values.
HF_FIELDS = {
    "architectures": ["GptOssForCausalLM"],  # by which all three choose the model
    "model_type": "gpt_oss",
    "vocab_size": V,
    "num_hidden_layers": L,
    "hidden_size": D,
    "intermediate_size": F,
    "head_dim": H,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "num_local_experts": E,
    "num_experts_per_tok": A,
    "sliding_window": W,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "bfloat16",  # of everything in TensorRT-LLM that is not packed
}
ROPE_FIELDS = {
    "rope_type": "yarn",  # llama.cpp stops at any other
    "factor": 8.0,
    "original_max_position_embeddings": 512,
    "beta_fast": 16.0,
    "beta_slow": 2.0,
    "truncate": False,
}
METAL_FIELDS = {
    "num_hidden_layers": L,
    "num_experts": E,
    "num_attention_heads": N,
    "num_key_value_heads": K,
    "head_dim": H,
    "hidden_size": D,
    "intermediate_size": F,
    "swiglu_limit": 5.0,
    "rope_theta": 10000.0,
    "sliding_window": W,
    "initial_context_length": 512,
    "rope_scaling_factor": 8.0,
    "rope_ntk_alpha": 2.0,
    "rope_ntk_beta": 16.0,
}


@pytest.fixture(scope="module", params=list(CONSUMERS), ids="-".join)
def export(request, tmp_path_factory):
    """Export a model whose adapters (all kinds but the tables') are merged; also its experts."""
    layout, form = request.param
    folder = tmp_path_factory.mktemp("consumers")
    tiny.write(folder / "base", tiny.make_tree(packed=True), "hf")
    model, params = loading.load(folder / "base")
    own = LoRAConfig(targets=("attention", "experts", "router"), rank=2, alpha=2.0)
    model = Transformer(dataclasses.replace(model.config, lora=own))
    rng, tree = np.random.default_rng(0), {}
    for path, shape in adapters.shapes(model.config).items():
        tree[f"{path}/a"] = rng.standard_normal(shape.a).astype(np.float32)
        tree[f"{path}/b"] = 0.1 * rng.standard_normal(shape.b).astype(np.float32)
    tuned = {**params, "lora": nest(tree)}
    weights.save(folder / "c", model, tuned, to=layout, experts=form, force=True)
    _, merged = loading.load(folder / "c", dtype="float32", experts="dense")
    leaves = {path: np.asarray(leaf) for path, leaf in flatten(merged).items()}
    return (layout, form), folder / "c", leaves


def entries(folder: Path) -> dict[str, tuple[tuple[int, ...], str, np.ndarray]]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as f:
            for name in f.keys():  # noqa: SIM118
                part = f.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype(), f.get_tensor(name))
    return found


def test_every_tensor_has_the_name_shape_and_dtype_that_is_looked_up(export) -> None:
    (layout, form), folder, _ = export
    once, layer, experts, prefix = CONSUMERS[layout, form]
    want = {name: (shape, BF16) for name, shape in once.items()}
    for n in range(L):
        at = prefix.format(n=n)
        want |= {at + name: (shape, BF16) for name, shape in layer.items()}
        dtype = U8 if form == "mxfp4" else BF16
        want |= {at + name: (shape, dtype) for name, shape in experts.items()}
    found = {name: entry[:2] for name, entry in entries(folder).items()}
    assert found == want


def test_config_has_the_fields_that_are_looked_up(export) -> None:
    (layout, form), folder, _ = export
    raw = json.loads((folder / "config.json").read_text())
    if layout == "openai":
        assert {name: raw[name] for name in METAL_FIELDS} == METAL_FIELDS
        return
    assert {name: raw[name] for name in HF_FIELDS} == HF_FIELDS
    assert {name: raw["rope_scaling"][name] for name in ROPE_FIELDS} == ROPE_FIELDS
    # They take layers 0, 2, 4, ... to be banded, whatever `layer_types` says.
    assert raw["layer_types"][:2] == ["sliding_attention", "full_attention"]
    # By this they choose to read blocks and scales; without it, bfloat16.
    assert (raw.get("quantization_config", {}).get("quant_method") == "mxfp4") == (form == "mxfp4")


def test_gate_and_up_are_where_they_are_taken_from(export) -> None:
    """Rows (packed) or columns (dense) 0, 2, 4, ... are the gate's, as all of them cut it."""
    (layout, form), folder, leaves = export
    found = entries(folder)
    gate_up, down = (leaves[f"layers/experts/{x}_weight"][1] for x in ("gate_up", "down"))
    bias = leaves["layers/experts/gate_up_bias"][1]
    at = {"hf": "model.layers.1.mlp.experts.", "openai": "block.1.mlp."}[layout]
    one, two = {"hf": ("gate_up_proj", "down_proj"), "openai": ("mlp1_", "mlp2_")}[layout]
    of_bias = found[at + one + {"hf": "_bias", "openai": "bias"}[layout]][2]
    for i in range(2):
        assert np.array_equal(of_bias[:, i::2].astype(np.float32), bias[:, i])
        if form == "mxfp4":
            blocks, scales = _packed(found, at + one, layout)
            assert np.array_equal(_decoded(blocks[:, i::2], scales[:, i::2]), gate_up[:, i])
        elif layout == "hf":
            columns = found[at + one][2][:, :, i::2].astype(np.float32)
            assert np.array_equal(np.moveaxis(columns, 1, 2), gate_up[:, i])
    if form == "mxfp4":
        assert np.array_equal(_decoded(*_packed(found, at + two, layout)), down)
    elif layout == "hf":
        assert np.array_equal(np.moveaxis(found[at + two][2].astype(np.float32), 1, 2), down)


def test_metal_adds_to_the_scales_without_wrapping(export) -> None:
    (layout, form), folder, _ = export
    for name, (_, _, x) in entries(folder).items():
        if name.endswith("scales"):
            assert (layout, form) in (("hf", "mxfp4"), ("openai", "mxfp4"))
            assert x.max() + METAL_SCALE_BIAS <= 255, name


def _packed(found, name: str, layout: str) -> tuple[np.ndarray, np.ndarray]:
    join = {"hf": "_", "openai": "weight."}[layout]
    blocks, scales = (found[f"{name}{join}{field}"][2] for field in ("blocks", "scales"))
    return blocks, scales


def _decoded(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Decode as the format says, element by element: the low nibble is the even one."""
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    table = np.concatenate([table, -table])
    values = np.stack([table[blocks & 15], table[blocks >> 4]], -1)
    values = values.reshape(*blocks.shape[:-1], GROUP)
    values = np.ldexp(values, scales[..., None].astype(np.int32) - 127)
    return values.reshape(*scales.shape[:-1], -1)
