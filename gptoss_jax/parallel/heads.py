"""Attention heads over the `tensor` axis: which kv heads belong to a shard's query heads."""

from __future__ import annotations

from typing import Any

import jax
from jaxtyping import Array, Float

AXIS = "tensor"


def check(N: int, K: int, shards: int) -> None:
    """Refuse heads that do not divide over the shards. Raises ValueError."""
    if N % shards:
        raise ValueError(
            f"mesh.tensor={shards} does not divide the {N} query heads: choose one that does"
        )
    if K % shards and shards % K:
        raise ValueError(
            f"mesh.tensor={shards} and {K} kv heads: neither is a multiple of the other, so a "
            "shard's query heads would not belong to whole kv heads; choose one that is"
        )


def kv_axis(K: int, shards: int) -> str | None:
    """Return the axis that splits the kv heads: None if there are more shards than heads."""
    return AXIS if K % shards == 0 else None


def own(x: Float[Array, "B S K H"], K: int, shards: int) -> Any:
    """Return a shard's kv heads inside a `shard_map`; `x` is split as `kv_axis` says, of K heads.

    With more shards than kv heads, `x` has all of them, and the shard's query heads belong to one.
    """
    if kv_axis(K, shards):
        return x
    head = jax.lax.axis_index(AXIS) * K // shards
    return jax.lax.dynamic_slice_in_dim(x, head, 1, axis=2)
