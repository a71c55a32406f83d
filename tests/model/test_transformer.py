"""The model's switches, its cache, its stacks, and what it reports."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.model.layers import RMSNorm
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters.tree import flatten, split_layers
from gptoss_jax.types import MXFP4

TINY = ModelConfig(
    vocab_size=53,
    num_layers=3,
    d_model=32,
    num_heads=6,
    num_kv_heads=2,
    head_dim=10,
    num_experts=5,
    active_experts=4,
    d_expert=64,
    window=8,
    initial_context=64,
    context=256,
    dtype="float32",
    param_dtype="float32",
)


def make(config: ModelConfig = TINY):
    """Return a model and random parameters, none of them zero or one."""
    model = Transformer(config)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.dtype == jnp.uint8:
            low, high = (0, 256) if leaf.shape[-1] == 16 else (121, 126)
            return jnp.asarray(rng.integers(low, high, leaf.shape), jnp.uint8)
        noise = rng.normal(size=leaf.shape) * 0.2
        return jnp.asarray(noise + ("norm" in jax.tree_util.keystr(path)), leaf.dtype)

    return model, jax.tree_util.tree_map_with_path(draw, model.abstract_params())


def tokens(batch: int, length: int, seed: int = 0):
    return jnp.asarray(np.random.default_rng(seed).integers(0, 53, (batch, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, *args):
    return model.apply({"params": params}, *args)


@functools.partial(jax.jit, static_argnums=0, static_argnames="capture")
def forward(model, params, ids, **options):
    return model.forward(params, ids, **options)


@pytest.mark.parametrize(
    "config, total, active",
    [
        (ModelConfig(), 20.91e9, 3.61e9),
        (ModelConfig(num_layers=36, num_experts=128), 116.83e9, 5.13e9),
    ],
    ids=["20b", "120b"],
)
def test_real_sizes(config, total, active):
    counted = Transformer(config).num_parameters()
    assert counted == pytest.approx((total, active), abs=0.005e9)
    packed = dataclasses.replace(config, experts="mxfp4")
    assert Transformer(packed).num_parameters() == counted
    shapes = Transformer(packed).abstract_params()["layers"]["experts"]
    assert shapes["gate_up_weight"].blocks.shape == (
        config.num_layers, config.num_experts, 2, 2880, 90, 16,
    )  # fmt: skip
    assert shapes["down_weight"].scales.dtype == jnp.uint8


@pytest.mark.parametrize("pattern", ["1:1", pytest.param("fbb", marks=pytest.mark.slow)])
def test_cached_decoding_equals_the_full_forward(pattern):
    """At every position across the window's edge, from a ragged prefill, by ones and by a chunk."""
    model, params = make(dataclasses.replace(TINY, layer_pattern=pattern))
    ids = tokens(2, 40)
    full = forward(model, params, ids).hidden
    lengths = np.array([11, 6])
    index = jnp.broadcast_to(jnp.arange(11), (2, 11))
    out = forward(
        model,
        params,
        ids[:, :11],
        segment_ids=jnp.asarray(index < lengths[:, None], jnp.int32),
        positions=index,
        cache=model.init_cache(2, 48),
    )
    for row, n in enumerate(lengths):
        np.testing.assert_allclose(out.hidden[row, :n], full[row, :n], atol=2e-5)
    cache, at = out.cache, jnp.asarray(lengths)[:, None]
    for step in [1] * 7 + [11] + [1] * 3 + [11]:
        positions = at + jnp.arange(step)
        chunk = jnp.take_along_axis(ids, jnp.minimum(positions, 39), axis=1)
        out = forward(
            model, params, chunk, segment_ids=jnp.ones_like(positions), positions=positions,
            cache=cache,
        )  # fmt: skip
        expected = jnp.take_along_axis(full, jnp.minimum(positions, 39)[..., None], axis=1)
        known = positions < 40
        np.testing.assert_allclose(out.hidden[known], expected[known], atol=2e-5)
        cache, at = out.cache, at + step
    assert int(at.max()) == 11 + 32 > 5 * TINY.window


def test_cache_has_a_ring_in_banded_layers():
    cache = Transformer(TINY).init_cache(2, 100)
    assert [k.shape for k in cache.keys] == [(2, s, 2, 10) for s in (8, 100, 8)]
    assert cache.empty


def test_packed_rows_equal_rows_alone():
    model, params = make()
    ids = tokens(1, 30)
    segments = jnp.asarray([[1] * 12 + [2] * 13 + [0] * 5])
    packed = apply(model, params, ids, segments)
    np.testing.assert_allclose(packed[:, :12], apply(model, params, ids[:, :12]), atol=2e-5)
    np.testing.assert_allclose(packed[:, 12:25], apply(model, params, ids[:, 12:25]), atol=2e-5)
    assert jnp.isfinite(packed).all()


def test_packed_experts_equal_decoded_ones():
    model, params = make(dataclasses.replace(TINY, experts="mxfp4"))
    experts = params["layers"]["experts"]
    assert isinstance(experts["down_weight"], MXFP4)
    dense = {
        name: mxfp4.decode(value, jnp.float32) if isinstance(value, MXFP4) else value
        for name, value in experts.items()
    }
    unpacked = {**params, "layers": {**params["layers"], "experts": dense}}
    ids = tokens(2, 21)
    np.testing.assert_allclose(
        apply(model, params, ids), apply(Transformer(TINY), unpacked, ids), atol=1e-5
    )


def test_stacks_may_be_tuples():
    for experts in ("dense", "mxfp4"):
        model, params = make(dataclasses.replace(TINY, experts=experts))
        split = {**params, "layers": split_layers(params["layers"], 3)}
        ids = tokens(2, 20)
        np.testing.assert_allclose(apply(model, split, ids), apply(model, params, ids), atol=1e-6)


@pytest.mark.slow
def test_remat_changes_nothing():
    ids = tokens(2, 20)

    def gradients(how):
        model, params = make(dataclasses.replace(TINY, remat=how))
        return jax.jit(jax.grad(lambda p: model.apply({"params": p}, ids).var()))(params)

    plain = gradients("none")
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(plain))
    full, offloaded = gradients("full"), gradients("offload")
    for recomputed in (gradients("dots"), full):
        chex.assert_trees_all_close(recomputed, plain, rtol=1e-4, atol=1e-7)
    # A group and a layer left over; what waits on the host is what was put there.
    for a, b in zip(jax.tree.leaves(offloaded), jax.tree.leaves(full), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_offloaded_layers_keep_their_inputs_on_the_host():
    """Traced: residuals of the layers are in host memory, one [B, T, D] each, none elsewhere."""
    model, params = make(dataclasses.replace(TINY, remat="offload"))
    ids = tokens(2, 20)

    def hidden(params):
        return model.forward(params, ids).hidden.sum()

    jaxpr = jax.make_jaxpr(jax.grad(hidden))(params)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    forward, backward = (str(e.params["jaxpr"]) for e in (scans[0], scans[-1]))
    assert forward.count("f32<host>[2,20,32]") == backward.count("f32<host>[2,20,32]") / 2 == 2
    on_host = [v.aval.str_short() for v in scans[0].outvars if "<host>" in v.aval.str_short()]
    assert len(on_host) == 2
    kept = [v.aval.shape for v in scans[0].outvars if v.aval.shape[-3:] == (2, 20, 32)]
    assert len(kept) == 2 + 1  # and what the last of them gives


SWITCHES = [
    {"sinks": "zero"},
    {"sinks": "off"},
    {"norm": "post"},
    {"qk_norm": True},
    {"layer_pattern": "2:1"},
    {"layer_pattern": "full"},
    {"window": 5},
    {"active_experts": 2},
    {"swiglu_limit": 0.5},
    {"rope_factor": 1.0},
    {"rope_factor": "auto"},
]


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_changes_the_function(switch):
    config = dataclasses.replace(TINY, num_layers=2)  # a third layer takes a third of the compiler
    model, params = make(config)
    other = Transformer(dataclasses.replace(config, **switch))
    shapes = other.abstract_params()
    # The same weights wherever the switch leaves a parameter in place.
    layers = params["layers"]
    attention = dict(layers["attention"])
    if switch.get("sinks"):
        del attention["sinks"]
    if switch.get("qk_norm"):
        attention |= {"q_norm": jnp.ones((2, 10)), "k_norm": jnp.ones((2, 10))}
    changed = {**params, "layers": {**layers, "attention": attention}}
    chex.assert_trees_all_equal_shapes_and_dtypes(changed, shapes)
    ids = tokens(1, 30)
    apart = jnp.abs(apply(other, changed, ids) - apply(model, params, ids)).max()
    assert jnp.isfinite(apart) and apart > 1e-3


def test_zero_sinks_are_learned_sinks_at_zero():
    model, params = make()
    attention = dict(params["layers"]["attention"])
    attention["sinks"] = jnp.zeros_like(attention["sinks"])
    learned = {**params, "layers": {**params["layers"], "attention": dict(attention)}}
    del attention["sinks"]
    fixed = {**params, "layers": {**params["layers"], "attention": attention}}
    zero = Transformer(dataclasses.replace(TINY, sinks="zero"))
    ids = tokens(1, 20)
    np.testing.assert_array_equal(apply(zero, fixed, ids), apply(model, learned, ids))


@pytest.mark.parametrize(
    "pattern, layers, kinds",
    [
        ("1:1", 5, "bfbfb"),
        pytest.param("5:1", 8, "bbbbbfbb", marks=pytest.mark.slow),
        ("full", 3, "fff"),
        ("banded", 2, "bb"),
        ("bffb", 4, "bffb"),
    ],
)
def test_layer_patterns(pattern, layers, kinds):
    config = dataclasses.replace(TINY, layer_pattern=pattern, num_layers=layers)
    assert config.layer_windows == tuple(8 if kind == "b" else None for kind in kinds)
    if layers > 4:  # a remainder beside whole periods: scanned and unrolled agree
        model, params = make(config)
        split = {**params, "layers": split_layers(params["layers"], layers)}
        ids = tokens(1, 12)
        np.testing.assert_allclose(apply(model, params, ids), apply(model, split, ids), atol=1e-6)


def test_what_a_layer_pattern_is_not():
    with pytest.raises(UserError, match=r"model\.layer_pattern is '0:1'"):
        dataclasses.replace(TINY, layer_pattern="0:1")


def test_router_statistics_leave_padding_out():
    model, params = make()
    ids = tokens(2, 20)
    segments = jnp.ones((2, 20), jnp.int32).at[:, 13:].set(0)
    with_padding = forward(model, params, ids, segment_ids=segments).router
    alone = forward(model, params, ids[:, :13]).router
    chex.assert_trees_all_close(with_padding, alone, atol=1e-5)
    np.testing.assert_allclose(alone.load.sum(axis=1), 1.0, rtol=1e-6)
    assert alone.load.shape == (3, 5) and (alone.balance_loss > 0.9).all()


def test_experts_drop_beyond_their_capacity():
    model, params = make(dataclasses.replace(TINY, num_layers=2, layer_pattern="full"))
    tight = Transformer(dataclasses.replace(model.config, capacity_factor=0.4))
    ids = tokens(2, 20)
    segments = jnp.ones((2, 20), jnp.int32).at[:, 13:].set(0)
    options = {"segment_ids": segments, "capture": ("expert_ids", "expert_weights", "moe_out")}
    all_of, some_of = (forward(m, params, ids, **options) for m in (model, tight))
    real = np.asarray(segments != 0)
    assert not np.asarray(all_of.router.dropped).any()
    taken = np.asarray(some_of.captured["expert_ids"])[:, real]  # [L, R, A]
    room = int(np.ceil(0.4 * 26 * 4 / 5))
    for layer, row in enumerate(taken):
        assert np.bincount(row.ravel(), minlength=6)[:5].max() == room
        np.testing.assert_allclose(some_of.router.dropped[layer], (row == 5).mean(), rtol=1e-6)
    # The first layer's routers see the same rows: nothing else than what was dropped differs.
    asked = np.asarray(all_of.captured["expert_ids"])[:, real]
    np.testing.assert_array_equal(taken[0], np.where(taken[0] == 5, 5, asked[0]))
    for name in ("load", "balance_loss", "z_loss"):
        np.testing.assert_array_equal(
            getattr(some_of.router, name)[0], getattr(all_of.router, name)[0]
        )
    np.testing.assert_allclose(some_of.captured["expert_weights"].sum(-1), 1, rtol=1e-5)
    added = np.asarray(some_of.captured["moe_out"])[:, real]
    nothing_left = (taken == 5).all(axis=-1)
    assert 0 < nothing_left.sum() < nothing_left.size
    np.testing.assert_array_equal((added == 0).all(axis=-1), nothing_left)


def test_without_capacity_the_model_is_the_same_and_dropless_says_so():
    model, params = make()
    tight = Transformer(dataclasses.replace(TINY, capacity_factor=0.4))
    assert model.dropless() is model
    assert tight.dropless() == model and tight.config.capacity_factor == 0.4
    ids = tokens(1, 9)
    text = [str(jax.make_jaxpr(m.forward)(params, ids)) for m in (model, tight, tight.dropless())]
    assert text[0] == text[2] and text[0].count("sort") < text[1].count("sort")


def test_capture_returns_what_it_names():
    model, params = make()
    ids = tokens(2, 9)
    out = forward(
        model,
        params,
        ids,
        capture=("residual", "attention_out", "moe_out", "expert_ids", "router_logits"),
    )
    seen = out.captured
    assert {k: v.shape for k, v in seen.items()} == {
        "residual": (3, 2, 9, 32), "attention_out": (3, 2, 9, 32), "moe_out": (3, 2, 9, 32),
        "expert_ids": (3, 2, 9, 4), "router_logits": (3, 2, 9, 5),
    }  # fmt: skip
    np.testing.assert_allclose(
        seen["residual"][1] - seen["residual"][0],
        seen["attention_out"][1] + seen["moe_out"][1],
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="capture names 'nothing'"):
        model.forward(params, ids, capture=("nothing",))


@pytest.mark.parametrize("dtype, residual", [("float16", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes(dtype, residual):
    model, params = make(dataclasses.replace(TINY, dtype=dtype))
    out = forward(model, params, tokens(1, 9), capture=("residual",))
    assert out.hidden.dtype == dtype and out.captured["residual"].dtype == residual
    assert model.unembed(params, out.hidden).dtype == jnp.float32


def test_ids_outside_the_vocabulary_are_refused():
    """JAX would take the last row for them. A program that is traced does not know its ids."""
    model, params = make()
    ids = np.array(tokens(2, 5))
    ids[1, 3] = 53
    named = r"id 53 at position \(1, 3\) is outside the vocabulary: ids go from 0 to 52"
    for given in (ids, jnp.asarray(ids)):
        with pytest.raises(UserError, match=named):
            model.apply({"params": params}, given)
        with pytest.raises(UserError, match=named):
            model.forward(params, given)
    jax.eval_shape(model.forward, params, ids)


def test_wrong_shapes_are_refused():
    model, params = make()
    params["layers"]["router"]["bias"] = jnp.zeros((3, 6))
    with pytest.raises(Exception, match="bias"):
        model.forward(params, tokens(1, 4))


def test_a_part_of_one_s_own_is_declared_where_run_uses_it():
    """The layers do not run while parameters are declared; all else does."""

    class Own(Transformer):
        def setup(self):
            super().setup()
            self.second_norm = RMSNorm(self.config, "final_norm/scale")

        def run(self, *args, **options):
            out = super().run(*args, **options)
            return out.replace(hidden=self.second_norm(out.hidden))

    shapes = flatten(Own(TINY).abstract_params())
    assert shapes.keys() - flatten(Transformer(TINY).abstract_params()).keys() == {
        "second_norm/scale"
    }
