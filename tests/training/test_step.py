"""The step: accumulation, skipped steps, frozen weights, what it reports."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_training import D, E, L, Toy, V, toy_batch

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.model import Transformer
from gptoss_jax.objectives.token_loss import loss_fn
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.training.step import init_state, make_train_step
from gptoss_jax.types import MXFP4

CONFIG = OptimizerConfig(learning_rate=0.02, warmup_steps=3)


@cache
def make(*, accumulate=1, dtype="float32", z_loss=0.0, on_nan="stop", ema=0.0):
    """Return (model, optimizer, step); the same one for the same arguments, compiled once."""
    model, optimizer = Toy(dtype), make_optimizer(CONFIG, 10)
    objective = partial(loss_fn, z_loss=z_loss)
    step = make_train_step(
        model, optimizer, objective, accumulate=accumulate, on_nan=on_nan, ema=ema
    )
    return model, optimizer, step


def run(steps=2, **options):
    model, optimizer, step = make(**options)
    average = options.get("ema", 0) > 0
    state = init_state(model, optimizer, None, seed=4, average=average)
    seen = []
    for i in range(steps):
        state, metrics = step(state, toy_batch(4, 9, seed=i))
        seen.append(metrics)
    return state, seen


def test_accumulation_is_one_big_batch():
    whole, seen = run(z_loss=0.1)
    parts, seen_parts = run(accumulate=4, z_loss=0.1)
    chex.assert_trees_all_close(parts.params, whole.params, rtol=2e-4, atol=1e-6)
    for a, b in zip(seen, seen_parts, strict=True):
        np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        np.testing.assert_allclose(a.router.z_loss, b.router.z_loss, rtol=1e-5)
        np.testing.assert_allclose(a.router.load, b.router.load, rtol=1e-5)
        assert a.tokens == b.tokens


def test_the_average_follows_the_parameters_of_each_step():
    """Steps count from 0: decays 1/10, 2/11, 3/12 after the first three steps."""
    start = init_state(Toy(), make_optimizer(CONFIG, 10), None, seed=4).params
    params = [run(steps, ema=0.9)[0].params for steps in (1, 2, 3)]
    want = jax.device_get(start)
    for decay, after in zip((1 / 10, 2 / 11, 3 / 12), params, strict=True):
        want = jax.tree.map(lambda e, p, d=decay: d * e + (1 - d) * np.asarray(p), want, after)
    chex.assert_trees_all_close(run(3, ema=0.9)[0].ema, want, rtol=1e-5, atol=1e-6)


# Its "update" is the gradient, as the optimizer gets it.
KEEP = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda updates, state, params=None: (jax.tree.map(jnp.zeros_like, updates), updates),
)
SMALL = ModelConfig(
    vocab_size=V, num_layers=2, d_model=D, num_heads=3, num_kv_heads=1, head_dim=6, num_experts=E,
    active_experts=2, d_expert=10, window=4, context=32, dtype="float32", param_dtype="float32",
    init_std=0.4,
)  # fmt: skip


@pytest.mark.parametrize(
    "model", [Toy(), pytest.param(Transformer(SMALL), marks=pytest.mark.slow)], ids=["toy", "real"]
)
def test_gradients_that_accumulate_are_those_of_one_batch(model):
    """Of the mean over all weights, by all logits at once; the four parts weigh unevenly."""
    batch = toy_batch(8, 9)
    share = np.repeat(np.array([[2.0], [0.05], [0.0], [0.7]], np.float32), 2, axis=0)
    batch = dataclasses.replace(batch, weights=batch.weights * share)
    parts = batch.weights.reshape(4, -1).sum(1)
    assert parts[2] == 0 and 5 * parts[1] < parts[3] and 5 * parts[1] < parts[0]
    state = init_state(model, KEEP, None, seed=4)

    def mean(params):
        out = model.forward(
            params, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
        )
        table = params["unembedding"]["weight"]
        logits = jnp.einsum("BTD,VD->BTV", out.hidden, table, precision="highest")
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
        return -jnp.sum(logp * batch.weights) / batch.weights.sum()

    loss, want = jax.device_get(jax.jit(jax.value_and_grad(mean))(state.params))
    for accumulate in (4, 1):
        step = make_train_step(model, KEEP, loss_fn, accumulate=accumulate)
        after, measured = step(init_state(model, KEEP, None, seed=4), batch)
        np.testing.assert_allclose(measured.loss, loss, rtol=1e-5)
        got, expected = flatten(after.opt_state), flatten(want)
        assert got.keys() == expected.keys()
        for path, g in expected.items():
            limit = 1e-5 * np.abs(g).max()
            np.testing.assert_allclose(got[path], g, rtol=0, atol=limit, err_msg=path)
        assert np.abs(expected["unembedding/weight"]).max() > 1e-3


def test_low_precision_parameters_stay_so_and_accumulate_in_float32():
    state, _ = run(1, dtype="bfloat16", accumulate=2)
    weight = state.params["embedding"]["weight"]
    copy = state.opt_state.copies["embedding"]["weight"]
    assert weight.dtype == jnp.bfloat16 and copy.dtype == jnp.float32
    np.testing.assert_array_equal(weight, copy.astype(jnp.bfloat16))
    assert not np.array_equal(weight.astype(jnp.float32), copy)


def test_metrics_say_what_happened():
    state, (first, second) = run()
    batch = toy_batch(4, 9, seed=0)
    np.testing.assert_allclose(first.trained, batch.weights.sum(), rtol=1e-6)
    assert first.tokens == 4 * 9 - 3 and bool(first.finite)
    np.testing.assert_allclose([first.learning_rate, second.learning_rate], [0.005, 0.01])
    assert first.router.load.shape == (L, E)
    np.testing.assert_allclose(first.router.load.sum(-1), 1, rtol=1e-5)
    params = init_state(Toy(), make_optimizer(CONFIG, 10), None, seed=4).params
    sums = loss_fn(Toy(), params, batch)
    np.testing.assert_allclose(first.loss, sums.nll / sums.weight, rtol=1e-6)
    assert int(state.step) == 2


def test_same_seed_same_state_and_training_lowers_the_loss():
    chex.assert_trees_all_equal(run(1)[0].params, run(1)[0].params)
    model, optimizer, step = make()
    state, batch = init_state(model, optimizer, None), toy_batch(4, 9)
    losses = []
    for _ in range(10):
        state, metrics = step(state, batch)
        losses.append(float(metrics.loss))
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("on_nan", ["skip", "stop"])
def test_a_step_that_is_not_finite(on_nan):
    model, optimizer, step = make(on_nan=on_nan)
    state = init_state(model, optimizer, None)
    state, _ = step(state, toy_batch(4, 9))
    before = jax.device_get((state.params, state.opt_state))
    bad = toy_batch(4, 9, seed=1)
    bad = bad.replace(weights=np.where(bad.weights > 0, np.float32(np.inf), 0))
    state, metrics = step(state, bad)
    assert not metrics.finite and int(state.step) == 2
    if on_nan == "skip":
        chex.assert_trees_all_equal(jax.device_get((state.params, state.opt_state)), before)
        _, metrics = step(state, toy_batch(4, 9, seed=2))
        assert metrics.finite
    else:
        assert np.isnan(state.params["embedding"]["weight"]).any()


def test_packed_weights_pass_through():
    class Packed(Toy):
        def forward(self, params, tokens, **rest):
            params = dict(params)
            scale = params.pop("packed").scales.astype(jnp.float32).mean()
            out = super().forward(params, tokens, **rest)
            return out.replace(hidden=out.hidden * scale)

    model, optimizer = Packed(), optax.sgd(0.1)
    params = Toy().init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    packed = MXFP4(jnp.full((2, 1, 16), 7, jnp.uint8), jnp.full((2, 1), 1, jnp.uint8))
    state = init_state(model, optimizer, {**params, "packed": packed})
    assert all(x.dtype != jnp.uint8 for x in jax.tree.leaves(state.opt_state))
    step = make_train_step(model, optimizer, loss_fn)
    old = np.array(params["middle_weight"])
    state, metrics = step(state, toy_batch(2, 5))
    assert metrics.finite and np.isnan(metrics.learning_rate)  # sgd does not tell
    np.testing.assert_array_equal(state.params["packed"].blocks, 7)
    assert old.shape == (D, D) and not np.array_equal(state.params["middle_weight"], old)


def test_the_step_compiles_once_and_takes_over_the_state():
    model, optimizer = Toy(), make_optimizer(CONFIG, 10)
    step = make_train_step(model, optimizer, chex.assert_max_traces(loss_fn, n=1))
    state = init_state(model, optimizer, None)
    given = state.params["middle_weight"]
    for i in range(3):
        state, _ = step(state, toy_batch(2, 5, seed=i))
    assert given.is_deleted()
