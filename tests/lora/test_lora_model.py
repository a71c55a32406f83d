"""Adapters in the model: against dense weights W + s A B, alone and together, packed and not."""

from __future__ import annotations

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.config import LoRAConfig, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.lora import fold
from gptoss_jax.model import Transformer
from gptoss_jax.objectives.token_loss import loss_fn
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import MXFP4, Batch

TINY = ModelConfig(
    vocab_size=97, num_layers=3, d_model=32, num_heads=6, num_kv_heads=2, head_dim=10,
    num_experts=5, active_experts=2, d_expert=64, window=5, context=128, initial_context=64,
    dtype="float32", param_dtype="float32", init_std=0.2,
)  # fmt: skip
EVERY = ("attention", "experts", "router", "embedding", "unembedding")
# W[...] += scale * A B, spelled out for each weight.
EINSUM = {
    "layers/attention/q_weight": "LDr,LrNH->LNHD",
    "layers/attention/k_weight": "LDr,LrNH->LNHD",
    "layers/attention/v_weight": "LDr,LrNH->LNHD",
    "layers/attention/o_weight": "LNHr,LrD->LDNH",
    "layers/router/weight": "LDr,LrE->LED",
    "layers/experts/gate_up_weight": "LEDr,LErCF->LECFD",
    "layers/experts/down_weight": "LEFr,LErD->LEDF",
    "embedding/weight": "Vr,rD->VD",
    "unembedding/weight": "Dr,rV->VD",
}


def model_with(*targets: str, rank: int = 3, **changes) -> Transformer:
    own = LoRAConfig(targets=targets, rank=rank, alpha=5.0, rslora=changes.pop("rslora", False))
    return Transformer(dataclasses.replace(TINY, lora=own, **changes))


def make(model: Transformer, *, std: float = 0.1) -> dict:
    """Make parameters whose adapters are not zero, by numpy: compiling an init costs seconds."""
    random = np.random.default_rng(0)

    def leaf(path, x):
        name = jax.tree_util.keystr(path)
        if x.dtype == jnp.uint8:
            low, high = (118, 124) if "scales" in name else (0, 256)
            return jnp.asarray(random.integers(low, high, x.shape), jnp.uint8)
        values = (std if "lora" in name else 0.2) * random.normal(size=x.shape)
        return jnp.asarray(values + ("norm" in name), x.dtype)

    return jax.tree_util.tree_map_with_path(leaf, model.abstract_params())


@functools.partial(jax.jit, static_argnums=0)
def init(model: Transformer) -> dict:
    return dict(model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])


@functools.partial(jax.jit, static_argnums=0)
def logits(model: Transformer, params: dict, tokens) -> jax.Array:
    return model.apply({"params": params}, tokens)


def materialise(params: dict, scale: float) -> dict:
    """Return the base with W + scale * A B in place of what is adapted."""
    flat = flatten({k: v for k, v in params.items() if k != "lora"})
    own = flatten(params["lora"])
    for path in {name.rsplit("/", 1)[0] for name in own}:
        weight = flat[path]
        if isinstance(weight, MXFP4):
            weight = mxfp4.decode(weight, jnp.float32)
        a, b = own[f"{path}/a"], own[f"{path}/b"]
        flat[path] = weight + scale * jnp.einsum(EINSUM[path], a, b, precision="highest")
    return nest(flat)


def a_batch(rows: int = 2, length: int = 23) -> Batch:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, TINY.vocab_size, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[-1, -4:] = 0
    weights = ((rng.random((rows, length)) < 0.5) * segments).astype(np.float32)
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(*map(jnp.asarray, (tokens[:, :-1], tokens[:, 1:], weights, segments, positions)))


def close(got, want, tolerance: float = 1e-5) -> None:
    got, want = flatten({"x": got}), flatten({"x": want})
    assert got.keys() == want.keys()
    for path, a in want.items():
        limit = tolerance * max(float(np.abs(a).max()), 1e-3)
        np.testing.assert_allclose(got[path], a, atol=limit, rtol=0, err_msg=path)


def objective(model, params, batch):
    sums = loss_fn(model, params, batch, z_loss=0.1)
    return (sums.nll + sums.penalty) / sums.weight


@pytest.fixture(scope="module")
def both():
    """Compile value and gradients of the adapted model, and of the sum, once for all."""
    model, plain, batch = model_with(*EVERY), Transformer(TINY), a_batch()
    params = make(model)
    base = {k: v for k, v in params.items() if k != "lora"}

    def adapted(own):
        return objective(model, {**base, "lora": own}, batch)

    def dense(own):
        return objective(plain, materialise({**base, "lora": own}, 5.0 / 3), batch)

    value = float(jax.jit(objective, static_argnums=0)(plain, base, batch))
    run, want = (jax.jit(jax.value_and_grad(f)) for f in (adapted, dense))
    return params["lora"], run, want, value


@pytest.mark.parametrize("alone", [*EINSUM, None])
def test_values_and_gradients_are_those_of_the_sum(both, alone: str | None) -> None:
    own, run, want, base = both
    flat = flatten(own)
    flat = {k: x if alone is None or k == f"{alone}/b" or k[-1] == "a" else 0 * x
            for k, x in flat.items()}  # fmt: skip
    value, grads = run(nest(flat))
    expected, expected_grads = want(nest(flat))
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    assert abs(float(value) - base) > 1e-4, "the adapters do nothing"
    close(grads, expected_grads)
    for path, g in flatten(grads).items():
        assert np.abs(g).max() > 1e-6 or (path[-1] == "a" and not np.any(flat[path[:-1] + "b"]))


def test_some_targets_without_the_others() -> None:
    model = model_with("q", "down", "router")
    params = make(model)
    assert len(flatten(params["lora"])) == 6
    tokens = a_batch().tokens
    want = logits(Transformer(TINY), materialise(params, 5.0 / 3), tokens)
    close(logits(model, params, tokens), want)
    assert np.abs(want - logits(Transformer(TINY), drop(params), tokens)).max() > 0.01


@pytest.mark.slow
def test_gradients_through_packed_experts_are_those_through_the_same_decoded() -> None:
    batch = a_batch()
    packed = model_with(*EVERY, experts="mxfp4")
    params = make(packed)
    config, decoded = fold.decode_experts(packed.config, params)
    dense = Transformer(config)
    assert not any(isinstance(leaf, MXFP4) for leaf in flatten(decoded).values())

    def grads(model, params):
        free = {"lora": params["lora"], "embedding": params["embedding"]}
        fixed = {k: v for k, v in params.items() if k not in free}
        return jax.jit(jax.grad(lambda free: objective(model, {**fixed, **free}, batch)))(free)

    # The embedding's is the gradient of the input, through every layer.
    close(grads(packed, params), grads(dense, decoded))


@pytest.mark.slow  # what compiles for seconds is the random numbers of five axes
@pytest.mark.parametrize("form", ["dense", "mxfp4"])
def test_new_adapters_change_no_bit(form) -> None:
    model = model_with(*EVERY, experts=form)
    params = init(model)
    tokens = a_batch().tokens
    base = {k: v for k, v in params.items() if k != "lora"}
    plain = Transformer(dataclasses.replace(TINY, experts=form))
    want = logits(plain, base, tokens)
    np.testing.assert_array_equal(logits(model, params, tokens), want)
    # Parameters without adapters are the base, whatever the config says.
    np.testing.assert_array_equal(logits(model, base, tokens), want)
    chex.assert_trees_all_equal(init(plain), base)


def test_scales() -> None:
    assert LoRAConfig(targets=("q",), rank=4, alpha=6.0).scale == 1.5
    assert LoRAConfig(targets=("q",), rank=4, alpha=6.0, rslora=True).scale == 3.0
    one, two = model_with("q", rank=4), model_with("q", rank=4, rslora=True)
    params = make(one)
    doubled = {**params, "lora": jax.tree.map(lambda x: x, params["lora"])}
    doubled["lora"]["layers"]["attention"]["q_weight"]["b"] *= 2
    tokens = a_batch().tokens
    np.testing.assert_allclose(logits(two, params, tokens), logits(one, doubled, tokens), atol=1e-5)


def test_merged_logits_are_the_adapted_ones() -> None:
    model = model_with(*EVERY)
    params = make(model)
    tokens = a_batch().tokens
    config, merged = fold.merge(model.config, params)
    assert config == TINY and "lora" not in merged
    want = logits(model, params, tokens)
    close(logits(Transformer(config), merged, tokens), want)
    close(merged, materialise(params, 5.0 / 3))


def test_packed_experts_are_merged_dense_or_encoded_again() -> None:
    model = model_with("experts", "q", experts="mxfp4")
    params = make(model)
    tokens = a_batch().tokens
    config, merged = fold.merge(*fold.decode_experts(model.config, params))
    want = logits(model, params, tokens)
    close(logits(Transformer(config), merged, tokens), want)
    config, packed = fold.merge(model.config, params)
    assert config.experts == "mxfp4"
    for name in ("gate_up_weight", "down_weight"):
        found, exact = packed["layers"]["experts"][name], merged["layers"]["experts"][name]
        chex.assert_trees_all_equal(found, mxfp4.encode(exact, scale_rule="least_error"))
    with pytest.raises(UserError, match="no adapters to merge"):
        fold.merge(config, packed)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "mxfp4"])
def test_sampling_with_adapters_is_sampling_from_the_merged_model(form) -> None:
    model = model_with(*EVERY, experts=form)
    params = make(model)
    if form == "mxfp4":
        config, merged = fold.merge(*fold.decode_experts(model.config, params))
    else:
        config, merged = fold.merge(model.config, params)
    prompts = [[5, 3, 8, 1, 1, 20, 33], [7, 9]]
    options = {"max_tokens": 6, "stop_ids": []}
    got = Sampler(model, params).generate(prompts, **options)
    want = Sampler(Transformer(config), merged).generate(prompts, **options)
    assert got.tokens == want.tokens
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)
    base = Sampler(Transformer(dataclasses.replace(TINY, experts=form)), drop(params))
    assert base.generate(prompts, **options).tokens != got.tokens


def drop(params: dict) -> dict:
    return {k: v for k, v in params.items() if k != "lora"}


@pytest.mark.slow
def test_shapes_dtypes_and_axes_of_adapters() -> None:
    model = model_with(*EVERY, experts="mxfp4", param_dtype="bfloat16", dtype="bfloat16")
    tree = flatten(model.abstract_params()["lora"])
    assert all(x.dtype == jnp.float32 for x in tree.values())
    assert tree["layers/experts/gate_up_weight/a"].shape == (3, 5, 32, 3)
    assert tree["layers/experts/gate_up_weight/b"].shape == (3, 5, 3, 2, 64)
    assert tree["layers/experts/down_weight/a"].shape == (3, 5, 64, 3)
    assert tree["layers/attention/q_weight/b"].shape == (3, 3, 6, 10)
    assert tree["layers/attention/k_weight/b"].shape == (3, 3, 2, 10)
    assert tree["layers/attention/o_weight/a"].shape == (3, 6, 10, 3)
    assert tree["unembedding/weight/b"].shape == (3, 97)
    params = init(model)
    own = flatten(params["lora"])
    assert not any(np.any(x) for path, x in own.items() if path.endswith("/b"))
    np.testing.assert_allclose(np.std(own["embedding/weight/a"]), 1, rtol=0.15)
    np.testing.assert_allclose(np.std(own["layers/experts/down_weight/a"]), 64**-0.5, rtol=0.05)


def test_padding_of_experts_stays_zero() -> None:
    model = model_with("experts")
    config = dataclasses.replace(model.config, expert_padding=32)
    one, two = (lora_adapters.init(jax.random.key(2), c) for c in (model.config, config))
    a = two["layers"]["experts"]["down_weight"]["a"]
    assert a.shape == (3, 5, 96, 3)
    np.testing.assert_array_equal(a[:, :, :64], one["layers"]["experts"]["down_weight"]["a"])
    np.testing.assert_array_equal(a[:, :, 64:], 0)


@pytest.mark.parametrize(
    ("targets", "rank", "message"),
    [
        (("qq",), 3, r"model\.lora\.targets has 'qq': it names nothing .*there are q, k, v, o"),
        (("layers/attention/sinks",), 3, "names nothing that can be adapted"),
        (("q", "router"), 6, r"rank is 6, and layers/router/weight.* a side of 5"),
        (("k",), 21, r"rank is 21, and layers/attention/k_weight.* side of 20"),
        (("q[3]",), 3, "no axis to choose along"),
        (("gate_up[",), 3, "can't be read"),
    ],
)
def test_targets_that_say_nothing_and_ranks_too_large(targets, rank, message) -> None:
    with pytest.raises(UserError, match=message):
        model_with(*targets, rank=rank).abstract_params()
    with pytest.raises(UserError, match=r"lora\.rank is 0"):
        LoRAConfig(rank=0)
    with pytest.raises(UserError, match=r"lora\.alpha is -1"):
        LoRAConfig(alpha=-1.0)


def test_patterns_are_targets_too() -> None:
    found = lora_adapters.adapted(model_with("layers[1-]/attention/*_weight", "gate_up[3]").config)
    assert found == [f"layers/attention/{x}_weight" for x in "qkvo"] + [
        "layers/experts/gate_up_weight"
    ]
    assert lora_adapters.adapted(TINY) == []
