"""Attention in plain XLA, by blocks of queries: O(T W) in banded layers, memory linear in T."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.reference import attend, visible

# Logits of one block of queries that may exist at once, in float32 elements (128 MiB).
MAX_LOGITS = 1 << 25
# Key prefixes of a full layer: query block i of them sees the first i + 1 alone.
PREFIXES = 8


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend over rows whose index order is their causal order; see `attention`."""
    T = q.shape[1]
    if window is not None and 2 * window < T:
        return _banded(q, k, v, sinks, window=window, segment_ids=segment_ids, positions=positions)
    return _full(q, k, v, sinks, window=window, segment_ids=segment_ids, positions=positions)


def _banded(q, k, v, sinks, *, window, segment_ids, positions):
    """Cut the row into chunks of `window`; a chunk's queries see it and the chunk before."""
    B, T, N, H = q.shape
    C = -(-T // window)
    extra = C * window - T

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, extra)] + [(0, 0)] * (x.ndim - 2))
        return x.reshape(B, C, window, *x.shape[2:])

    def with_previous(x):
        before = jnp.pad(x[:, :-1], [(0, 0), (1, 0)] + [(0, 0)] * (x.ndim - 2))
        return jnp.concatenate([before, x], axis=2)

    def flat(x):
        return x.reshape(B * C, *x.shape[2:])

    segments, places = chunks(segment_ids), chunks(positions)
    mask = visible(
        flat(segments), flat(with_previous(segments)), flat(places), flat(with_previous(places)),
        window,
    )  # fmt: skip
    keys, values = flat(with_previous(chunks(k))), flat(with_previous(chunks(v)))
    out = attend(flat(chunks(q)), keys, values, sinks, mask)
    return out.reshape(B, C * window, N, H)[:, :T]


def _full(q, k, v, sinks, *, window, segment_ids, positions):
    """Cut the queries into blocks, each of which sees the keys up to its own end."""
    B, T, N, _ = q.shape
    block = T if B * N * T * T <= MAX_LOGITS // 8 else -(-T // PREFIXES)
    outs = []
    for start in range(0, T, block):
        end = min(start + block, T)
        part = slice(start, end)
        outs.append(
            _in_blocks(
                q[:, part],
                k[:, :end],
                v[:, :end],
                sinks,
                window=window,
                segments=(segment_ids[:, part], segment_ids[:, :end]),
                positions=(positions[:, part], positions[:, :end]),
            )
        )
    return outs[0] if len(outs) == 1 else jnp.concatenate(outs, axis=1)


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
) -> Float[Array, "B T N H"]:
    """Attend to keys in any order, as they lie in a cache; see `attention`."""
    return _in_blocks(q, k, v, sinks, window=window, segments=segments, positions=positions)


def _in_blocks(q, k, v, sinks, *, window, segments, positions):
    """Attend in blocks of queries so small that their logits fit into `MAX_LOGITS`."""
    B, T, N, H = q.shape
    S = k.shape[1]
    block = max(1, MAX_LOGITS // (B * N * S))

    def one(q, segment, position):
        mask = visible(segment, segments[1], position, positions[1], window)
        return attend(q, k, v, sinks, mask)

    if block >= T:
        return one(q, segments[0], positions[0])
    C = -(-T // block)

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, C * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, C, block, *x.shape[2:]), 1, 0)

    # The backward pass recomputes a block's logits: saved, they would be quadratic in memory.
    rows = chunks(q), chunks(segments[0]), chunks(positions[0])
    out = jax.lax.map(jax.checkpoint(lambda row: one(*row)), rows)
    return jnp.moveaxis(out, 0, 1).reshape(B, C * block, N, H)[:, :T]
