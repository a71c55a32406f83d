"""Layouts of packed weights: nothing is lost, and what they decode to has the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.mxfp4 import layouts
from gptoss_jax.types import MXFP4

LAYOUTS = ["planes", "columns", "int8", "fp4", "hopper"]


def every_code_and_scale(columns: int = 96) -> MXFP4:
    """Return [256, columns]: bytes 2 to 252 as scales, each with every code in both nibbles."""
    codes = np.stack([np.arange(32) % 16, (np.arange(32) * 7 + 3) % 16], axis=1).reshape(2, 2, 16)
    codes = np.resize(codes, (columns // 32, 2, 16)).swapaxes(1, 2)
    blocks = np.broadcast_to(codes[..., 0] | codes[..., 1] << 4, (256, columns // 32, 16))
    scales = (np.arange(256)[:, None] + 85 * np.arange(columns // 32)) % 251 + 2
    assert set(scales[:, 0]) == set(range(2, 253))
    return MXFP4(jnp.asarray(blocks, jnp.uint8), jnp.asarray(scales, jnp.uint8))


def need(layout: str) -> None:
    if layout == "hopper":
        pytest.importorskip("gptoss_jax.ops.mxfp4.hopper")


def bits(x: jax.Array) -> np.ndarray:
    return np.asarray(x).view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


def assert_same(got, want) -> None:
    assert got.blocks.dtype == got.scales.dtype == np.uint8
    np.testing.assert_array_equal(got.blocks, want.blocks)
    np.testing.assert_array_equal(got.scales, want.scales)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_and_scale_survives_and_decodes_to_the_same_bits(layout: str) -> None:
    need(layout)
    columns = 128 if layout == "hopper" else 96
    packed = every_code_and_scale(columns)
    relaid = jax.jit(lambda p: mxfp4.relayout(p, layout))(packed)
    assert relaid.shape == packed.shape and relaid.layout == layout
    assert_same(jax.jit(mxfp4.restore)(relaid), packed)
    for dtype in (jnp.float32, jnp.bfloat16):
        got = jax.jit(lambda r, dtype=dtype: mxfp4.decode(r, dtype))(relaid)
        want = mxfp4.decode(packed, dtype, implementation="reference")
        assert got.dtype == dtype
        number = np.asarray(want) != 0  # a zero may lose its sign in "int8" alone
        same = np.ones_like(number) if layout != "int8" else number
        np.testing.assert_array_equal(bits(got)[same], bits(want)[same])
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    again = mxfp4.decode(relaid, implementation="reference")
    np.testing.assert_array_equal(bits(again), bits(mxfp4.decode(packed)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stack_with_two_row_axes_on_device_and_on_host(layout: str) -> None:
    need(layout)
    rng = np.random.default_rng(3)
    blocks = rng.integers(0, 256, (3, 2, 2, 64, 4, 16), np.uint8)
    scales = rng.integers(2, 241, (3, 2, 2, 64, 4), np.uint8)
    restore, decode = jax.jit(mxfp4.restore), jax.jit(mxfp4.decode)
    packed = MXFP4(jnp.asarray(blocks), jnp.asarray(scales))
    device = jax.jit(lambda p: mxfp4.relayout(p, layout, row_axes=2))(packed)
    assert device.shape == (3, 2, 2, 64, 128) and device.lead == (3, 2)
    assert device[1].shape == (2, 2, 64, 128)
    assert_same(restore(device), MXFP4(blocks, scales))
    assert_same(restore(device[1, 0]), MXFP4(blocks[1, 0], scales[1, 0]))
    host = mxfp4.relayout(MXFP4(blocks, scales), layout, row_axes=2)
    assert isinstance(host.codes, np.ndarray) and isinstance(host.scales, np.ndarray)
    np.testing.assert_array_equal(bytes_of(host.codes), bytes_of(device.codes))
    np.testing.assert_array_equal(host.scales, device.scales)
    back = mxfp4.restore(host)
    assert isinstance(back.blocks, np.ndarray)
    assert_same(back, MXFP4(blocks, scales))
    one = mxfp4.relayout(MXFP4(blocks[0, 0, 0], scales[0, 0, 0]), layout)
    assert isinstance(one.codes, np.ndarray)
    want = decode(MXFP4(blocks, scales))
    np.testing.assert_array_equal(decode(device), want)


def bytes_of(x) -> np.ndarray:
    """Return an array's bits as integers: numpy does not compare 4-bit floats."""
    x = np.asarray(x)
    return x if x.dtype.itemsize > 1 else x.view(np.uint8)


def test_orders_are_those_that_the_table_says() -> None:
    packed = every_code_and_scale(96)[:5]
    values, scales = np.asarray(mxfp4.decode(packed)), np.asarray(packed.scales)
    nibbles = np.stack([packed.blocks & 15, np.asarray(packed.blocks) >> 4], -1).reshape(5, 96)
    planes = mxfp4.relayout(packed, "planes")
    np.testing.assert_array_equal(planes.codes, nibbles[:, :48] | nibbles[:, 48:] << 4)
    np.testing.assert_array_equal(planes.scales, scales)
    columns = mxfp4.relayout(packed, "columns")
    assert columns.codes.shape == (64, 128) and columns.scales.shape == (32, 128)
    want = np.concatenate([nibbles[:, :32] | nibbles[:, 32:64] << 4, nibbles[:, 64:]], axis=1)
    np.testing.assert_array_equal(columns.codes[:, :5], want.T)
    assert not columns.codes[:, 5:].any()
    np.testing.assert_array_equal(columns.scales[:3, :5], scales.T)
    padding = np.asarray(columns.scales).copy()
    padding[:3, :5] = layouts.ONE
    assert (padding == layouts.ONE).all()
    int8 = mxfp4.relayout(packed, "int8")
    assert int8.codes.dtype == np.int8 and int8.codes.shape == (96, 128)
    assert not int8.codes[:, 5:].any()
    twice = np.asarray(int8.codes[:, :5]).T.astype(float)
    twice[twice == -128] = -0.0
    want = 2 * values / np.repeat(np.exp2(scales.astype(float) - 127), 32, axis=1)
    np.testing.assert_array_equal(twice, want)
    np.testing.assert_array_equal(np.signbit(twice), np.signbit(want))
    fp4 = mxfp4.relayout(packed, "fp4")
    assert fp4.codes.dtype == jnp.float4_e2m1fn and fp4.codes.shape == (96, 128)
    np.testing.assert_array_equal(fp4.codes[:, :5].astype(jnp.float32).T, want / 2)


def test_inexact_scales_are_refused_unless_their_block_is_zeros() -> None:
    packed = every_code_and_scale(96)
    for byte in (0, 1, 253, 254, 255):
        wrong = packed.replace(scales=packed.scales.at[7, 2].set(byte))
        with pytest.raises(UserError, match=rf"byte {byte} in .*\(256, 96\).*2 to 252"):
            mxfp4.relayout(wrong, "columns")
        if byte < 255:
            zeros = wrong.replace(blocks=wrong.blocks.at[7, 2].set(0x80))
            relaid = mxfp4.relayout(zeros, "columns")
            assert_same(mxfp4.restore(relaid), zeros)
            np.testing.assert_array_equal(mxfp4.decode(relaid)[7, 64:], np.zeros(32))


def test_what_is_no_layout_or_matrix_is_refused() -> None:
    packed = every_code_and_scale(96)
    with pytest.raises(ValueError, match="layout='rows': use one of 'planes'"):
        mxfp4.relayout(packed, "rows")
    with pytest.raises(ValueError, match="row_axes=2"):
        mxfp4.relayout(packed, "columns", row_axes=2)
