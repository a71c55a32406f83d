"""Logits of a few rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax import chips

PARTS = 64


def unembed(hidden: Float[Array, "... D"], weight: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """Return hidden @ weight.T in float32, from the dtype of `hidden`.

    In float16 on a GPU by parts of the vocabulary: for a product of float16 with a float32 result
    XLA widens the whole table first, by 2.2 GB.
    """
    V, D = weight.shape

    def part(rows: Float[Array, "V D"]) -> Float[Array, "... V"]:
        rows = rows.astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, rows, preferred_element_type=jnp.float32)

    if hidden.dtype != jnp.float16 or chips.current().platform != "gpu" or V % PARTS:
        return part(weight)
    out = jax.lax.map(part, weight.reshape(PARTS, -1, D))  # [parts, ..., V / parts]
    return jnp.moveaxis(out, 0, -2).reshape(*hidden.shape[:-1], V)
