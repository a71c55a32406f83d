"""Stochastic rounding: right on average, nothing lost, the same again after resuming."""

from __future__ import annotations

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.config import Config, ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.optimizer.low_precision import round_stochastically

SMALL = OptimizerConfig(
    learning_rate=1e-4, warmup_steps=0, schedule="constant", weight_decay=0.0, eps=1e-20,
    masters="stochastic",
)  # fmt: skip
rounded = jax.jit(round_stochastically)


def bits(x):
    return np.asarray(x).view(np.uint16)


def test_what_bfloat16_holds_stays():
    every = np.arange(2**16, dtype=np.uint32).astype(np.uint16).view(jnp.bfloat16)
    for seed in range(3):
        got = rounded(np.float32(every), jax.random.key(seed))
        finite = ~np.isnan(np.float32(every))
        np.testing.assert_array_equal(bits(got)[finite], bits(every)[finite])
        assert np.isnan(np.float32(got)[~finite]).all()


def test_not_a_number_never_becomes_one():
    odd = np.array([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0xFF800001], np.uint32).view(np.float32)
    got = rounded(np.repeat(odd, 1000), jax.random.key(0))
    assert np.isnan(np.float32(got)).all()


@pytest.mark.parametrize("share", [1 / 65536, 0.1, 0.5, 0.93])
@pytest.mark.parametrize("scale", [1.0, -3.0, 1e-30, 2e30])
def test_rounds_to_neighbours_and_right_on_average(share, scale):
    low = np.float32(jnp.bfloat16(scale))
    high = (bits(jnp.bfloat16(scale)) + np.uint16(1)).view(jnp.bfloat16).astype(np.float32)
    x = np.float32(low + np.float64(high - low) * share)
    n = 1_000_000
    got = np.float32(rounded(np.full(n, x), jax.random.key(1)))
    up = (got == high).mean()
    assert set(np.unique(got)) <= {low, high}
    exact = (np.float64(x) - low) / (np.float64(high) - low)
    assert abs(up - exact) < 5 * np.sqrt(exact * (1 - exact) / n)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (40, 1, 2)])
def test_chance_is_alike_everywhere_and_independent(shape):
    # Half way between neighbours, so that each is a throw of a coin; by axis, and by key.
    x = jnp.full((*shape[:-1], 200, 300, shape[-1]), 1 + 2**-8, jnp.float32)
    throws = [np.float32(rounded(x, k)) > 1 for k in jax.random.split(jax.random.key(2), 2)]
    a, b = (t.astype(np.float64) - 0.5 for t in throws)
    limit = 5 * 0.25 / np.sqrt(a.size)
    assert abs((a * b).mean()) < limit and abs(a.mean()) < 2 * limit
    for axis in range(a.ndim):
        for lag in (1, 2, 16):
            if lag < a.shape[axis]:
                beside = np.take(a, range(lag, a.shape[axis]), axis)
                product = beside * np.take(a, range(a.shape[axis] - lag), axis)
                assert abs(product.mean()) < 5 * 0.25 / np.sqrt(product.size), (axis, lag)
        means = a.mean(tuple(i for i in range(a.ndim) if i != axis))
        assert np.abs(means).max() < 6 * 0.5 / np.sqrt(a.size / a.shape[axis])


def small_steps(config, params, *, steps):
    optimizer = make_optimizer(config, steps)

    @jax.jit
    def run(params):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(jnp.ones_like, params)
            updates, state = optimizer.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0]

    return run(params)


def test_tiny_steps_add_up_where_rounding_to_nearest_stands_still():
    # 1e-4 of a parameter of 1 is a fortieth of bfloat16's step below it.
    start = {"a": {"weight": jnp.ones((40, 50), jnp.bfloat16)}, "b": {"weight": jnp.ones(3)}}
    params, state = small_steps(SMALL, start, steps=2000)
    nearest = np.float32(jnp.bfloat16(jnp.float32(1) - 1e-4))
    assert nearest == 1.0
    assert params["a"]["weight"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(params["a"]["weight"]).mean(), 0.8, atol=2e-3)
    np.testing.assert_allclose(params["b"]["weight"], 0.8, atol=1e-4)
    assert not np.all(params["a"]["weight"] == params["a"]["weight"][0])
    # Adam's two moments are all that has a parameter's size: no copy.
    sizes = [x.size for x in jax.tree.leaves(state)]
    assert sizes.count(2000) == 2 and sizes.count(3) == 2 and max(sizes) == 2000


def test_leaves_draw_bits_of_their_own():
    start = {"a": {"weight": jnp.ones(500, jnp.bfloat16)}}
    start["b"] = jax.tree.map(jnp.copy, start["a"])
    params, _ = small_steps(SMALL, start, steps=3)
    assert (params["a"]["weight"] != params["b"]["weight"]).any()


def test_resuming_draws_the_same_bits():
    rng = np.random.default_rng(0)
    params = {"a": {"weight": jnp.asarray(rng.normal(size=(30, 7)), jnp.bfloat16)}}
    grads = [{"a": {"weight": jnp.asarray(rng.normal(size=(30, 7)))}} for _ in range(6)]

    def go_on(params, state, grads, *, seed):
        optimizer = make_optimizer(SMALL, 6, seed=seed)
        state = optimizer.init(params) if state is None else state
        update = jax.jit(optimizer.update)
        for g in grads:
            updates, state = update(g, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    want = go_on(params, None, grads, seed=3)
    half = jax.device_get(go_on(params, None, grads[:3], seed=3))
    chex.assert_trees_all_equal(go_on(*half, grads[3:], seed=3), want)
    # The key is in the state, whatever seed the program that goes on has.
    chex.assert_trees_all_equal(go_on(*half, grads[3:], seed=4), want)
    other = go_on(params, None, grads, seed=4)[0]
    assert (other["a"]["weight"] != want[0]["a"]["weight"]).any()


def test_float16_is_refused():
    params = {"a": {"weight": jnp.ones(3, jnp.float16)}}
    with pytest.raises(UserError, match=r"float16.*--optimizer.masters float32"):
        make_optimizer(SMALL, 5).init(params)
    with pytest.raises(UserError, match=r"optimizer.masters .* model.param_dtype"):
        Config(model=ModelConfig(param_dtype="float16"), optimizer=SMALL)
