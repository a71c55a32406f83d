"""Attention with learned sinks: banded or full, causal, grouped queries, packed segments."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention import reference, xla

Implementation = Literal["reference", "xla"]


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
    implementation: Implementation | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from each query to the keys that it sees, with one sink logit a query head.

    Key j is seen by query i iff their segments match, are not 0 (padding), and
    0 <= position_i - position_j < window (no upper bound if `window` is None). The sink takes part
    in the softmax and its share is dropped: out * sigmoid(logsumexp - sink); None leaves it out.
    A query that sees nothing gives zeros. Logits are scaled by 1/sqrt(H); logits, softmax and sums
    are float32, the result has the dtype of `q`. Differentiable in q, k, v and sinks.

    Without `kv_segment_ids` and `kv_positions` this is self-attention over rows in which segments
    are contiguous and positions rise by one (so no query sees a later index), which lets the fast
    form skip work: a banded layer costs O(T W). With them keys may stand in any order, as in a
    cache. Source: gpt_oss/torch/model.py, sdpa.
    """
    self_attention = kv_positions is None
    if (kv_segment_ids is None) != self_attention:
        raise ValueError("give kv_segment_ids and kv_positions together, or neither")
    if self_attention and implementation != "reference":
        return xla.self_attention(
            q, k, v, sinks, window=window, segment_ids=segment_ids, positions=positions
        )
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    kv_positions = positions if kv_positions is None else kv_positions
    if implementation == "reference":
        mask = reference.visible(segment_ids, kv_segment_ids, positions, kv_positions, window)
        return reference.attend(q, k, v, sinks, mask)
    return xla.cached_attention(
        q,
        k,
        v,
        sinks,
        window=window,
        segments=(segment_ids, kv_segment_ids),
        positions=(positions, kv_positions),
    )
