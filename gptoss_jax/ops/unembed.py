"""Unembedding: the logits of a few rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax import chips

PARTS = 64


def unembed(hidden: Float[Array, "... D"], weight: Float[Array, "V D"]) -> Float[Array, "... V"]:
    """Return hidden @ weight.T in float32, from operands in the dtype of `hidden`.

    For float16 on a GPU, the product is formed for one of `PARTS` parts of the vocabulary at a
    time. Otherwise XLA would first widen the whole table to float32, which takes 2.2 GB.
    """
    V, D = weight.shape

    def part(rows: Float[Array, "V D"]) -> Float[Array, "... V"]:
        rows = rows.astype(hidden.dtype)
        return jnp.einsum("...D,VD->...V", hidden, rows, preferred_element_type=jnp.float32)

    if hidden.dtype != jnp.float16 or chips.current().platform != "gpu" or V % PARTS:
        return part(weight)
    out = jax.lax.map(part, weight.reshape(PARTS, -1, D))  # [parts, ..., V / parts]
    return jnp.moveaxis(out, 0, -2).reshape(*hidden.shape[:-1], V)
