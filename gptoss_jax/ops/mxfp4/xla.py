"""MXFP4 encoder, and a decoder by arithmetic on bits, which vectorises better than a table."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt8

from gptoss_jax.types import MXFP4, MXFP4_BLOCK

HALF = 0x3F000000  # the bits of 0.5 in float32
SLICE_VALUES = 1 << 24  # values of a host array that are encoded at a time
TOP = 252  # the largest scale byte that the encoder chooses
GAIN_ONE = 1 << 22  # fixed-point 1 for comparing errors: a block's sum, at most 32 * 4, fits int32


def decode_nibbles(nibbles: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Return the e2m1 values of codes 0 to 15, in float32.

    The three low bits become the last two bits of the exponent and the first bit of the mantissa.
    Codes 0 and 1 are an exception: they are subnormal in e2m1, and XLA would flush a float32
    subnormal to zero.
    """
    code = nibbles.astype(jnp.uint32)
    magnitude = code & 7
    normal = (magnitude << 22) + np.uint32(126 << 23)
    bits = jnp.where(magnitude < 2, magnitude * np.uint32(HALF), normal)
    return lax.bitcast_convert_type(bits | ((code & 8) << 28), jnp.float32)


def decode_scales(scales: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
    """Return 2**(scale - 127) in float32, built from its bits; 0 gives zero and 255 infinity."""
    return lax.bitcast_convert_type(scales.astype(jnp.uint32) << 23, jnp.float32)


def decode(packed: MXFP4, dtype: jnp.dtype) -> Float[Array, "... C"]:
    """Decode to the array's own order."""
    blocks, scales = jnp.asarray(packed.blocks), jnp.asarray(packed.scales)
    nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1)
    values = decode_nibbles(nibbles) * decode_scales(scales)[..., None, None]
    return values.reshape(packed.shape).astype(dtype)


def decode_halves(packed: MXFP4, dtype: jnp.dtype) -> Float[Array, "... C"]:
    """Decode the last axis with even elements first, then odd ones: ten times as fast on a CPU."""
    scale = decode_scales(packed.scales)[..., None]

    def half(nibbles: Array) -> Array:
        values = decode_nibbles(nibbles) * scale
        return values.astype(dtype).reshape(*packed.shape[:-1], packed.shape[-1] // 2)

    return jnp.concatenate([half(packed.blocks & 15), half(packed.blocks >> 4)], axis=-1)


def to_halves(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Reorder the last axis as `decode_halves` does."""
    return x.reshape(*x.shape[:-1], -1, 2).swapaxes(-1, -2).reshape(x.shape)


def from_halves(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Undo `to_halves`."""
    return x.reshape(*x.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(x.shape)


def encode(x: Float[Array, "... C"] | np.ndarray, *, search: bool) -> MXFP4:
    """Encode on the device; encode a numpy array slice by slice, into numpy arrays."""
    if not isinstance(x, np.ndarray):
        return _encode_blocks(x.reshape(*x.shape[:-1], -1, MXFP4_BLOCK), search=search)
    flat = x.reshape(-1, MXFP4_BLOCK)
    blocks: Any = np.empty((*flat.shape[:1], MXFP4_BLOCK // 2), np.uint8)
    scales: Any = np.empty(flat.shape[:1], np.uint8)
    step = SLICE_VALUES // MXFP4_BLOCK
    for start in range(0, flat.shape[0], step):
        part = _encode_blocks(jnp.asarray(flat[start : start + step]), search=search)
        blocks[start : start + step] = part.blocks
        scales[start : start + step] = part.scales
    shape = (*x.shape[:-1], x.shape[-1] // MXFP4_BLOCK)
    return MXFP4(blocks.reshape(*shape, MXFP4_BLOCK // 2), scales.reshape(shape))


@functools.partial(jax.jit, static_argnames="search")
def _encode_blocks(x: Float[Array, "... 32"], *, search: bool) -> MXFP4:
    unit, base = in_units(x)
    if search:
        _, double = nearest(unit, base)
        unit, base = jnp.where(double[..., None], unit / 2, unit), base + double
    return MXFP4(_pack(_round(unit)), base.astype(jnp.uint8))


def in_units(x: Float[Array, "... 32"]) -> tuple[Float[Array, "... 32"], Int[Array, "..."]]:
    """Return blocks in units of their OCP scale, and the scales' bytes; units are below 8 in size.

    Scale bytes are at least 1, so that a block of the smallest normal numbers keeps its values:
    byte 0 is a subnormal scale and would lose them. Zeros decode to zeros under any byte. Scale
    bytes are at most `TOP`: above it 8 units would overflow float32. The values in units never
    overflow.
    """
    x = x.astype(jnp.float32)
    amax = jnp.max(jnp.abs(x), axis=-1)
    exponent = (lax.bitcast_convert_type(amax, jnp.uint32) >> 23).astype(jnp.int32)
    base = jnp.clip(exponent - 2, 1, TOP)
    return _rescale(x, base), base


def nearest(
    unit: Float[Array, "... 32"], base: Int[Array, "..."]
) -> tuple[Float[Array, "... 32"], Bool[Array, "..."]]:
    """Return the values of least error for blocks of `in_units`, and which blocks double the scale.

    The values are in the same units.

    Only a block whose largest value is above 6 units can gain from a doubled scale: up to 6 units,
    the doubled scale has no value that the scale lacks. Half the scale would cut the largest value
    by a quarter or more, and is worse (of 1.6 million random blocks of four distributions, none
    gained).

    The two errors are compared by their difference. Each element's difference is multiplied by a
    power of two and rounded, and the sum is over integers. So every compiler, backend and order of
    summation makes the same choice, and a model is exported with exactly the weights that it was
    trained with. Equal errors keep the scale.
    """
    single, double = _to_nearest(unit), 2 * _to_nearest(unit / 2)
    gain = (single - double) * (single + double - 2 * unit)  # in squared error; at most 4
    gain = jnp.sum(jnp.round(gain * GAIN_ONE).astype(jnp.int32), axis=-1)
    is_double = (gain > 0) & (base < TOP)
    return jnp.where(is_double[..., None], double, single), is_double


def _to_nearest(unit: Array) -> Array:
    """Return the nearest e2m1 values, ties to the even code, saturating at 6; -0 stays -0."""
    size = jnp.abs(unit)
    step = jnp.where(size < 2, 0.5, jnp.where(size < 4, 1.0, 2.0))
    # An even code is an even multiple of its step.
    return lax.round(jnp.clip(unit, -6, 6) / step, lax.RoundingMethod.TO_NEAREST_EVEN) * step


def _rescale(x: Array, scale: Array) -> Array:
    """Return x * 2**(127 - scale) by two factors: a single one may be subnormal, and flushed."""
    first = (127 - scale) // 2
    second = 127 - scale - first
    for part in (first, second):
        x = x * decode_scales((127 + part).astype(jnp.uint8))[..., None]
    return x


def _round(x: Array) -> Array:
    """Return codes of the nearest e2m1 values, ties to the even code, saturating at 6."""
    a = jnp.abs(x)
    code = (a > 0.25).astype(jnp.uint8)
    for passed in (a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5):
        code += passed.astype(jnp.uint8)
    return code | jnp.where(jnp.signbit(x), jnp.uint8(8), jnp.uint8(0))


def _pack(codes: UInt8[Array, "... 32"]) -> UInt8[Array, "... 16"]:
    pairs = codes.reshape(*codes.shape[:-1], MXFP4_BLOCK // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)
