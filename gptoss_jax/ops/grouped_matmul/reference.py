"""Reference grouped matmul: multiply every row by every group's matrix, then select."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.grouped_matmul.weights import Weight, dense


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "P N"]:
    """Form [P, E, N] in float32; autodiff gives the gradients. Rows of no group give zeros."""
    group = jnp.searchsorted(jnp.cumsum(group_sizes), jnp.arange(rows.shape[0]), side="right")
    matrix = dense(weight, jnp.float32)
    matrix = matrix.reshape(matrix.shape[0], -1, matrix.shape[-1])
    inside = (group < matrix.shape[0])[:, None]
    every = jnp.einsum(
        "PC,ENC->PEN", jnp.where(inside, rows.astype(jnp.float32), 0), matrix, precision="highest"
    )
    chosen = jax.nn.one_hot(group, matrix.shape[0], dtype=jnp.float32)
    return jnp.einsum("PEN,PE->PN", every, chosen, precision="highest").astype(rows.dtype)
