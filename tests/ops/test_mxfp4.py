"""MXFP4 against integer arithmetic in numpy, over every code and every scale byte."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.mxfp4.xla import decode_halves, from_halves, to_halves
from gptoss_jax.types import MXFP4

TWICE = np.array([0, 1, 2, 3, 4, 6, 8, 12])  # the magnitudes, doubled: integers


def every_code_and_scale() -> MXFP4:
    """Return [256, 64]: row s has scale bytes s and 255 - s, and every code in both nibbles."""
    low = np.arange(32) % 16
    codes = np.stack([low, (low * 7 + 3) % 16], axis=1).reshape(2, 32) % 16
    assert set(codes[0]) == set(codes[1]) == set(range(16))
    blocks = np.broadcast_to((codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8), (256, 2, 16))
    scales = np.stack([np.arange(256), 255 - np.arange(256)], axis=1).astype(np.uint8)
    return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))


def slow_decode(packed: MXFP4) -> np.ndarray:
    """Decode in float64 by integers: exact at every scale."""
    blocks, scales = np.asarray(packed.blocks), np.asarray(packed.scales).astype(int)
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*scales.shape, 32)
    values = np.where(codes >= 8, -1.0, 1.0) * TWICE[codes & 7]
    return np.ldexp(values, scales[..., None] - 128).reshape(packed.shape)


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_decode_is_bit_exact_for_every_code_and_scale(implementation: str, dtype: type) -> None:
    packed = every_code_and_scale()
    got = jax.jit(lambda p: mxfp4.decode(p, dtype, implementation=implementation))(packed)
    assert got.dtype == dtype
    with np.errstate(over="ignore"):
        want = slow_decode(packed).astype(np.float32).astype(dtype)
    sound = np.repeat((np.asarray(packed.scales) >= 2) & (np.asarray(packed.scales) <= 254), 32, 1)
    np.testing.assert_array_equal(bits(got)[sound], bits(jnp.asarray(want))[sound])
    lowest = np.repeat(np.asarray(packed.scales) < 2, 32, 1)
    tiny = np.asarray(got)[lowest].astype(np.float64)
    assert ((tiny == 0) | (np.abs(tiny) == np.abs(slow_decode(packed)[lowest]))).all()
    top = np.asarray(got)[np.repeat(np.asarray(packed.scales) == 255, 32, 1)].astype(np.float64)
    assert not np.isfinite(top).any() and np.isnan(top).sum() == 2 * top.size // 16


def test_halves_are_a_reordering_of_the_decoded_array() -> None:
    packed = every_code_and_scale()[2:254]
    whole = mxfp4.decode(packed)
    halves = decode_halves(packed, jnp.dtype(jnp.float32))
    np.testing.assert_array_equal(to_halves(whole), halves)
    np.testing.assert_array_equal(from_halves(halves), whole)
    np.testing.assert_array_equal(halves[:, :32], whole[:, ::2])


def test_decode_reads_the_low_nibble_first() -> None:
    blocks = jnp.zeros((1, 16), jnp.uint8).at[0, 0].set(0x72)
    got = mxfp4.decode(MXFP4(blocks, jnp.array([128], jnp.uint8)))
    np.testing.assert_array_equal(got[:3], [2.0, 12.0, 0.0])


def slow_encode(block: np.ndarray, *, search: bool) -> tuple[np.ndarray, int]:
    """Encode one block in float64: (values, scale byte)."""
    magnitudes = TWICE / 2
    amax = np.abs(block).max()
    base = 1 if amax == 0 else max(int(np.floor(np.log2(amax))) - 2 + 127, 1)
    best = (np.inf, None, 0)
    for scale in (base, base + 1, base - 1) if search else (base,):
        scale = min(max(scale, 1), 252)  # 8 * 2**125 is beyond float32
        unit = np.ldexp(np.abs(block), 127 - scale)
        distance = np.abs(np.minimum(unit, 6)[:, None] - magnitudes)
        near = distance == distance.min(1, keepdims=True)
        code = np.where(near & (np.arange(8) % 2 == 0), 2, near).argmax(1)  # ties to even
        values = np.ldexp(np.copysign(magnitudes[code], block), scale - 127)
        error = np.sum(np.ldexp(values - block, 127 - base) ** 2)
        if error < best[0]:
            best = (error, values, scale)
    return best[1], best[2]


def samples() -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.normal(size=(200, 32)) * np.exp2(rng.integers(-60, 60, (200, 1)))
    x[:40] = np.round(x[:40] / np.exp2(np.floor(np.log2(np.abs(x[:40]).max(1)))[:, None]) * 8) / 8
    x[40:60, 3] *= 30  # an outlier decides its block's scale
    x[60] = 0
    x[61], x[62] = np.float32(3e38), np.ldexp(1.0, -126)
    x[63] = np.resize([6.0, -6.0, 3.0], 32)
    x[64] = np.resize(np.nextafter(np.float32([6, 8, 4]), np.float32([9, 0, 0])), 32)
    x[65] = np.resize([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 4, -0.25, -5], 32)
    return x.astype(np.float32)


@pytest.mark.parametrize("rule", ["ocp", "least_error"])
def test_encode_equals_a_slow_search(rule: str) -> None:
    x = samples()
    packed = mxfp4.encode(jnp.asarray(x), rule)
    got = slow_decode(packed)
    for row in range(len(x)):
        want, scale = slow_encode(x[row].astype(np.float64), search=rule == "least_error")
        error, least = np.sum((got[row] - x[row]) ** 2), np.sum((want - x[row]) ** 2)
        if rule == "ocp":
            np.testing.assert_array_equal(got[row], want, err_msg=f"row {row}")
            assert int(packed.scales[row, 0]) == scale, row
        else:  # scales of equal error to rounding may be chosen differently
            assert error <= least * (1 + 1e-5), row


def test_least_error_beats_ocp_somewhere_and_loses_nowhere() -> None:
    x = samples()
    errors = [
        np.sum((slow_decode(mxfp4.encode(x, rule)) - x.astype(np.float64)) ** 2, axis=1)
        for rule in ("ocp", "least_error")
    ]
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert (errors[1] < errors[0] * 0.9).sum() > 10


@pytest.mark.parametrize("rule", ["ocp", "least_error"])
def test_encoding_what_was_decoded_changes_no_value(rule: str) -> None:
    packed = every_code_and_scale()[3:253]
    values = mxfp4.decode(packed)
    again = mxfp4.decode(mxfp4.encode(values, rule))
    np.testing.assert_array_equal(bits(again), bits(values))


def test_finite_input_never_gives_nan_and_zeros_stay_zero() -> None:
    x = samples()
    x[0, :] = np.finfo(np.float32).max
    x[1, :] = np.finfo(np.float32).tiny
    for rule in ("ocp", "least_error"):
        got = np.asarray(mxfp4.decode(mxfp4.encode(jnp.asarray(x), rule)))
        assert np.isfinite(got).all()
        assert (got[60] == 0).all()


def test_numpy_is_encoded_in_slices_to_the_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gptoss_jax.ops.mxfp4.xla.SLICE_VALUES", 64 * 32)
    x = samples().reshape(5, 20, 64)
    host, device = mxfp4.encode(x), mxfp4.encode(jnp.asarray(x))
    assert isinstance(host.blocks, np.ndarray) and host.shape == (5, 20, 64)
    np.testing.assert_array_equal(host.blocks, device.blocks)
    np.testing.assert_array_equal(host.scales, device.scales)


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        mxfp4.encode(jnp.ones((2, 33)))
    with pytest.raises(ValueError, match="scale_rule='best'"):
        mxfp4.encode(jnp.ones((2, 32)), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="implementation='fast'"):
        mxfp4.decode(every_code_and_scale(), implementation="fast")
