"""Reference attention, which the others are compared with: all logits in memory, in float32."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # a masked logit; finite, so that inf - inf never occurs


def visible(
    q_segments: Int[Array, "B T"],
    k_segments: Int[Array, "B S"],
    q_positions: Int[Array, "B T"],
    k_positions: Int[Array, "B S"],
    window: int | None,
) -> Bool[Array, "B T S"]:
    """Return which keys each query sees: same segment, not padding, 0 <= distance < window."""
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    seen = (q_segments[:, :, None] == k_segments[:, None, :]) & (k_segments != 0)[:, None, :]
    seen &= distance >= 0
    return seen if window is None else seen & (distance < window)


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"] | None,
    mask: Bool[Array, "B T S"],
) -> Float[Array, "B T N H"]:
    """Take the softmax over [visible logits, sink] and drop the sink's share.

    Logits and sums are in float32.

    A row that sees nothing gives zeros. Source: gpt_oss/torch/model.py, sdpa.
    """
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    mask = mask[:, None, None]
    logits = jnp.where(mask, logits, MASKED)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    if sink is not None:
        largest = jnp.maximum(largest, sink)
    weights = jnp.where(mask, jnp.exp(logits - largest), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.maximum(total, 1e-30) if sink is None else total + jnp.exp(sink - largest)
    out = jnp.einsum(
        "BKGTS,BSKH->BTKGH",
        (weights / total).astype(v.dtype),
        v,
        preferred_element_type=jnp.float32,
    )
    return out.reshape(B, T, N, H).astype(q.dtype)
