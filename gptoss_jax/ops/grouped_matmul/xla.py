"""Grouped matmul in plain XLA: `lax.ragged_dot` over the decoded layer; correct, seldom fast."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.grouped_matmul.weights import Weight, dense


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "P N"]:
    """Decode the layer in full, then multiply."""
    matrix = dense(weight, rows.dtype)
    matrix = matrix.reshape(matrix.shape[0], -1, matrix.shape[-1]).swapaxes(1, 2)
    inside = (jnp.arange(rows.shape[0]) < jnp.sum(group_sizes))[:, None]
    rows = jnp.where(inside, rows, 0)
    return lax.ragged_dot(
        rows, matrix, group_sizes.astype(jnp.int32), preferred_element_type=jnp.float32
    ).astype(rows.dtype)
