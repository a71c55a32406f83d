"""Adapters of experts in every form, and low-rank products, against dense weights W + A B."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from moe_cases import LIMIT, D, F, cast, check, inputs, pack

from gptoss_jax.ops import lora, mxfp4
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe import Adapters, experts
from gptoss_jax.ops.moe import adapters as low_rank

RANK = 3
decode = jax.jit(mxfp4.decode)
FORMS = ("xla", "grouped", "reference")
PARTS = {"gate_up": (True, False), "down": (False, True), "both": (True, True)}


def make_adapters(num_experts: int, *, gate_up: bool = True, down: bool = True) -> Adapters:
    rng = np.random.default_rng(3)
    shapes = (
        (num_experts, D, RANK), (num_experts, RANK, 2, F), (num_experts, F, RANK),
        (num_experts, RANK, D),
    )  # fmt: skip
    a, b, c, d = (jnp.asarray(0.3 * rng.normal(size=s), jnp.float32) for s in shapes)
    return Adapters(LowRank(a, b) if gate_up else None, LowRank(c, d) if down else None)


def materialise(weights: dict, adapters: Adapters) -> dict:
    """Return dense weights with the products of the adapters in them."""
    new = dict(weights)
    if adapters.gate_up:
        update = jnp.einsum("EDr,ErCF->ECFD", *adapters.gate_up, precision="highest")
        new["gate_up_weight"] = new["gate_up_weight"] + update
    if adapters.down:
        update = jnp.einsum("EFr,ErD->EDF", *adapters.down, precision="highest")
        new["down_weight"] = new["down_weight"] + update
    return new


def objective(out: jax.Array) -> jax.Array:
    return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape)))


@functools.partial(jax.jit, static_argnames=("implementation", "chunk", "limit"))
def adapted(args, frozen, adapters, mask=None, *, implementation=None, chunk=None, limit=LIMIT):
    """Return the output and the gradients in x, shares, adapters and the weights not frozen."""
    x, ids, shares, weights = args

    def run(x, shares, adapters, weights):
        out = experts(
            x, ids, shares, **weights, **frozen, adapters=adapters, limit=limit, mask=mask,
            chunk=chunk, implementation=implementation,
        )  # fmt: skip
        return objective(out), out

    grad = jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True)
    (_, out), (dx, d_shares, d_adapters, d_weights) = grad(x, shares, adapters, weights)
    return {"out": out, "x": dx, "shares": d_shares, **_named(d_adapters), **d_weights}


@functools.partial(jax.jit, static_argnames=("limit",))
def materialised(args, frozen, adapters, mask=None, *, limit=LIMIT):
    """Do the same by dense weights W + A B, every expert on every row."""
    x, ids, shares, weights = args

    def run(x, shares, adapters, weights):
        dense = materialise({**weights, **frozen}, adapters)
        out = experts(
            x, ids, shares, **dense, limit=limit, mask=mask, implementation="reference"
        )  # fmt: skip
        return objective(out), out

    grad = jax.value_and_grad(run, (0, 1, 2, 3), has_aux=True)
    (_, out), (dx, d_shares, d_adapters, d_weights) = grad(x, shares, adapters, weights)
    return {"out": out, "x": dx, "shares": d_shares, **_named(d_adapters), **d_weights}


def _named(adapters: Adapters) -> dict:
    leaves = jax.tree_util.tree_leaves_with_path(adapters)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", PARTS)
def test_values_and_all_gradients_are_those_of_the_sum(form: str, parts: str) -> None:
    args = inputs(37, 5, 2, routing="skewed")
    adapters = make_adapters(5, gate_up=PARTS[parts][0], down=PARTS[parts][1])
    got = adapted(args, {}, adapters, implementation=form)
    assert len(got) == 3 + 2 * sum(PARTS[parts]) + 4
    check(got, materialised(args, {}, adapters))


@pytest.mark.parametrize("form", FORMS)
def test_through_packed_experts_as_through_the_same_decoded(form: str) -> None:
    args, packed = pack(inputs(70, 5, 2))
    adapters = make_adapters(5)
    got = adapted(args, packed, adapters, implementation=form)
    decoded = {name: decode(w) for name, w in packed.items()}
    check(got, materialised(args, decoded, adapters))


@pytest.mark.parametrize(
    ("form", "rows", "num_experts", "active", "routing"),
    [
        ("xla", 300, 5, 3, "single"),
        ("grouped", 300, 5, 3, "single"),
        ("grouped", 300, 32, 4, "even"),
        ("grouped", 129, 32, 4, "skewed"),
        ("grouped", 1, 5, 2, "even"),
        ("xla", 1, 5, 2, "even"),
    ],
)
def test_any_routing(form: str, rows: int, num_experts: int, active: int, routing: str) -> None:
    args = inputs(rows, num_experts, active, routing=routing)
    adapters = make_adapters(num_experts)
    check(adapted(args, {}, adapters, implementation=form), materialised(args, {}, adapters))


@pytest.mark.parametrize("form", ["xla", "grouped"])
def test_masked_and_dropped_rows_touch_no_adapter(form: str) -> None:
    x, ids, shares, weights = inputs(75, 5, 2)
    mask = jnp.arange(75) % 3 != 1
    ids = ids.at[::5, 0].set(5)  # dropped pairs
    adapters = make_adapters(5)
    want = materialised((x, ids, shares, weights), {}, adapters, mask)
    poisoned = jnp.where(mask[:, None], x, jnp.nan)
    got = adapted((poisoned, ids, shares, weights), {}, adapters, mask, implementation=form)
    check(got, want)


@pytest.mark.parametrize("form", ["xla", "grouped"])
def test_chunks_of_rows(form: str) -> None:
    args, packed = pack(inputs(70, 5, 2))
    adapters = make_adapters(5)
    got = adapted(args, packed, adapters, implementation=form, chunk=32)
    check(got, adapted(args, packed, adapters, implementation="reference"))


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_few_rows_without_gradients(rows: int) -> None:
    (x, ids, shares, weights), packed = pack(inputs(rows, 5, 2))
    adapters = make_adapters(5)

    @functools.partial(jax.jit, static_argnums=0)
    def run(implementation):
        return experts(
            x, ids, shares, **weights, **packed, adapters=adapters, limit=LIMIT,
            implementation=implementation,
        )  # fmt: skip

    want = run("reference")
    np.testing.assert_allclose(run("xla"), want, atol=1e-5 * np.abs(want).max(), rtol=0)


def test_bfloat16_rows_with_float32_adapters_keep_the_dtypes() -> None:
    limit = 50.0  # met by none: which side of it a row is on is no matter of rounding
    args, packed = pack(inputs(70, 5, 2))
    args = cast(args, jnp.bfloat16)
    adapters = make_adapters(5)
    exact = adapted(
        jax.tree.map(lambda w: w.astype(jnp.float32) if w.dtype == jnp.bfloat16 else w, args),
        packed, adapters, implementation="reference", limit=limit,
    )  # fmt: skip
    for form in ("xla", "grouped"):
        got = adapted(args, packed, adapters, implementation=form, limit=limit)
        assert got["out"].dtype == got["x"].dtype == jnp.bfloat16
        for name, want in exact.items():
            if "/" in name:
                assert got[name].dtype == jnp.float32
            error = np.linalg.norm(got[name].astype(jnp.float32) - want) / np.linalg.norm(want)
            assert error < 0.02, (form, name, error)


def test_zero_adapters_change_no_bit_and_get_gradients() -> None:
    args, packed = pack(inputs(70, 5, 2))
    x, ids, shares, weights = args
    adapters = make_adapters(5)
    empty = Adapters(*(LowRank(w.a, jnp.zeros_like(w.b)) for w in adapters if w))
    for form in ("xla", "grouped"):
        got = adapted(args, packed, empty, implementation=form)
        plain = jax.jit(
            lambda x, form=form: experts(
                x, ids, shares, **weights, **packed, limit=LIMIT, implementation=form
            )
        )(x)
        np.testing.assert_array_equal(got["out"], plain)
        for name in ("gate_up/b", "down/b"):
            assert np.abs(got[name]).max() > 0.01
        for name in ("gate_up/a", "down/a"):
            np.testing.assert_array_equal(got[name], 0)


@pytest.mark.parametrize("form", ["xla", "grouped"])
def test_no_gradient_of_frozen_dense_experts_is_formed(form: str) -> None:
    args = inputs(300, 32, 4)
    x, ids, shares, weights = args
    adapters = make_adapters(32)

    def memory(frozen: dict, trained: dict) -> tuple[int, str]:
        run = functools.partial(adapted, implementation=form)
        compiled = run.func.lower((x, ids, shares, trained), frozen, adapters, implementation=form)
        compiled = compiled.compile()
        return compiled.cost_analysis()["flops"], compiled.as_text()

    flops, text = memory(weights, {})
    all_flops, all_text = memory({}, weights)
    assert flops < all_flops
    if form == "xla":  # how the stacks of gradients appear
        assert f"f32[32,{2 * F},{D}]" in all_text
        assert f"f32[32,{2 * F},{D}]" not in text
    assert text.count("f32[32,2,96,64]") < all_text.count("f32[32,2,96,64]")


def test_kernels_for_few_rows_refuse_adapters() -> None:
    x, ids, shares, weights = inputs(3, 5, 2)
    for name in ("planes", "pallas_tpu", "pallas_gpu"):
        with pytest.raises(ValueError, match="does not support adapters"):
            experts(
                x, ids, shares, **weights, adapters=make_adapters(5), limit=LIMIT,
                implementation=name,
            )  # fmt: skip


@pytest.mark.parametrize("sizes", [[0, 200, 0, 3, 57], [0, 0, 0, 0, 0], [260, 0, 0, 0, 0]])
def test_every_sorted_row_has_a_place_in_a_block_of_its_expert(sizes: list[int]) -> None:
    pairs = 260
    blocks = low_rank.blocks_of(jnp.array(sizes), pairs=pairs)
    expert = np.repeat(np.arange(5), sizes)
    count = blocks.expert.shape[0]
    per_block = blocks.row_at.shape[0] // count
    assert np.array_equal(blocks.is_row, np.arange(pairs) < len(expert))
    places = np.asarray(blocks.of_row)[: len(expert)]
    assert len(set(places)) == len(expert)
    np.testing.assert_array_equal(np.asarray(blocks.expert)[places // per_block], expert)
    np.testing.assert_array_equal(np.asarray(blocks.row_at)[places], np.arange(len(expert)))
    np.testing.assert_array_equal(np.flatnonzero(blocks.is_used), np.sort(places))


@pytest.mark.parametrize("inputs_,outputs", [((7,), (5, 3)), ((5, 3), (7,))])
def test_low_rank_products(inputs_: tuple[int, ...], outputs: tuple[int, ...]) -> None:
    rng, width = np.random.default_rng(0), int(np.prod(inputs_))
    shapes = (*inputs_, 4), (4, *outputs), (2, 6, width)
    a, b, x = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    adapter = LowRank(a, b)
    full = lora.update(adapter, lookup=True)
    assert full.shape == (*inputs_, *outputs)
    want = np.einsum("BTC,CN->BTN", x, np.asarray(full).reshape(width, -1))
    want = want.reshape(2, 6, *outputs)
    np.testing.assert_allclose(lora.product(x, adapter), want, atol=1e-5 * np.abs(want).max())
    low = lora.product(x.astype(jnp.bfloat16), adapter)
    assert low.dtype == jnp.bfloat16
    assert lora.product(x.astype(jnp.bfloat16), adapter, jnp.float32).dtype == jnp.float32


def test_the_sum_is_rounded_once_to_the_weight_s_dtype() -> None:
    """W + A B: in W's dtype, and in float32 where W is packed."""
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((64, 3), (3, 5)))
    weight = rng.normal(size=(5, 64)).astype(np.float32)
    added = (np.asarray(a, np.float64) @ np.asarray(b, np.float64)).T
    for dtype in (jnp.float32, jnp.bfloat16):
        narrow = jnp.asarray(weight, dtype)
        got = lora.fold(narrow, LowRank(a, b))
        assert got.dtype == dtype
        want = np.asarray(narrow, np.float64) + added
        digits = 2.0**-8 if dtype == jnp.bfloat16 else 1e-6
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=digits, atol=1e-5)
    packed = mxfp4.encode(jnp.asarray(weight))
    got = lora.fold(packed, LowRank(a, b))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.asarray(decode(packed)) + added, rtol=1e-5, atol=1e-5)


def test_rows_of_a_table() -> None:
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((11, 3), (3, 7)))
    adapter = LowRank(a, b)
    ids = jnp.array([[0, 10, 4], [4, 4, 1]])
    want = np.asarray(lora.update(adapter, lookup=True))[ids]
    np.testing.assert_allclose(
        lora.rows_of(ids, adapter, jnp.float32), want, atol=1e-5 * np.abs(want).max()
    )
