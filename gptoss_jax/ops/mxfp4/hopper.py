"""The "hopper" layout of packed weights, for Hopper's kernels: two planes per 64 columns.

`codes` is uint8 [..., N, C'/2], with C' = C padded with zeros to a multiple of 64. A row of W is a
row of bytes, and a group of 32 bytes holds 64 columns. Byte j of a group has column j in its low
nibble and column j + 32 in its high nibble. So the low nibbles of a group are one block of the
checkpoint and the high nibbles are the next block, both in order. A [rows, 32] tile of bytes
decodes to two [rows, 32] tiles without moving values between lanes, and each tile has one scale per
row. Nibbles are those of the checkpoint, -0 included.

`scales` is uint8 [..., C'/32, N'], with N' = N padded to a multiple of 16. It is the transpose of
the checkpoint's array, so that the scales of a block of columns are contiguous over rows. Padding
is 127.

TMA needs strides that are multiples of 16 bytes, and every row of both arrays is: codes have C'/2
bytes, scales N'. A kernel that reads codes by words finds columns j to j + 3 and j + 32 to j + 35
in bytes j to j + 3.

Instructions per weight, for decoding to pairs of bf16 in PTX:

- From two bytes (4 weights: columns j and j + 1 of both planes), one `prmt` puts the bytes in the
  halves of a word. Then for each plane two shifts and two `lop3` put the sign at bit 15 and the
  other three bits at bits 8 to 6, which gives the value times 2**-126, subnormals included. Two
  `mul.bf16x2` multiply by 2**126 and by the scale. Both are exact (bf16 products keep subnormals on
  a GPU). The count is (1 + 2 * (4 + 2)) / 4 = 3.25.
- From a whole word (8 weights: pairs two columns apart, nibbles at bits i and i + 16) no `prmt` is
  needed, and the sign of one pair needs no shift. The count is (15 + 8) / 8 = 2.9.

The budget at the full bandwidth of an H200 is 4.1.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, UInt8

from gptoss_jax.ops.mxfp4.xla import decode_nibbles, decode_scales
from gptoss_jax.types import MXFP4_BLOCK

GROUP = 2 * MXFP4_BLOCK  # columns in one group of bytes
ALIGN = 16  # the length of a row in bytes is a multiple of this
ONE = 127  # the scale byte of 2**0, in padding


def pack(
    blocks: UInt8[Array, "... N C/32 16"], scales: UInt8[Array, "... N C/32"]
) -> tuple[UInt8[Array, "... N c"], UInt8[Array, "... b n"]]:
    """Return (codes, scales) in this layout; lossless, and `unpack` undoes it."""
    *lead, rows, count = scales.shape
    blocks = _pad(jnp.asarray(blocks), -2, 2, 0)
    nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*lead, rows, -1, 2, 32)
    codes = nibbles[..., 0, :] | (nibbles[..., 1, :] << 4)
    scales = _pad(_pad(jnp.asarray(scales), -1, 2, ONE), -2, ALIGN, ONE)
    return codes.reshape(*lead, rows, (count + 1) // 2 * 32), scales.swapaxes(-1, -2)


def unpack(
    codes: UInt8[Array, "... N c"], scales: UInt8[Array, "... b n"], columns: int
) -> tuple[UInt8[Array, "... N C/32 16"], UInt8[Array, "... N C/32"]]:
    """Return (blocks, scales) in the checkpoint's layout, for a weight with C = `columns`."""
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
    """Return the decoded array, as `mxfp4.decode` does."""
    *lead, rows, width = codes.shape
    groups = codes.reshape(*lead, rows, width // MXFP4_BLOCK, 1, MXFP4_BLOCK)
    nibbles = jnp.concatenate([groups & 15, groups >> 4], axis=-2)
    factors = decode_scales(scales.swapaxes(-1, -2)[..., :rows, :])
    values = decode_nibbles(nibbles) * factors.reshape(*nibbles.shape[:-1], 1)
    return values.reshape(*lead, rows, -1)[..., :columns].astype(dtype)


def _pad(x: Array, axis: int, multiple: int, value: int) -> Array:
    """Pad the axis to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, -x.shape[axis] % multiple)
    return jnp.pad(x, widths, constant_values=value)
