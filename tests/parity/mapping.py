"""The sizes that parity is tested at, and Hugging Face tensors as our tree."""

from __future__ import annotations

import numpy as np

from gptoss_jax.config import ModelConfig

# Pairwise-distinct sizes, and K != N/K: equal ones hide swapped axes. The window, YaRN and the
# context are the real ones.
SIZES = ModelConfig(
    vocab_size=151,
    num_layers=3,
    d_model=64,
    num_heads=10,
    num_kv_heads=2,
    head_dim=12,
    num_experts=6,
    active_experts=4,
    d_expert=32,
    dtype="float32",
    param_dtype="float32",
)


def to_tree(tensors: dict[str, np.ndarray], config: ModelConfig = SIZES) -> dict:
    """Map Hugging Face tensors (values or gradients) to our tree, by hand: no name table."""
    c = config
    D, F, E, H = c.d_model, c.d_expert, c.num_experts, c.head_dim

    def stack(name: str, *shape: int) -> np.ndarray:
        name = f"model.layers.{{}}.{name}"
        return np.stack([tensors[name.format(i)].reshape(shape) for i in range(c.num_layers)])

    def attention(name: str, heads: int) -> dict[str, np.ndarray]:
        return {
            f"{name}_weight": stack(f"self_attn.{name}_proj.weight", heads, H, D),
            f"{name}_bias": stack(f"self_attn.{name}_proj.bias", heads, H),
        }

    gate_up = stack("mlp.experts.gate_up_proj", E, D, F, 2)
    return {
        "embedding": {"weight": tensors["model.embed_tokens.weight"]},
        "final_norm": {"scale": tensors["model.norm.weight"]},
        "unembedding": {"weight": tensors["lm_head.weight"]},
        "layers": {
            "attention_norm": {"scale": stack("input_layernorm.weight", D)},
            "moe_norm": {"scale": stack("post_attention_layernorm.weight", D)},
            "attention": {
                **attention("q", c.num_heads),
                **attention("k", c.num_kv_heads),
                **attention("v", c.num_kv_heads),
                "o_weight": stack("self_attn.o_proj.weight", D, c.num_heads, H),
                "o_bias": stack("self_attn.o_proj.bias", D),
                "sinks": stack("self_attn.sinks", c.num_heads),
            },
            "router": {
                "weight": stack("mlp.router.weight", E, D),
                "bias": stack("mlp.router.bias", E),
            },
            "experts": {
                "gate_up_weight": np.transpose(gate_up, (0, 1, 4, 3, 2)),
                "gate_up_bias": np.transpose(
                    stack("mlp.experts.gate_up_proj_bias", E, F, 2), (0, 1, 3, 2)
                ),
                "down_weight": np.transpose(stack("mlp.experts.down_proj", E, F, D), (0, 1, 3, 2)),
                "down_bias": stack("mlp.experts.down_proj_bias", E, D),
            },
        },
    }
