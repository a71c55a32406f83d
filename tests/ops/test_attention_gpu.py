"""The Hopper kernels of attention, interpreted: values and all gradients, and no races."""

from __future__ import annotations

import attention_cases as cases
import jax
import jax.numpy as jnp
import pytest
from covering import name, pairwise, part_slow

from gptoss_jax import chips
from gptoss_jax.ops.attention import attention, pallas_gpu

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < chips.MOSAIC_GPU, reason="Mosaic GPU before jax 0.11.2 is another"
)
# The interpreter takes a second for each dozen of tiles, hence few and small.
FAST = pairwise(
    length=[1, 129, 200],
    window=[None, 128, 7],
    heads=[(2, 1), (3, 1), (2, 2)],
    H=[64, 80],
    segments=["one", "packed", "padded"],
    sinks=[True, False],
)
DTYPE = jnp.bfloat16


def check(case, capsys, args):
    want = cases.expected(args, case["window"])
    with chips.assume("h200", interpret=True):
        got = cases.results(args, case["window"], "pallas_gpu")
    cases.assert_close(got, want, dtype=DTYPE)
    assert "RACE DETECTED" not in capsys.readouterr().out


@needs_mosaic
@pytest.mark.parametrize("case", part_slow(FAST, every=2))
def test_a_covering_subset(case, capsys):
    q, k, v, sinks, segments, positions = cases.inputs(case, DTYPE)
    row = slice(1, 2)
    check(case, capsys, (q[row], k[row], v[row], sinks, segments[row], positions[row]))


@needs_mosaic
@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", cases.COVERING, ids=name)
def test_covering_cases(case, capsys):
    check(case, capsys, cases.inputs(case, DTYPE))


@needs_mosaic
@pytest.mark.exhaustive
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_every_case(case, capsys):
    check(case, capsys, cases.inputs(case, DTYPE))


@needs_mosaic
def test_float16(capsys):
    case = {"length": 70, "window": 7, "heads": (2, 1), "H": 64, "segments": "one", "sinks": True}
    args = cases.inputs(case, jnp.float16)
    want = cases.expected(args, case["window"])
    with chips.assume("h200", interpret=True):
        got = cases.results(args, case["window"], "pallas_gpu")
    assert got["q"].dtype == jnp.float16
    cases.assert_close(got, want, dtype=jnp.float16)
    assert "RACE DETECTED" not in capsys.readouterr().out


def pulled(args, window, d_out):
    """Return the output and all gradients under a cotangent, interpreted."""
    segments, positions = args[4:]

    def both(q, k, v, sinks, d_out):
        def op(q, k, v, sinks):
            return attention(
                q, k, v, sinks=sinks, window=window, segment_ids=segments, positions=positions,
                implementation="pallas_gpu",
            )  # fmt: skip

        out, pull = jax.vjp(op, q, k, v, sinks)
        return out, *pull(d_out)

    with chips.assume("h200", interpret=True):
        return jax.jit(both)(*args[:4], d_out)


@needs_mosaic
def test_a_cotangent_in_padding_is_not_read():
    case = {"length": 130, "heads": (2, 1), "H": 64, "segments": "padded", "sinks": True}
    args = [x[:1] if x.ndim > 1 else x for x in cases.inputs(case, DTYPE)]
    here = (args[4] != 0)[:, :, None, None]
    ones = jnp.ones_like(args[0])
    clean, dirty = (pulled(args, None, jnp.where(here, ones, fill)) for fill in (0, jnp.nan))
    for a, b in zip(clean, dirty, strict=True):
        assert bool((a == b).all())


@needs_mosaic
@pytest.mark.parametrize("window", [64, pytest.param(None, marks=pytest.mark.slow)])
def test_blocks_outside_the_band_are_not_read(window):
    """What is read is multiplied, if by zero, so NaN there would show."""
    case = {"length": 384, "heads": (2, 1), "H": 64, "segments": "one", "sinks": True}
    args = [x[:1] if x.ndim > 1 else x for x in cases.inputs(case, DTYPE)]
    index = jnp.arange(384)
    if window is None:  # the same by segments
        args[4] = args[4] + (index >= 128) + (index >= 256)
        args[5] = (index % 128)[None]
    outside = ((index < 64) | (index >= 320))[None, :, None, None]
    dirty = [jnp.where(outside, jnp.nan, x).astype(x.dtype) for x in args[:3]]
    ones = jnp.ones_like(args[0])
    d_out = jnp.where(outside, jnp.nan, ones)
    clean, dirty = pulled(args, window, ones), pulled([*dirty, *args[3:]], window, d_out)
    for a, b in zip(clean[:4], dirty[:4], strict=True):
        assert bool((a == b)[:, 128:256].all())


def arguments(length=64, N=4, K=2, H=64, dtype=DTYPE):
    q, k = (jax.ShapeDtypeStruct((1, length, n, H), dtype) for n in (N, K))
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    return (q, k, k, None), {"window": None, "segment_ids": ids, "positions": ids}


@pytest.mark.parametrize(
    ("chip", "changes", "reason"),
    [
        ("b200", {}, "Hopper"),
        ("cpu", {}, "Hopper"),
        pytest.param("h200", {"dtype": jnp.float32}, "float32", marks=needs_mosaic),
        pytest.param("h200", {"H": 192}, "192", marks=needs_mosaic),
    ],
)
def test_refuses_with_a_reason(chip, changes, reason):
    args, where = arguments(**changes)
    with chips.assume(chip):
        assert reason in str(pallas_gpu.refuse(*args, **where))


@needs_mosaic
@pytest.mark.parametrize("chip", chips.HOPPER)
def test_accepts_the_models_shapes(chip):
    args, where = arguments(length=4096, N=64, K=8)
    with chips.assume(chip):
        assert pallas_gpu.refuse(*args, **where) is None
