"""AdamW against its formula, the schedules, who is decayed, frozen, slowed, balanced, averaged."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.optimizer import (
    is_decayed,
    make_optimizer,
    make_schedule,
    merge,
    split_trainable,
    update_ema,
)
from gptoss_jax.parameters import patterns
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


def test_wsd_rises_stays_and_falls_in_a_line():
    config = OptimizerConfig(
        learning_rate=2.0, warmup_steps=3, schedule="wsd", decay_share=0.25,
        final_learning_rate=0.1,
    )  # fmt: skip
    rate = [float(make_schedule(config, 20)(jnp.int32(i))) for i in range(22)]
    np.testing.assert_allclose(rate[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-6)
    assert rate[3:15] == [2.0] * 12  # the last of them is 5 updates, a quarter, before the end
    np.testing.assert_allclose(np.diff(rate[14:20]), [-0.36] * 5, rtol=1e-5)
    np.testing.assert_allclose(rate[19:], 0.2, rtol=1e-6)


@pytest.mark.parametrize(("share", "want"), [(0.0, [1, 1, 1, 1]), (1.0, [0.75, 0.5, 0.25, 0])])
def test_wsd_without_a_fall_and_with_nothing_else(share, want):
    config = OptimizerConfig(
        learning_rate=1.0, warmup_steps=0, schedule="wsd", decay_share=share,
        final_learning_rate=0.0,
    )  # fmt: skip
    rate = [float(make_schedule(config, 4)(jnp.int32(i))) for i in range(4)]
    np.testing.assert_allclose(rate, want, atol=1e-7)


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
    trainable, frozen = split_trainable(params, ("f", "e/nothing"))
    assert set(trainable) == {"e"} and set(frozen) == {"e", "n", "f"}
    assert jax.tree.structure(merge(trainable, frozen)) == jax.tree.structure(params)


# What follows is about real paths: two layers, three experts.
SHAPES = {
    "embedding": {"weight": (11, 8)},
    "final_norm": {"scale": (8,)},
    "layers": {
        "attention": {"q_weight": (2, 3, 4, 8), "o_weight": (2, 8, 3, 4), "sinks": (2, 3)},
        "experts": {"gate_up_weight": (2, 3, 2, 6, 8), "down_bias": (2, 3, 8)},
        "router": {"weight": (2, 3, 8), "bias": (2, 3)},
    },
}
LOAD = jnp.float32([[0.5, 0.2, 0.3], [1 / 3, 0.6, 0.0]])


def random_params(dtype="float32", *, seed=0):
    rng = np.random.default_rng(seed)
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    tree = jax.tree.map(lambda s: rng.normal(size=s), SHAPES, is_leaf=is_shape)
    # Zeros of both signs, which adding 0.0 would not tell apart.
    tree["layers"]["attention"]["sinks"][:, :2] = -0.0, 0.0
    return jax.tree.map(lambda x: x.astype(jnp.dtype(dtype)), tree)


def train(config, params, *, steps=3, frozen=(), update_args=None, **options):
    """Pull parameters towards others; return them, the optimizer's state and the losses."""
    optimizer = make_optimizer(config, steps, **options)
    target = split_trainable(random_params(seed=1), frozen)[0]
    trainable, rest = split_trainable(params, frozen)

    @jax.jit
    def step(params, state):
        def loss(params):
            parts = jax.tree.map(
                lambda p, t: jnp.sum((p.astype("float32") - t) ** 2), params, target
            )
            return sum(jax.tree.leaves(parts))

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params, **(update_args or {}))
        return optax.apply_updates(params, updates), state, value

    state, losses = jax.jit(optimizer.init)(trainable), []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return jax.device_get((merge(trainable, rest), state, losses))


def make_masks(**fields):
    return patterns.masks(random_params(), OptimizerConfig(**fields))


def same_bits(a, b):
    return np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon"])
def test_every_optimizer_trains_and_leaves_frozen_slices_alone(name):
    config = OptimizerConfig(name=name, learning_rate=0.1, warmup_steps=2, weight_decay=0.2)
    masks = make_masks(
        freeze=("layers[0]/attention/*", "layers/experts[1]/*", "embedding/*"),
        learning_rates=("layers[1]/router/weight=0",),
    )
    frozen = patterns.frozen_paths(masks)
    assert frozen == ("embedding/weight",)
    params = random_params("bfloat16")
    new, state, losses = train(config, params, steps=40, frozen=frozen, masks=masks)
    assert losses[-1] < 0.75 * losses[0]  # a third of it is that of frozen slices
    assert same_bits(new["embedding"]["weight"], params["embedding"]["weight"])
    layers, old = new["layers"], params["layers"]
    for path in ("q_weight", "o_weight", "sinks"):
        have, want = layers["attention"][path], old["attention"][path]
        assert same_bits(have[0], want[0]) and not same_bits(have[1], want[1])
    for path in ("gate_up_weight", "down_bias"):
        have, want = layers["experts"][path], old["experts"][path]
        assert same_bits(have[:, 1], want[:, 1])
        assert not same_bits(have[:, 0], want[:, 0]) and not same_bits(have[:, 2], want[:, 2])
    assert same_bits(layers["router"]["weight"][1], old["router"]["weight"][1])
    assert not same_bits(layers["router"]["weight"][0], old["router"]["weight"][0])
    sizes = [x.shape for x in jax.tree.leaves(state)]
    assert (11, 8) not in sizes  # no memory for what is frozen


def test_stochastic_rounding_trains_and_leaves_frozen_slices_alone():
    config = OptimizerConfig(
        learning_rate=0.02, warmup_steps=2, weight_decay=0.2, masters="stochastic"
    )
    others = ("embedding/weight", "layers/experts/gate_up_weight", "layers/experts/down_bias")
    others += ("layers/attention/q_weight", "layers/attention/o_weight")  # compile slowly
    masks = make_masks(freeze=("layers[0]/*", *others))
    params = random_params("bfloat16")
    new, _, losses = train(config, params, steps=60, frozen=others, masks=masks)
    assert losses[-1] < 0.75 * losses[0]
    for module, path in (("attention", "sinks"), ("router", "weight"), ("router", "bias")):
        have, want = (x["layers"][module][path] for x in (new, params))
        assert same_bits(have[0], want[0]) and not same_bits(have[1], want[1])


@pytest.mark.parametrize("masters", ["float32", "stochastic"])
def test_only_float32_masters_have_copies(masters):
    config = OptimizerConfig(masters=masters, moment_dtype="bfloat16")
    state = jax.eval_shape(make_optimizer(config, 5).init, random_params("bfloat16"))
    wide = [x for x in jax.tree.leaves(state) if x.size > 2 and x.dtype == jnp.float32]
    assert len(wide) == (2 if masters == "float32" else 1) * 9  # second moments, and copies
    half = [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16]
    assert len(half) == 9


def test_second_moment_in_bfloat16_is_adam_with_it_rounded_after_each_step():
    config = OptimizerConfig(
        learning_rate=0.3, warmup_steps=0, schedule="constant", weight_decay=0.0, clip_norm=0.0,
        eps=1e-3, b1=0.8, b2=0.9, second_moment_dtype="bfloat16", masters="stochastic",
    )  # fmt: skip
    optimizer = make_optimizer(config, 9)
    params = {"final_norm": {"scale": jnp.linspace(-1.0, 2.0, 7)}}  # in float32: nothing by chance
    state = optimizer.init(params)
    kept = [x for x in jax.tree.leaves(state) if x.shape == (7,)]
    assert sorted(str(x.dtype) for x in kept) == ["bfloat16", "float32"]

    def rounded(x):
        return np.float64(np.asarray(x, jnp.bfloat16))

    want, mu, nu = np.linspace(-1.0, 2.0, 7), np.zeros(7), np.zeros(7)
    for i in range(1, 7):
        grad = np.sin(np.arange(7) * i) + 0.1
        updates, state = optimizer.update(
            {"final_norm": {"scale": jnp.asarray(grad, jnp.float32)}}, state, params
        )
        params = optax.apply_updates(params, updates)
        mu, nu = 0.8 * mu + 0.2 * grad, 0.9 * nu + 0.1 * grad**2
        step = (mu / (1 - 0.8**i)) / (np.sqrt(nu / (1 - 0.9**i)) + 1e-3)
        want, nu = want - 0.3 * step, rounded(nu)
        np.testing.assert_allclose(params["final_norm"]["scale"], want, rtol=1e-5, atol=1e-5)


def test_a_second_moment_that_fades_in_bfloat16_does_not_stop():
    config = OptimizerConfig(second_moment_dtype="bfloat16", b2=0.99, clip_norm=0.0)
    optimizer = make_optimizer(config, 9)
    params = {"final_norm": {"scale": jnp.ones(5)}}

    @jax.jit
    def moment(state, grad):
        grads = {"final_norm": {"scale": jnp.full(5, grad)}}
        return optimizer.update(grads, state, params)[1]

    state = moment(optimizer.init(params), 1.0)
    before = float(optax.tree_utils.tree_get(state, "nu")["final_norm"]["scale"][0])
    for _ in range(100):
        state = moment(state, 0.0)
    after = float(optax.tree_utils.tree_get(state, "nu")["final_norm"]["scale"][0])
    np.testing.assert_allclose(after / before, 0.99**100, rtol=0.25)


def test_factors_scale_the_update_weight_decay_included():
    config = OptimizerConfig(learning_rate=0.1, warmup_steps=0, weight_decay=0.5, clip_norm=0)
    masks = make_masks(learning_rates=("layers[1]/*=0.25", "embedding/*=3"))
    params, grads = random_params(), random_params(seed=1)

    def update(grads, params, masks):
        optimizer = make_optimizer(config, 5, masks=masks)
        return optimizer.update(grads, optimizer.init(params), params)[0]

    plain = jax.jit(lambda g, p: update(g, p, None))(grads, params)
    slowed = jax.jit(lambda g, p: update(g, p, masks))(grads, params)
    by_path = {"embedding/weight": 3.0, "final_norm/scale": 1.0}
    for path, want in jax.tree_util.tree_leaves_with_path(plain):
        names = [k.key for k in path]
        factor = np.float32(by_path.get("/".join(names), [1, 0.25]))
        factor = factor.reshape(*factor.shape, *(1,) * (want.ndim - factor.ndim))
        np.testing.assert_allclose(_leaf(slowed, names), factor * np.asarray(want), rtol=1e-6)


def _leaf(tree, names):
    for name in names:
        tree = tree[name]
    return tree


def test_frozen_slices_count_in_no_norm():
    masks = make_masks(freeze=("layers[0]/*", "embedding/*", "final_norm/*"))
    optimizer = make_optimizer(OptimizerConfig(clip_norm=1e-3), 5, masks=masks)
    params, grads = random_params(), random_params(seed=1)
    update = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[1])
    state = jax.device_get(update(grads, params))
    norm = np.sqrt(sum((g[1] ** 2).sum() for g in jax.tree.leaves(grads["layers"])))
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "grad_norm"), norm, rtol=1e-6)
    first = jax.tree.leaves(optax.tree_utils.tree_get(state, "mu")["layers"])
    assert all((x[0] == 0).all() for x in first)
    np.testing.assert_allclose(sum((x**2).sum() for x in first), (0.1 * 1e-3) ** 2, rtol=1e-5)


def test_not_finite_gradients_of_frozen_slices_do_no_harm():
    optimizer = make_optimizer(OptimizerConfig(), 5, masks=make_masks(freeze=("layers[0]/*",)))
    params = random_params()
    grads = random_params(seed=1)
    for leaf in jax.tree.leaves(grads["layers"]):
        leaf[0] = np.nan
    updates, _ = jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p))(grads, params)
    assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))


@pytest.mark.parametrize(("name", "dtype"), [("adamw", "bfloat16"), ("muon", "float32")])
def test_router_bias_goes_towards_experts_with_too_few_rows(name, dtype):
    config = OptimizerConfig(name=name, learning_rate=0.1, weight_decay=0.5)
    params = random_params(dtype)
    options = {"balance_bias": 0.25, "update_args": {"load": LOAD}}
    new, _, _ = train(config, params, steps=2, **options)
    new, old = (np.float32(x["layers"]["router"]["bias"]) for x in (new, params))
    want = [[-0.5, 0.5, 0.5], [0, -0.5, 0.5]]
    np.testing.assert_allclose(new - old, want, atol=1e-6 if dtype == "float32" else 0.02)


def test_the_gradient_that_the_router_bias_does_not_follow_counts_in_no_norm():
    params = random_params()

    def norm(grads, balance_bias):
        optimizer = make_optimizer(OptimizerConfig(), 5, balance_bias=balance_bias)
        _, state = optimizer.update(grads, optimizer.init(params), params, load=LOAD)
        return optax.tree_utils.tree_get(state, "grad_norm")

    grads = jax.tree.map(jnp.ones_like, params)
    size = sum(x.size for x in jax.tree.leaves(params))
    for step, want in ((0.0, size), (0.25, size - 6)):
        got = jax.jit(norm, static_argnums=1)(grads, step)
        np.testing.assert_allclose(got**2, want, rtol=1e-5)


def test_router_bias_that_is_frozen_can_not_be_balanced():
    options = {"balance_bias": 0.25, "update_args": {"load": LOAD}}
    masks = make_masks(freeze=("layers[0]/*",), learning_rates=("layers[1]/router/*=0.5",))
    params = random_params()
    params["layers"]["router"]["bias"][0] = -0.0  # which adding 0 * a step would change
    new, _, _ = train(OptimizerConfig(), params, masks=masks, steps=1, **options)
    bias, old = new["layers"]["router"]["bias"], params["layers"]["router"]["bias"]
    assert same_bits(bias[0], old[0])
    np.testing.assert_allclose(bias[1] - old[1], [0, -0.25, 0.25], atol=1e-6)
    with pytest.raises(UserError, match=r"balance_bias .* layers/router/bias"):
        train(OptimizerConfig(), params, frozen=("layers/router/bias",), **options)
    with pytest.raises(ValueError, match="load"):
        train(OptimizerConfig(), params, balance_bias=0.25)


def test_average_of_parameters():
    rng = np.random.default_rng(0)
    steps = [{"a": {"b": jnp.asarray(rng.normal(size=(3, 2)), jnp.bfloat16)}} for _ in range(40)]
    ema = jax.tree.map(jnp.float32, steps[0])
    want = np.float64(ema["a"]["b"])
    for i, params in enumerate(steps):
        ema = update_ema(ema, params, decay=0.75, step=jnp.int32(i))
        decay = min(0.75, (i + 1) / (i + 10))
        want = decay * want + (1 - decay) * np.float64(params["a"]["b"])
        if i == 0:
            assert same_bits(ema["a"]["b"], np.float32(steps[0]["a"]["b"]))
    assert ema["a"]["b"].dtype == jnp.float32
    np.testing.assert_allclose(ema["a"]["b"], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "adafactor", "moment_dtype": "bfloat16"}, "moment_dtype .* adafactor"),
        ({"name": "muon", "second_moment_dtype": "bfloat16"}, "needs optimizer.name adamw"),
        ({"b2": 0.999, "second_moment_dtype": "bfloat16"}, "b2 of at most 0.99"),
        ({"decay_share": 1.5}, "decay_share is 1.5"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"b1": -0.1}, "b1 is -0.1"),
    ],
)
def test_refused(fields, words):
    with pytest.raises(UserError, match=words):
        OptimizerConfig(**fields)
