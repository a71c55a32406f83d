"""Causal attention with learned sinks, banded or full, for grouped queries and packed segments."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention import reference, xla
from gptoss_jax.ops.dispatch import choose

# Self-attention over a whole row: training and prefill.
SELF_ORDER = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("pallas_gpu", "cudnn", "xla"),
    "cpu": ("xla",),
    "named": ("reference",),
}
# Attention of new tokens to a cache.
CACHED_ORDER = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("pallas_gpu", "split", "xla"),
    "cpu": ("xla",),
    "named": ("split", "reference"),
}


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
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Attend from each query to the keys that it sees, with one sink logit per query head.

    Query i sees key j if and only if their segments match, the segment is not 0 (padding), and
    0 <= position_i - position_j < window (no upper bound if `window` is None). The sink takes part
    in the softmax and has no value, so the result is out * sigmoid(logsumexp - sink). None means no
    sink. A query that sees nothing gives zeros. Logits are scaled by 1/sqrt(H). Logits, softmax and
    sums are float32; the result has the dtype of `q`. Differentiable in q, k, v and sinks.

    Without `kv_segment_ids` and `kv_positions` this is self-attention. Segments must be contiguous
    in a row and positions must rise by one, so that no query sees a later index. The fast
    implementations use this to skip work: a banded layer costs O(T W). With both arguments keys may
    be in any order, as in a key/value cache. Source: gpt_oss/torch/model.py, sdpa.

    `implementation` is a name in `SELF_ORDER`, or in `CACHED_ORDER` with a cache: "reference",
    "xla", "pallas_tpu" (splash attention, or a decode kernel), "pallas_gpu" (Hopper), "cudnn"
    (without a cache), "split" (blocks of keys, merged; with a cache). None takes the first of the
    platform that supports the arguments. Raises ValueError with the reason if it can't run.
    """
    if (kv_segment_ids is None) != (kv_positions is None):
        raise ValueError("give kv_segment_ids and kv_positions together, or neither")
    if kv_segment_ids is None or kv_positions is None:
        where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
        return _self(q, k, v, sinks, window=window, **where, implementation=implementation)
    where = {
        "segments": (segment_ids, kv_segment_ids),
        "positions": (positions, kv_positions),
    }
    return _cached(q, k, v, sinks, window=window, **where, implementation=implementation)


def _self(q, k, v, sinks, *, implementation: str | None, **where) -> Any:
    def refuse(name: str) -> str | None:
        return (
            None if name in ("xla", "reference") else _kernel(name).refuse(q, k, v, sinks, **where)
        )

    name = choose("attention", implementation, order=SELF_ORDER, refuse=refuse)
    if name == "reference":
        segments, positions = where["segment_ids"], where["positions"]
        mask = reference.visible(segments, segments, positions, positions, where["window"])
        return reference.attend(q, k, v, sinks, mask)
    run: Any = xla.self_attention if name == "xla" else _kernel(name).self_attention
    return run(q, k, v, sinks, **where)


def _cached(q, k, v, sinks, *, implementation: str | None, **where) -> Any:
    def refuse(name: str) -> str | None:
        if name in ("xla", "split", "reference"):
            return None
        return _kernel(name, decode=True).refuse(q, k, v, sinks, **where)

    name = choose("cached attention", implementation, order=CACHED_ORDER, refuse=refuse)
    if name == "reference":
        (q_ids, k_ids), (q_places, k_places) = where["segments"], where["positions"]
        mask = reference.visible(q_ids, k_ids, q_places, k_places, where["window"])
        return reference.attend(q, k, v, sinks, mask)
    run: Any = (
        xla.cached_attention if name == "xla" else _kernel(name, decode=True).cached_attention
    )
    return run(q, k, v, sinks, **where)


def _kernel(name: str, *, decode: bool = False) -> Any:
    """Import a module of kernels only when it is needed, because the import costs time."""
    if name == "split":
        from gptoss_jax.ops.attention import split as module
    elif name == "cudnn":
        from gptoss_jax.ops.attention import cudnn as module
    elif name == "pallas_tpu" and decode:
        from gptoss_jax.ops.attention import pallas_tpu_decode as module
    elif name == "pallas_tpu":
        from gptoss_jax.ops.attention import pallas_tpu as module
    elif decode:
        from gptoss_jax.ops.attention import pallas_gpu_decode as module
    else:
        from gptoss_jax.ops.attention import pallas_gpu as module
    return module
