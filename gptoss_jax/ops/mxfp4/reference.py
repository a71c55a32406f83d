"""Reference MXFP4 decoding: a table of values times a power of two."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from gptoss_jax.types import MXFP4, MXFP4_BLOCK

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def power_of_two(exponent: Array) -> Array:
    """Return 2**exponent in float32, built from its bits, for exponents from -126 to 127.

    -127 gives zero and 128 gives infinity. On XLA:CPU `exp2` is inexact, and `ldexp` is expensive.
    """
    return lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)


def decode(packed: MXFP4, dtype: jnp.dtype) -> Float[Array, "... C"]:
    """Look up each nibble in the table and multiply it by the block's power of two, in float32."""
    table = jnp.array([*MAGNITUDES, *(-m for m in MAGNITUDES)], jnp.float32)
    blocks = jnp.asarray(packed.blocks)
    nibbles = jnp.stack([blocks & 15, blocks >> 4], axis=-1)
    values = table[nibbles.reshape(*blocks.shape[:-1], MXFP4_BLOCK)]
    scale = power_of_two(jnp.asarray(packed.scales).astype(jnp.int32) - 127)
    return (values * scale[..., None]).reshape(packed.shape).astype(dtype)
