"""AdamW against its formula, the schedule, and who is decayed or frozen."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.model import Transformer
from gptoss_jax.optimizer import is_decayed, make_optimizer, make_schedule, merge, split_trainable
from gptoss_jax.types import MXFP4


def test_schedule_rises_then_falls_to_its_share():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=3, final_learning_rate=0.25)
    rate = [float(make_schedule(config, 10)(jnp.int32(i))) for i in range(11)]
    np.testing.assert_allclose(rate[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert all(a > b for a, b in itertools.pairwise(rate[3:10]))
    np.testing.assert_allclose(rate[6], 2 * (0.25 + 0.75 * 0.5), rtol=1e-6)  # half of the way
    np.testing.assert_allclose(rate[9:], 0.5, rtol=1e-6)


def test_constant_schedule_and_no_warmup():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0, schedule="constant")
    assert [float(make_schedule(config, 5)(jnp.int32(i))) for i in (0, 4, 9)] == [2.0] * 3


def test_update_is_adamw():
    config = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", weight_decay=0.3, clip_norm=0.7
    )
    optimizer = make_optimizer(config, 10)
    rng = np.random.default_rng(0)
    params = {"w": {"weight": rng.normal(size=(3, 2)), "bias": rng.normal(size=(5,))}}
    params = jax.tree.map(jnp.float32, params)
    state = optimizer.init(params)
    m = dict.fromkeys(("weight", "bias"), 0.0)
    v = dict(m)
    want = {k: np.asarray(x, np.float64) for k, x in params["w"].items()}
    for t in range(1, 4):
        grads = {k: rng.normal(size=x.shape) for k, x in want.items()}
        updates, state = optimizer.update({"w": jax.tree.map(jnp.float32, grads)}, state, params)
        params = optax.apply_updates(params, updates)
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        for k, g in grads.items():
            g = g * min(1, 0.7 / norm)
            m[k] = 0.9 * m[k] + 0.1 * g
            v[k] = 0.95 * v[k] + 0.05 * g**2
            step = m[k] / (1 - 0.9**t) / (np.sqrt(v[k] / (1 - 0.95**t)) + 1e-8)
            want[k] = want[k] - 0.1 * (step + (0.3 * want[k] if k == "weight" else 0))
    for k, x in params["w"].items():
        np.testing.assert_allclose(x, want[k], rtol=1e-5)


def test_decay_is_off_for_norms_biases_and_sinks():
    config = ModelConfig(num_layers=2, qk_norm=True)
    params = Transformer(config).abstract_params()
    flat = jax.tree_util.tree_leaves_with_path(is_decayed(params))
    off = {"/".join(k.key for k in path) for path, decayed in flat if not decayed}
    on = {"/".join(k.key for k in path) for path, decayed in flat if decayed}
    assert off == {
        "final_norm/scale",
        "layers/attention_norm/scale",
        "layers/moe_norm/scale",
        "layers/router/bias",
        *(f"layers/attention/{n}" for n in ("q_bias", "k_bias", "v_bias", "o_bias")),
        *(f"layers/attention/{n}" for n in ("sinks", "q_norm", "k_norm")),
        *(f"layers/experts/{n}" for n in ("gate_up_bias", "down_bias")),
    }
    assert len(on) == 9


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_small_steps_add_up_in_low_precision(dtype):
    config = OptimizerConfig(
        learning_rate=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0
    )
    optimizer = make_optimizer(config, 100)
    params = {"a": {"weight": jnp.ones((4, 3), dtype)}, "b": {"weight": jnp.ones(2)}}
    state = optimizer.init(params)
    for x in jax.tree.leaves(state):
        assert x.dtype in (jnp.float32, jnp.int32)

    @jax.jit
    def update(params, state):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(100):  # each a fortieth of bfloat16's spacing below 1
        params, state = update(params, state)
    assert params["a"]["weight"].dtype == jnp.dtype(dtype)
    np.testing.assert_allclose(np.float32(params["a"]["weight"]), 0.99, atol=2e-3)
    np.testing.assert_allclose(params["b"]["weight"], 0.99, atol=1e-5)


def test_packed_and_integer_leaves_are_frozen():
    packed = MXFP4(jnp.zeros((2, 1, 16), jnp.uint8), jnp.zeros((2, 1), jnp.uint8))
    params = {"e": {"w": packed, "bias": jnp.ones(2)}, "n": jnp.arange(3), "f": jnp.ones(3)}
    trainable, frozen = split_trainable(params)
    assert set(trainable) == {"e", "f"} and set(trainable["e"]) == {"bias"}
    assert set(frozen) == {"e", "n"} and frozen["e"]["w"] is packed
    together = merge(trainable, frozen)
    assert jax.tree.structure(together) == jax.tree.structure(params)
    only = {"e": {"w": packed}}
    assert split_trainable(only) == ({}, only)
