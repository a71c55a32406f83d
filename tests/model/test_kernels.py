"""The whole model as it would run on chips with kernels, interpreted, against the CPU's forms."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import chips
from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.model import Transformer
from gptoss_jax.objectives.token_loss import loss_fn
from gptoss_jax.ops import moe
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.training.step import init_state, make_train_step
from gptoss_jax.types import Batch

CONFIG = ModelConfig(
    vocab_size=64,
    num_layers=3,  # a scan over one pair and a layer left over
    d_model=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    num_experts=5,
    active_experts=2,
    d_expert=96,
    window=8,
    context=64,
    initial_context=32,
    experts="mxfp4",
    dtype="float32",
    param_dtype="float32",
)


def relaid(params, layout):
    if layout is None:
        return params
    layers = params["layers"]
    experts = {
        name: moe.relay(name, leaf, layout=layout) if name.endswith("weight") else leaf
        for name, leaf in layers["experts"].items()
    }
    return {**params, "layers": {**layers, "experts": experts}}


@functools.cache
def model_and_params():
    model = Transformer(CONFIG)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    return model, params


def decode_steps(model, params, tokens):
    """Return the logits of a prompt's pass and of three steps after it, from the cache."""
    cache = model.init_cache(1, 32)
    outs = []
    for start, stop in ((0, 9), (9, 10), (10, 11), (11, 12)):
        positions = jnp.arange(start, stop)[None]
        out = model.forward(params, tokens[:, start:stop], positions=positions, cache=cache)
        cache = out.cache
        outs.append(model.unembed(params, out.hidden))
    return jnp.concatenate(outs, axis=1)


@pytest.mark.slow
def test_a_train_step_takes_relaid_experts():
    """They are frozen, and take no optimizer memory, as in the checkpoint's order."""
    model, params = model_and_params()
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.01), 10)
    step = make_train_step(model, optimizer, loss_fn)
    tokens = jnp.arange(24).reshape(1, 24) * 7 % 64
    ones = jnp.ones_like(tokens)
    places = jnp.arange(24)[None]
    batch = Batch(tokens, jnp.roll(tokens, -1, 1), jnp.ones((1, 24)), ones, places)
    states = []
    for layout in (None, "columns"):
        copies = jax.tree.map(jnp.copy, relaid(params, layout))
        state = init_state(model, optimizer, copies)
        # With little optimisation (--quick) the compiler sums another order of columns in another
        # order: with what users have, both have the same bits.
        options: Any = {"xla_backend_optimization_level": 3}
        if jax.__version__.startswith("0.10."):  # others do not know it
            options["xla_cpu_use_fusion_emitters"] = True
        compiled = step.lower(state, batch).compile(options)  # pyright: ignore
        for _ in range(2):
            state, metrics = compiled(state, batch)
        states.append((state, metrics))
    (plain, a), (other, b) = states
    assert a.loss == b.loss
    np.testing.assert_array_equal(
        plain.params["layers"]["attention"]["q_weight"],
        other.params["layers"]["attention"]["q_weight"],
    )
    sizes = [sum(x.size for x in jax.tree.leaves(s.opt_state)) for s in (plain, other)]
    assert sizes[0] == sizes[1]
    want = relaid(params, "columns")["layers"]["experts"]["down_weight"]
    got = other.params["layers"]["experts"]["down_weight"]
    np.testing.assert_array_equal(got.codes, want.codes)


# The interpreters look for races. Training below runs on experts in the checkpoint's order.
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(None, marks=pytest.mark.exhaustive),
        pytest.param("columns", marks=pytest.mark.slow),
    ],
)
def test_sampling_on_a_tpu_gives_the_same_logits(layout):
    model, params = model_and_params()
    tokens = jnp.arange(12)[None] * 5 % 64
    want = jax.jit(functools.partial(decode_steps, model))(params, tokens)
    with chips.assume("v5e", interpret=True):
        got = jax.jit(functools.partial(decode_steps, model))(relaid(params, layout), tokens)
    np.testing.assert_allclose(got, want, atol=1e-5 * float(jnp.abs(want).max()))


@pytest.mark.slow
def test_training_on_a_tpu_gives_the_same_gradients():
    """Without remat: the interpreter has effects, which `jax.checkpoint` does not take."""
    model, params = model_and_params()
    tokens = jnp.arange(24).reshape(1, 24) * 7 % 64
    segments = jnp.array([[1] * 10 + [2] * 12 + [0] * 2])

    def loss(attention, params):
        layers = {**params["layers"], "attention": attention}
        out = model.forward({**params, "layers": layers}, tokens, segment_ids=segments)
        return jnp.sum(jnp.cos(out.hidden) * (segments != 0)[..., None])

    run = functools.partial(jax.value_and_grad(loss), params["layers"]["attention"], params)
    want = jax.jit(run)()
    with chips.assume("v5e", interpret=True):
        got = jax.jit(run)()
    np.testing.assert_allclose(got[0], want[0], rtol=1e-5)
    for name, a in want[1].items():
        largest = max(float(jnp.abs(a).max()), 1e-3)
        np.testing.assert_allclose(got[1][name], a, atol=1e-5 * largest, err_msg=name)


def no_races(capsys):
    assert "RACE DETECTED" not in capsys.readouterr().out


@pytest.mark.skipif(jax.__version_info__ < chips.MOSAIC_GPU, reason="Mosaic GPU: jax 0.11.2")
@pytest.mark.parametrize("layout", [None, "hopper"])
def test_sampling_on_hopper_agrees(layout, capsys):
    """In bfloat16, so by norm; one layer of each kind."""
    config = dataclasses.replace(
        CONFIG, num_layers=2, head_dim=64, dtype="bfloat16", param_dtype="bfloat16"
    )
    model = Transformer(config)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    tokens = jnp.arange(12)[None] * 5 % 64
    want = jax.jit(functools.partial(decode_steps, model))(params, tokens)
    with chips.assume("h200", interpret=True):
        got = jax.jit(functools.partial(decode_steps, model))(relaid(params, layout), tokens)
    assert float(jnp.linalg.norm(got - want)) <= 2e-2 * float(jnp.linalg.norm(want))
    no_races(capsys)
