"""Write new keys or values into the slots of a key/value cache."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.chips import refuse_tpu_kernel
from gptoss_jax.ops.dispatch import kernels_are_off


def write(
    cache: Float[Array, "B S K H"], new: Float[Array, "B T K H"], slots: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    """Return the cache with `new` written to each row's slots; slots of S or more are skipped.

    On a TPU, a kernel writes one token per row in place: see `pallas_tpu_decode`.
    """
    if new.shape[1] == 1 and refuse_tpu_kernel() is None and not kernels_are_off():
        from gptoss_jax.ops.attention import pallas_tpu_decode

        return pallas_tpu_decode.write(cache, new, slots[:, 0])
    row = jnp.arange(new.shape[0])[:, None]
    return cache.at[row, slots].set(new.astype(cache.dtype), mode="drop")
