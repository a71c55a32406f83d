"""Make the golden files from the torch references, so that the suite needs no torch.

    pip install -e '.[parity]' && pip install --no-deps --ignore-requires-python gpt-oss
    python tests/parity/make_golden.py

Writes golden/hf_float32 (by transformers), golden/hf_bf16 (by transformers), golden/openai_mxfp4
(by hand, in the layout that openai/gpt-oss reads) and golden/golden.npz: logits of each, and the
gradients of the float32 model. Both references must agree before anything is written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch_reference as reference
from gpt_oss.torch.weights import Checkpoint
from mapping import SIZES
from safetensors.torch import save_file
from transformers import GptOssForCausalLM

FOLDER = Path(__file__).parent / "golden"
DENSE, LONG, SHORT = 300, 4_200, 130  # tokens: all logits, a sample of the logits, all logits
SAMPLE = np.r_[300:4_096:200, 4_090:4_102, 4_180:4_200]


def logits(model, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens[None], dtype=torch.long)).logits[0].numpy()


def write_openai_mxfp4(model, folder: Path) -> None:
    """Write the model with random packed experts, and put their exact values into the model."""
    c = SIZES
    generator = torch.Generator().manual_seed(1)
    hf = {name: p.data.to(torch.bfloat16) for name, p in model.named_parameters()}
    tensors = {
        "embedding.weight": hf["model.embed_tokens.weight"],
        "norm.scale": hf["model.norm.weight"],
        "unembedding.weight": hf["lm_head.weight"],
    }
    for i in range(c.num_layers):
        ours, layer = f"block.{i}", f"model.layers.{i}"
        qkv = [f"{layer}.self_attn.{name}_proj" for name in "qkv"]
        tensors |= {
            f"{ours}.attn.norm.scale": hf[f"{layer}.input_layernorm.weight"],
            f"{ours}.attn.sinks": hf[f"{layer}.self_attn.sinks"],
            f"{ours}.attn.qkv.weight": torch.cat([hf[f"{name}.weight"] for name in qkv]),
            f"{ours}.attn.qkv.bias": torch.cat([hf[f"{name}.bias"] for name in qkv]),
            f"{ours}.attn.out.weight": hf[f"{layer}.self_attn.o_proj.weight"],
            f"{ours}.attn.out.bias": hf[f"{layer}.self_attn.o_proj.bias"],
            f"{ours}.mlp.norm.scale": hf[f"{layer}.post_attention_layernorm.weight"],
            f"{ours}.mlp.gate.weight": hf[f"{layer}.mlp.router.weight"],
            f"{ours}.mlp.gate.bias": hf[f"{layer}.mlp.router.bias"],
            f"{ours}.mlp.mlp1_bias": hf[f"{layer}.mlp.experts.gate_up_proj_bias"],
            f"{ours}.mlp.mlp2_bias": hf[f"{layer}.mlp.experts.down_proj_bias"],
        }
        for name, rows, columns in (
            ("mlp1", 2 * c.d_expert, c.d_model),
            ("mlp2", c.d_model, c.d_expert),
        ):
            shape = (c.num_experts, rows, columns // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
            tensors[f"{ours}.mlp.{name}_weight.blocks"] = blocks
            tensors[f"{ours}.mlp.{name}_weight.scales"] = scales
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")
    config = {
        "num_hidden_layers": c.num_layers,
        "num_experts": c.num_experts,
        "experts_per_token": c.active_experts,
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "intermediate_size": c.d_expert,
        "swiglu_limit": c.swiglu_limit,
        "head_dim": c.head_dim,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "sliding_window": c.window,
        "initial_context_length": c.initial_context,
        "rope_theta": c.rope_theta,
        "rope_scaling_factor": c.rope_factor,
        "rope_ntk_alpha": c.rope_beta_slow,
        "rope_ntk_beta": c.rope_beta_fast,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    stored = Checkpoint(str(folder), torch.device("cpu"))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).float()
    for i in range(c.num_layers):
        experts = model.model.layers[i].mlp.experts
        for name, parameter in (("mlp1", experts.gate_up_proj), ("mlp2", experts.down_proj)):
            value = stored.get(f"block.{i}.mlp.{name}_weight")
            parameter.data = value.float().transpose(1, 2).contiguous()


def main() -> None:
    torch.set_num_threads(2)
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    tokens = np.random.default_rng(0).integers(0, SIZES.vocab_size, LONG)
    model = reference.transformers_model()
    dense = logits(model, tokens[:DENSE])
    apart = np.abs(dense - reference.openai_logits(model, tokens[:DENSE])).max()
    assert apart < 3e-6 * np.abs(dense).max(), f"the two references differ by {apart}"
    golden = {
        "tokens": tokens.astype(np.int32),
        "logits": dense,
        "sample": SAMPLE,
        "logits_sample": logits(model, tokens)[SAMPLE],
    }
    gradients = reference.gradients(model, tokens[:DENSE])
    golden |= {f"gradient:{name}": value for name, value in gradients.items()}
    model.save_pretrained(FOLDER / "hf_float32")
    model.to(torch.bfloat16).save_pretrained(FOLDER / "hf_bf16")
    # Read again: `to` has rounded the rotary frequencies too, which no checkpoint holds.
    rounded = GptOssForCausalLM.from_pretrained(FOLDER / "hf_bf16", dtype=torch.float32)
    golden["logits_bf16"] = logits(rounded, tokens[:SHORT])
    packed = reference.transformers_model()
    write_openai_mxfp4(packed, FOLDER / "openai_mxfp4")
    golden["logits_mxfp4"] = logits(packed, tokens[:SHORT])
    np.savez_compressed(FOLDER / "golden.npz", **golden)


if __name__ == "__main__":
    main()
