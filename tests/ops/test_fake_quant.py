"""Fake quantisation against a slow search in float64, against the encoder, and its gradient."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.ops import moe, mxfp4
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.mxfp4.fake import quantise, straight_through
from gptoss_jax.types import LayerOf

MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def blocks() -> np.ndarray:
    """Return [90, 64]: blocks of many sizes, with outliers, ties, cut values and extremes."""
    rng = np.random.default_rng(3)
    x = rng.standard_t(3, (90, 64)) * np.exp2(rng.integers(-60, 60, (90, 1)))
    x[10:20, 5] *= 40
    x[20] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 4, -0.25, -5], 64)
    x[21] = np.resize([7.0, 0.5, -1.5, 0.25], 64)  # 7 is as far from 6 as from 8
    x[22] = np.resize([6.0, -6.0, 3.0, -0.0], 64)
    x[23], x[24] = 0.0, np.ldexp(1.0, -126)
    x[25] = np.resize([3e38, -1e38], 64)
    return x.astype(np.float32)


def slow(block: np.ndarray) -> np.ndarray:
    """Return the values of least squared error, by trying every scale that could have it."""
    amax = np.abs(block).max()
    if amax == 0:
        return np.copysign(0.0, block)
    first = max(int(np.floor(np.log2(amax))) - 2, -126)
    best, least = block, np.inf
    for scale in (first, first + 1, first - 1):
        if not -126 <= scale <= 125:
            continue
        unit = np.ldexp(np.abs(block), -scale)
        distance = np.abs(np.minimum(unit, 6)[:, None] - MAGNITUDES)
        near = distance == distance.min(1, keepdims=True)
        code = np.where(near & (np.arange(8) % 2 == 0), 2, near).argmax(1)
        values = np.ldexp(np.copysign(MAGNITUDES[code], block), scale)
        error = np.sum(np.ldexp(values - block, -first) ** 2)
        if error < least * (1 - 1e-6):
            best, least = values, error
    return best


run = jax.jit(quantise)


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_values_are_those_of_a_slow_search_and_of_what_is_written(dtype: type) -> None:
    x = jnp.asarray(blocks(), dtype)
    got = run(x)
    assert got.dtype == dtype
    written = mxfp4.decode(mxfp4.encode(x, "least_error"), dtype)
    np.testing.assert_array_equal(bits(got), bits(written))
    halves = np.asarray(x, np.float64).reshape(-1, 32)
    want = np.stack([slow(block) for block in halves]).reshape(x.shape)
    kept = np.abs(want) >= np.ldexp(1.0, -126)  # what is smaller may be flushed
    np.testing.assert_array_equal(np.asarray(got, np.float64)[kept], want[kept])
    assert (np.asarray(got, np.float64) != np.asarray(x, np.float64)).mean() > 0.5


def test_what_mxfp4_holds_stays_as_it_is() -> None:
    """Every code beside every other as the largest of its block, at every scale that is normal."""
    codes = np.tile(np.arange(16), 4).reshape(2, 32)
    codes = np.where(codes & 7 <= np.arange(8)[:, None, None], codes, 0)  # 1 to 7 the largest
    values = np.where(codes >= 8, -1, 1) * MAGNITUDES[codes & 7]
    held = np.ldexp(values.reshape(8, 1, 64), np.arange(-125, 125)[:, None]).astype(np.float32)
    held = held.reshape(-1, 64)
    np.testing.assert_array_equal(bits(run(held)), bits(held))
    once = run(blocks())
    np.testing.assert_array_equal(bits(run(once)), bits(once))
    assert np.isnan(run(np.full((90, 64), np.nan, np.float32))).all()


def test_the_choice_of_a_scale_does_not_hang_on_the_order_of_a_sum() -> None:
    """Blocks whose two scales have errors that are equal but for the last bits of float32."""
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 2, (400, 32)).astype(np.float32)
    low, high = np.full(len(x), 7.0), np.full(len(x), 7.999)
    for _ in range(30):  # as the largest grows from 7 to 8, twice the scale begins to pay
        x[:, 0] = (low + high) / 2
        is_double = np.asarray(run(x))[:, 0] == 8
        low, high = np.where(is_double, low, x[:, 0]), np.where(is_double, x[:, 0], high)
    chosen = []
    for _ in range(8):
        x[:, 1:] = rng.permuted(x[:, 1:], axis=1)
        chosen.append(np.asarray(run(x))[:, 0])
    assert set(np.unique(chosen)) == {6.0, 8.0}
    assert (np.array(chosen) == chosen[0]).all()


def test_the_gradient_goes_straight_through_also_where_values_are_cut() -> None:
    x, d = jnp.asarray(blocks()[:20]), jnp.asarray(blocks()[30:50])
    value, pulled = jax.jit(lambda x, d: (straight_through(x), jax.vjp(straight_through, x)[1](d)))(
        x, d
    )
    np.testing.assert_array_equal(value, np.asarray(run(blocks()))[:20])
    unit = np.abs(np.asarray(x)).reshape(-1, 32)
    largest = unit.max(1) > np.abs(np.asarray(value)).reshape(-1, 32).max(1)
    assert largest.any(), "nothing is cut"
    np.testing.assert_array_equal(pulled[0], d)
    text = str(jax.make_jaxpr(lambda x: jax.vjp(straight_through, x)[1])(x).jaxpr.outvars)
    assert "f32[20,64]" not in text, "kept for the backward pass"


def test_experts_are_quantised_with_their_adapters_folded_in() -> None:
    E, D, F, r = 3, 64, 96, 2
    rng = np.random.default_rng(1)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    gate_up, down = mxfp4.encode(array(2, E, 2, F, D)), array(E, D, F)
    one, two = LowRank(array(E, D, r), array(E, r, 2, F)), LowRank(array(E, F, r), array(E, r, D))
    weights = {"gate_up_weight": LayerOf(gate_up, jnp.int32(1)), "down_weight": down}

    @jax.jit
    def quantised(adapters: Adapters | None) -> dict:
        return moe.quantised({**weights, "adapters": adapters}, jnp.float32)

    sums = [
        np.asarray(mxfp4.decode(gate_up[1])) + np.einsum("EDr,ErCF->ECFD", *one),
        np.asarray(down) + np.einsum("EFr,ErD->EDF", *two),
    ]
    got = quantised(Adapters(one, two))
    assert got["adapters"] is None
    for name, want in zip(("gate_up_weight", "down_weight"), sums, strict=True):
        want = slow_all(want)
        same = np.isclose(got[name], want, rtol=1e-6, atol=0)
        assert same.mean() > 0.9999, name  # sums that round differently may fall to other codes
    got = quantised(None)
    np.testing.assert_array_equal(got["gate_up_weight"].stack.blocks, gate_up.blocks)
    np.testing.assert_array_equal(got["down_weight"], slow_all(np.asarray(down)))

    @jax.jit
    def total(adapters: Adapters) -> jax.Array:
        return sum((jnp.sum(quantised(adapters)[name] * ds[name]) for name in ds), jnp.zeros(()))

    ds = {"gate_up_weight": array(E, 2, F, D), "down_weight": array(E, D, F)}
    grads = jax.grad(total)(Adapters(one, two))
    want = Adapters(
        LowRank(
            np.einsum("ECFD,ErCF->EDr", ds["gate_up_weight"], one.b),
            np.einsum("ECFD,EDr->ErCF", ds["gate_up_weight"], one.a),
        ),
        LowRank(
            np.einsum("EDF,ErD->EFr", ds["down_weight"], two.b),
            np.einsum("EDF,EFr->ErD", ds["down_weight"], two.a),
        ),
    )
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())


def slow_all(x: np.ndarray) -> np.ndarray:
    return np.stack([slow(b) for b in x.reshape(-1, 32).astype(np.float64)]).reshape(x.shape)


def test_an_axis_that_is_no_multiple_of_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 48\) is not a multiple of 32"):
        quantise(jnp.ones((2, 48)))
