"""The order of packed weights that Hopper's kernels read: planes within each 64 columns.

`codes` uint8 [..., N, C'/2], C' = C padded with zeros to a multiple of 64: a row of W is a row of
bytes, and 32 bytes hold 64 columns. Byte j of such a group has column j in its low nibble and
column j + 32 in its high one. So the low nibbles of a group are one block of the checkpoint and the
high nibbles the next, both in order: a [rows, 32] tile of bytes decodes to two [rows, 32] tiles, no
value moves between lanes, and each has one scale a row. Nibbles are the checkpoint's, -0 included.

`scales` uint8 [..., C'/32, N'], N' = N padded to a multiple of 16: the transpose of the
checkpoint's, so that the scales of a block of columns are contiguous over rows. Padding is 127.

Every row of both arrays is a multiple of 16 bytes long, which TMA asks of strides: codes C'/2,
scales N'. A kernel that reads codes by words finds in bytes j to j + 3 the columns j to j + 3 and
j + 32 to j + 35.

Instructions a weight, decoding to pairs of bf16 by PTX from two bytes (4 weights, columns j and
j + 1 of both planes): one `prmt` puts the bytes in the halves of a word, then for either plane two
shifts and two `lop3` put the sign at bit 15 and the other three bits at 8 to 6, which is the value
times 2**-126, subnormals included; two `mul.bf16x2`, by 2**126 and by the scale, both exact (bf16
products keep subnormals on a GPU). (1 + 2 * (4 + 2)) / 4 = 3.25. From a whole word (8 weights,
pairs two columns apart: nibbles at bits i and i + 16) no `prmt` is needed, and one pair's sign
needs no shift: (15 + 8) / 8 = 2.9. The budget at an H200's full bandwidth is 4.1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from gptoss_jax.ops.mxfp4.xla import decode_nibbles, decode_scales
from gptoss_jax.types import MXFP4_BLOCK

GROUP = 2 * MXFP4_BLOCK  # columns in one group of bytes
ALIGN = 16  # bytes: what a row's length is a multiple of
ONE = 127  # the scale byte of 2**0, in padding


def pack(
    blocks: UInt8[Array, "... N C/32 16"], scales: UInt8[Array, "... N C/32"]
) -> tuple[UInt8[Array, "... N c"], UInt8[Array, "... b n"]]:
    """Return (codes, scales) in this order; lossless, undone by `unpack`."""
    *lead, rows, count = scales.shape
    blocks = _pad(jnp.asarray(blocks), -2, 2, 0)
    nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*lead, rows, -1, 2, 32)
    codes = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    scales = _pad(_pad(jnp.asarray(scales), -1, 2, ONE), -2, ALIGN, ONE)
    return codes.reshape(*lead, rows, (count + 1) // 2 * 32), scales.swapaxes(-1, -2)


def unpack(
    codes: UInt8[Array, "... N c"], scales: UInt8[Array, "... b n"], columns: int
) -> tuple[UInt8[Array, "... N C/32 16"], UInt8[Array, "... N C/32"]]:
    """Return (blocks, scales) as the checkpoint has them, of a weight with C = `columns`."""
    *lead, rows, width = codes.shape
    groups = codes.reshape(*lead, rows, width // MXFP4_BLOCK, 1, MXFP4_BLOCK)
    nibbles = jnp.concatenate([groups & 15, groups >> 4], axis=-2)
    pairs = nibbles.reshape(*lead, rows, -1, MXFP4_BLOCK // 2, 2)
    blocks = pairs[..., 0] | (pairs[..., 1] << 4)
    count = columns // MXFP4_BLOCK
    return blocks[..., :count, :], scales.swapaxes(-1, -2)[..., :rows, :count]


def decode(
    codes: UInt8[Array, "... N c"],
    scales: UInt8[Array, "... b n"],
    columns: int,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "... N C"]:
    """Return the array that they stand for, as `mxfp4.decode` does."""
    *lead, rows, width = codes.shape
    groups = codes.reshape(*lead, rows, width // MXFP4_BLOCK, 1, MXFP4_BLOCK)
    nibbles = jnp.concatenate([groups & 15, groups >> 4], axis=-2)
    factors = decode_scales(scales.swapaxes(-1, -2)[..., :rows, :])
    values = decode_nibbles(nibbles) * factors.reshape(*nibbles.shape[:-1], 1)
    return values.reshape(*lead, rows, -1)[..., :columns].astype(dtype)


def _pad(x: Array, axis: int, multiple: int, value: int) -> Array:
    """Fill the axis up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
