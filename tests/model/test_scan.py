"""What the scan over layers keeps for its backward pass."""

import re

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.model import Transformer

SIZES = {"num_layers": 6, "d_model": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
EXPERTS = {"num_experts": 5, "active_experts": 2, "d_expert": 24}


def test_backward_keeps_no_copy_of_the_weights_and_runs_no_loop_again():
    model = Transformer(
        ModelConfig(
            vocab_size=64, window=8, dtype="float32", param_dtype="float32", **SIZES, **EXPERTS
        )
    )
    tokens = jnp.arange(2 * 40).reshape(2, 40) % 64
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]

    def total(params):
        return jnp.sum(model.apply({"params": params}, tokens) ** 2)

    program = jax.jit(jax.grad(total)).lower(params).compile().as_text()
    # what a scan of 3 groups would keep of one layer of each: [3, E, 2, F, D] and [3, E, D, F]
    assert "f32[3,5,2,24,32]" not in program
    assert "f32[3,5,32,24]" not in program
    loops = re.findall(r' while\(.*op_name="([^"]*)"', program)
    assert any("experts" in name for name in loops)  # they are told apart by their names
    assert not [name for name in loops if "rematted" in name]
