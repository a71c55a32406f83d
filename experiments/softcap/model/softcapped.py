"""Attention whose logits can't leave (-cap, cap), as in Gemma 2 (arXiv:2408.00118, section 2).

In its plainest form, every logit in memory: the package's kernels know nothing of a cap.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.reference import MASKED, visible

CAP = 5.0  # of the logits after their scale, 1/sqrt(H); Gemma 2 has 50


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    sinks: Float[Array, " N"] | None,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    cap: float | None = None,
) -> Float[Array, "B T N H"]:
    """Attend as `gptoss_jax.ops.attention.attention` does, by cap * tanh(logit / cap).

    The sink is a logit of the softmax as before, without a cap; `cap` is `CAP` if it is None.
    """
    cap = CAP if cap is None else cap
    B, T, N, H = q.shape
    K = k.shape[2]
    kv_segments = segment_ids if kv_segment_ids is None else kv_segment_ids
    places = positions if kv_positions is None else kv_positions
    mask = visible(segment_ids, kv_segments, positions, places, window)[:, None, None]
    grouped = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, T, K, N // K, H)
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    logits = cap * jnp.tanh(logits / cap)  # the one change
    logits = jnp.where(mask, logits, MASKED)
    largest = jnp.max(logits, axis=-1, keepdims=True)
    if sinks is None:
        sink = jnp.float32(MASKED)
    else:
        sink = sinks.astype(jnp.float32).reshape(1, K, N // K, 1, 1)
    largest = jnp.maximum(largest, sink)
    shares = jnp.where(mask, jnp.exp(logits - largest), 0.0)
    total = shares.sum(-1, keepdims=True) + jnp.exp(sink - largest)
    weights = (shares / total).astype(v.dtype)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H).astype(q.dtype)
