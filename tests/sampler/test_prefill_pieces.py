"""Prompts read piece by piece give what they give at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import chips
from gptoss_jax.config import ModelConfig
from gptoss_jax.model import Transformer
from gptoss_jax.ops.unembed import unembed
from gptoss_jax.sampler import decode
from gptoss_jax.sampler.rules import Rules

CONFIG = ModelConfig(
    vocab_size=80, num_layers=3, d_model=32, num_heads=8, num_kv_heads=2, head_dim=16,
    num_experts=4, active_experts=2, d_expert=64, window=8, rope_factor=1.0, initial_context=256,
    context=256, dtype="float32", param_dtype="float32", init_std=0.3,
)  # fmt: skip
LENGTHS = np.array([45, 7, 33, 20, 1], np.int32)


def sampled(model, params, piece):
    prompts = np.random.default_rng(0).integers(0, 80, (5, 48)).astype(np.int32)
    options = decode.Options(
        Rules().values(80), jnp.zeros((5, 2), jnp.uint32), jnp.full(8, -1), jnp.asarray(LENGTHS)
    )
    cache, state = decode.prefill(
        model, params, jnp.asarray(prompts), options=options, cache_length=64, out_length=32,
        mode="greedy", piece=piece,
    )  # fmt: skip
    _, state = decode.decode(
        model, params, cache, state=state, options=options, until=jnp.int32(12), mode="greedy"
    )
    return np.asarray(state.tokens)[:, :12], np.asarray(state.logprobs)[:, :12]


@pytest.mark.parametrize("piece", [5, 20])  # shorter and longer than the window; the last is short
def test_pieces_are_the_whole(piece):
    model = Transformer(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens, logprobs = sampled(model, params, None)
    again, close = sampled(model, params, piece)
    np.testing.assert_array_equal(again, tokens)
    np.testing.assert_allclose(close, logprobs, rtol=1e-5, atol=1e-5)


def test_parts_of_the_vocabulary_are_the_whole():
    """As a GPU does it in float16."""
    hidden = jax.random.normal(jax.random.key(0), (3, 1, 48)).astype(jnp.float16)
    weight = jax.random.normal(jax.random.key(1), (64 * 5, 48)).astype(jnp.float16)
    want = np.einsum("BTD,VD->BTV", np.float32(hidden), np.float32(weight))
    with chips.assume("t4"):
        lowered = jax.jit(unembed).lower(hidden, weight).as_text()
        np.testing.assert_allclose(unembed(hidden, weight), want, rtol=1e-5, atol=1e-4)
    assert "stablehlo.while" in lowered
