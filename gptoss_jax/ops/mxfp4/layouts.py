"""Layouts of packed weights for kernels; each is lossless, and `restore` undoes it.

A weight [*lead, *rows, C] becomes two arrays `codes` and `scales`. Each is [*lead, matrix] with a
matrix as follows, where N = prod(rows):

| layout | codes | scales |
|---|---|---|
| "planes" | uint8 [N, C/2]: byte j holds elements j (low nibble) and j + C/2 (high) | [N, C/32] |
| "columns" | uint8 [C'/2, N']: 32 rows are two blocks of C, low and high nibbles | [C''/32, N'] |
| "int8" | int8 [C, N']: twice the value, and -128 for minus zero | [C''/32, N'] |
| "fp4" | float4_e2m1fn [C, N'] | [C''/32, N'] |
| "hopper" | see `hopper.pack` | |

"columns", "int8" and "fp4" are for TPUs, whose tiles have 32 rows of bytes and 128 columns. They
are padded to whole tiles with zeros of scale 1, so that no compiler copies them: C' is a multiple
of 64, C''/32 is a multiple of 32, and N' is a multiple of 128. If N' were not padded, XLA would by
default store 128 experts as the columns of an array, since only that order needs no padding, and
every call of a kernel would transpose the whole stack. The padding costs no memory: a matrix takes
whole tiles in any case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, UInt8

from gptoss_jax.errors import UserError
from gptoss_jax.ops.mxfp4 import xla
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, Relaid

LAYOUTS = ("planes", "columns", "int8", "fp4", "hopper")
SCALE_ROWS, WIDTH = 32, 128  # a TPU's tile of bytes
EXACT = (2, 252)  # range of scale bytes for which all codes are normal and finite in float32
ONE = 127  # the scale byte of 2**0
TWICE = (0, 1, 2, 3, 4, 6, 8, 12)  # magnitudes of e2m1, doubled
MINUS_ZERO = -128  # in "int8"
E2M1 = jnp.float4_e2m1fn


def relayout(packed: MXFP4, layout: str, *, row_axes: int = 1) -> Relaid:
    """Return `packed` in `layout`; the `row_axes` axes before the last one become the matrix's N.

    A weight with two or more axes before its matrix is relaid in slices of the first axis, so that
    a stack of layers needs no more temporary memory than one layer does. Numpy arrays give numpy
    arrays.

    Raises:
        UserError: A block has a scale byte outside `EXACT`, and the byte is 255 or a value of the
            block is not 0. The bytes of a traced array can't be checked.
        ValueError: `layout` is not known, or `row_axes` doesn't fit the shape.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout={layout!r}: use one of {', '.join(map(repr, LAYOUTS))}")
    if packed.ndim < row_axes + 1 or row_axes < 1:
        raise ValueError(f"row_axes={row_axes} of a weight of shape {packed.shape}")
    _refuse_inexact(packed)
    lead, rows = packed.shape[: -1 - row_axes], packed.shape[-1 - row_axes : -1]
    wide = (*lead, int(np.prod(rows)), packed.scales.shape[-1])
    blocks, scales = packed.blocks.reshape(*wide, -1), packed.scales.reshape(wide)
    codes, scales = _by_slice(_packer(layout), blocks, scales, lead=len(lead))
    return Relaid(codes, scales, layout, rows, packed.shape[-1])


def restore(relaid: Relaid) -> MXFP4:
    """Return the weight in the checkpoint's layout, as it was before `relayout`."""
    columns, layout = relaid.columns, relaid.layout
    width = int(np.prod(relaid.rows))

    def unpack(codes: Array, scales: Array) -> tuple[Array, Array]:
        if layout == "hopper":
            from gptoss_jax.ops.mxfp4 import hopper

            return hopper.unpack(codes, scales, columns)
        nibbles = _nibbles(codes, layout, width, columns)
        blocks = nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)
        blocks = blocks.reshape(*blocks.shape[:-1], -1, MXFP4_BLOCK // 2)
        return blocks, _scales(scales, layout, width, columns)

    lead = relaid.lead
    blocks, scales = _by_slice(unpack, relaid.codes, relaid.scales, lead=len(lead))
    wide = (*lead, *relaid.rows, columns // MXFP4_BLOCK)
    return MXFP4(blocks.reshape(*wide, -1), scales.reshape(wide))


def decode(relaid: Relaid, dtype: jnp.dtype) -> Float[Array, "*lead *rows C"]:
    """Return the decoded array, as `ops.mxfp4.decode` does."""
    codes, scales, columns = jnp.asarray(relaid.codes), jnp.asarray(relaid.scales), relaid.columns
    if relaid.layout == "hopper":
        from gptoss_jax.ops.mxfp4 import hopper

        return hopper.decode(codes, scales, columns, dtype).reshape(relaid.shape)
    width = int(np.prod(relaid.rows))
    values = xla.decode_nibbles(_nibbles(codes, relaid.layout, width, columns))
    factors = xla.decode_scales(_scales(scales, relaid.layout, width, columns))[..., None]
    values = values.reshape(*factors.shape[:-1], MXFP4_BLOCK) * factors
    return values.astype(dtype).reshape(relaid.shape)


def _packer(layout: str) -> Callable[[Array, Array], tuple[Array, Array]]:
    """Return a function (blocks [..., N, C/32, 16], scales [..., N, C/32]) -> codes, scales."""
    if layout == "hopper":
        from gptoss_jax.ops.mxfp4 import hopper

        return hopper.pack
    return {"planes": _planes, "columns": _columns, "int8": _int8, "fp4": _fp4}[layout]


def _planes(blocks: Array, scales: Array) -> tuple[Array, Array]:
    nibbles = _unpack(blocks)
    half = nibbles.shape[-1] // 2
    return nibbles[..., :half] | (nibbles[..., half:] << 4), scales


def _columns(blocks: Array, scales: Array) -> tuple[Array, Array]:
    by_rows = _rows_last(blocks)
    odd_number = [(0, 0)] * (by_rows.ndim - 3) + [(0, by_rows.shape[-3] % 2), (0, 0), (0, 0)]
    by_rows = jnp.pad(by_rows, odd_number)
    pairs = by_rows.reshape(*by_rows.shape[:-3], -1, 2, *by_rows.shape[-2:])
    first, second = pairs[..., 0, :, :], pairs[..., 1, :, :]
    even = (first & 15) | (second << 4)
    odd = (first >> 4) | (second & 0xF0)
    return _interleaved(even, odd), _scale_rows(scales)


def _int8(blocks: Array, scales: Array) -> tuple[Array, Array]:
    code = _unpack_rows_last(blocks).astype(jnp.int8)
    m = code & 7
    # 0 to 3 stay; above them (2 or 3) << 1 and (2 or 3) << 2. A table of 16 is slow on a TPU.
    twice = jnp.where(m < 4, m, (2 + (m & 1)) << jnp.maximum((m >> 1) - 1, 0))
    signed = jnp.where(code > 8, -twice, twice)
    return jnp.where(code == 8, jnp.int8(MINUS_ZERO), signed), _scale_rows(scales)


def _fp4(blocks: Array, scales: Array) -> tuple[Array, Array]:
    nibbles = _unpack_rows_last(blocks)
    codes = lax.bitcast_convert_type(lax.convert_element_type(nibbles, jnp.uint4), E2M1)
    return codes, _scale_rows(scales)


def _rows_last(blocks: UInt8[Array, "*n N B 16"]) -> UInt8[Array, "*n B 16 W"]:
    """Move rows last before unpacking: a TPU can't interleave nibbles along lanes in its memory."""
    return _pad(jnp.moveaxis(blocks, -3, -1), WIDTH, 0)


def _interleaved(even: Array, odd: Array) -> Array:
    both = jnp.stack([even, odd], axis=-2)  # [*n, B, 16, 2, W]
    return both.reshape(*both.shape[:-4], -1, both.shape[-1])


def _unpack_rows_last(blocks: UInt8[Array, "*n N B 16"]) -> UInt8[Array, "*n C W"]:
    by_rows = _rows_last(blocks)
    return _interleaved(by_rows & 15, by_rows >> 4)


def _unpack(blocks: UInt8[Array, "*n B 16"]) -> UInt8[Array, "*n C"]:
    nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1)
    return nibbles.reshape(*blocks.shape[:-2], -1)


def _scale_rows(scales: UInt8[Array, "*n N B"]) -> UInt8[Array, "*n R W"]:
    return _pad(_pad(scales, SCALE_ROWS, ONE).swapaxes(-1, -2), WIDTH, ONE)


def _pad(x: Array, multiple: int, value: int) -> Array:
    widths = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % multiple)]
    return jnp.pad(x, widths, constant_values=value)


def _nibbles(codes: Array, layout: str, width: int, columns: int) -> UInt8[Array, "*lead N C"]:
    """Return the e2m1 codes in the array's own order."""
    if layout == "planes":
        return jnp.concatenate([codes & 15, codes >> 4], axis=-1)
    codes = codes[..., :width].swapaxes(-1, -2)
    if layout == "columns":
        bytes_ = codes.reshape(*codes.shape[:-1], -1, 1, MXFP4_BLOCK)
        pairs = jnp.concatenate([bytes_ & 15, bytes_ >> 4], axis=-2)
        return pairs.reshape(*codes.shape[:-1], -1)[..., :columns]
    if layout == "fp4":  # not from its bits: XLA:CPU of jax 0.12 can't convert them to integers
        values = codes.astype(jnp.float32)
        twice, negative = jnp.abs(2 * values).astype(jnp.int32), jnp.signbit(values)
    else:
        twice = jnp.where(codes == MINUS_ZERO, 0, jnp.abs(codes.astype(jnp.int32)))
        negative = codes < 0
    magnitude = jnp.searchsorted(jnp.array(TWICE), twice)
    return (magnitude + jnp.where(negative, 8, 0)).astype(jnp.uint8)


def _scales(scales: Array, layout: str, width: int, columns: int) -> UInt8[Array, "*lead N B"]:
    if layout == "planes":
        return scales
    return scales[..., : columns // MXFP4_BLOCK, :width].swapaxes(-1, -2)


def _by_slice(function: Callable[..., Any], *arrays: Any, lead: int) -> Any:
    """Apply a function of matrices to arrays with `lead` leading axes, slice by slice."""
    if isinstance(arrays[0], np.ndarray) and lead:
        run = jax.jit(function)
        outs: list[np.ndarray] = []
        for index in np.ndindex(arrays[0].shape[:lead]):
            parts = [np.asarray(a) for a in run(*(a[index] for a in arrays))]
            if not outs:
                outs = [np.empty((*arrays[0].shape[:lead], *p.shape), p.dtype) for p in parts]
            for out, part in zip(outs, parts, strict=True):
                out[index] = part
        return tuple(outs)
    if isinstance(arrays[0], np.ndarray):
        return tuple(np.asarray(a) for a in jax.jit(function)(*arrays))
    if lead < 2:
        return function(*arrays)
    return lax.map(lambda slices: function(*slices), arrays)


def _refuse_inexact(packed: MXFP4) -> None:
    if isinstance(packed.scales, Tracer) or not packed.scales.size:
        return
    with jax.ensure_compile_time_eval():  # the bytes are concrete, even during a trace
        scales = packed.scales
        outside = (scales < EXACT[0]) | (scales > EXACT[1])
        if not bool(outside.any()):
            return
        # A block of zeros decodes to zeros under any scale but 255; code 8 is -0.
        outside &= ((packed.blocks & 0x77) != 0).any(axis=-1) | (scales == 255)
        if not bool(outside.any()):
            return
        byte = int(scales.ravel()[outside.ravel().argmax()])
    raise UserError(
        f"scale byte {byte} in an MXFP4 weight of shape {packed.shape}: kernels decode exactly "
        f"with bytes {EXACT[0]} to {EXACT[1]} only; model.experts=dense takes such a weight"
    )
