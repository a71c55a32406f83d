"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def rms_norm(
    x: Float[Array, "... D"], scale: Float[Array, " D"], *, eps: float
) -> Float[Array, "... D"]:
    """Divide `x` by its root mean square over the last axis, and multiply by `scale`.

    Statistics and the product with the scale are float32; the result has the dtype of `x`.
    Source: gpt_oss/torch/model.py, RMSNorm.
    """
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return (x32 * inverse * scale.astype(jnp.float32)).astype(x.dtype)
