"""Attention to a key/value cache, split over its keys.

The keys are cut into shards. Each shard gives (output, logsumexp), and `merge` combines them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.attention.sink_algebra import apply_sinks
from gptoss_jax.ops.attention.xla import MAX_LOGITS

# Least keys per shard: fewer don't pay for the merge.
SHARD = 512
# Most shards: these, times the kv heads or sequences, fill the chip.
MAX_SHARDS = 32
# From this many cache elements a CPU uses the widened form (measured: 2 cores, 8 kv heads).
LARGE = 1 << 23
# Up to this many rows (T * N) reading the cache still bounds the time of the widened products.
FEW_ROWS = 512


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
    """Attend with few queries to keys in any order, as in a cache; see `attention`.

    The number of shards divides the cache evenly, so that cutting it needs no copy. All logits of
    the call are in memory at once. If they are more than `MAX_LOGITS`, queries are taken in blocks.
    """
    B, T, N, _ = q.shape
    S = k.shape[1]
    block = max(1, MAX_LOGITS // (B * N * S))
    if block < T:
        return _in_blocks(
            block, q, k, v, sinks, window=window, segments=segments, positions=positions
        )
    P = shards(S)

    def cut(x):
        return x.reshape(B * P, S // P, *x.shape[2:])

    def repeated(x):
        return jnp.broadcast_to(x[:, None], (B, P, *x.shape[1:])).reshape(B * P, *x.shape[1:])

    outs, lses = partial_attention(
        repeated(q),
        cut(k),
        cut(v),
        window=window,
        segments=(repeated(segments[0]), cut(segments[1])),
        positions=(repeated(positions[0]), cut(positions[1])),
    )
    outs, lses = (jnp.moveaxis(x.reshape(B, P, *x.shape[1:]), 1, 0) for x in (outs, lses))
    return apply_sinks(*merge(outs, lses), sinks).astype(q.dtype)


def _in_blocks(block: int, q, k, v, sinks, *, window, segments, positions) -> Array:
    """Attend in blocks of queries; the last block is padded with queries that see nothing."""
    T = q.shape[1]
    count = -(-T // block)

    def blocks(x):
        x = jnp.pad(x, [(0, 0), (0, count * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    def one(part):
        q, segment, position = part
        where = {"segments": (segment, segments[1]), "positions": (position, positions[1])}
        return cached_attention(q, k, v, sinks, window=window, **where)

    outs = jax.lax.map(one, (blocks(q), blocks(segments[0]), blocks(positions[0])))
    return jnp.moveaxis(outs, 0, 1).reshape(q.shape[0], count * block, *q.shape[2:])[:, :T]


def shards(slots: int) -> int:
    """Return the number of equal shards for a cache of `slots`: the most that the limits allow.

    A prime number of slots gives one shard, so choose a cache length with many divisors.
    """
    most = min(MAX_SHARDS, slots // SHARD)
    return next((count for count in range(most, 1, -1) if slots % count == 0), 1)


def partial_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    window: int | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend to a part of the keys, without sinks; return output and logsumexp in float32.

    `attention` defines which keys a query sees. If a query sees none of these keys, its output is 0
    and its logsumexp is -inf, which `merge` accepts.
    """
    mask = visible(segments[0], segments[1], positions[0], positions[1], window)
    mask = mask[:, :, None, :]
    logits = _logits(q, k) * q.shape[-1] ** -0.5
    logits = jnp.where(mask, logits, MASKED)
    # The maximum stays above MASKED, so that a row that sees nothing has weights of zero.
    largest = jnp.maximum(jnp.max(logits, axis=-1), MASKED / 10)
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _outputs(weights.astype(v.dtype), v) / jnp.maximum(total, 1e-30)[..., None]
    seen = total != 0  # also true for NaN, which must not become zero
    return out, jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)


def merge(
    outs: Float[Array, "P B T N H"], lses: Float[Array, "P B T N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Merge the results of attention to parts of the keys into attention to all; all float32.

    Merging is associative, so shards may be merged as they come. Apply the sinks once, at the end,
    with `sink_algebra.apply_sinks`.
    """
    largest = jnp.maximum(jnp.max(lses, axis=0), MASKED)
    weights = jnp.exp(lses - largest)
    total = jnp.sum(weights, axis=0)
    seen = total != 0  # also true for NaN, which must not become zero
    out = jnp.sum(weights[..., None] * outs, axis=0) / jnp.maximum(total, 1e-30)[..., None]
    return out, jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)


def _logits(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> Float[Array, "B T N S"]:
    """Multiply queries with the keys of their kv head, in float32."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    if _widened(k, T * N):
        wide = jnp.einsum("BTKGH,KJ->BTKGJH", _by_head(q, K), jnp.eye(K, dtype=q.dtype))
        return jnp.einsum(
            "BXC,BSC->BXS",
            wide.reshape(B, T * N, K * H),
            k.reshape(B, S, K * H),
            preferred_element_type=jnp.float32,
        ).reshape(B, T, N, S)
    logits = jnp.einsum("BTKGH,BSKH->BTKGS", _by_head(q, K), k, preferred_element_type=jnp.float32)
    return logits.reshape(B, T, N, S)


def _outputs(p: Float[Array, "B T N S"], v: Float[Array, "B S K H"]) -> Float[Array, "B T N H"]:
    """Sum the values of each query's kv head, times the query's weights, in float32."""
    B, T, N, S = p.shape
    K, H = v.shape[2:]
    if _widened(v, T * N):
        wide = jnp.einsum(
            "BXS,BSC->BXC",
            p.reshape(B, T * N, S),
            v.reshape(B, S, K * H),
            preferred_element_type=jnp.float32,
        ).reshape(B, T, K, N // K, K, H)
        own = jnp.eye(K, dtype=jnp.float32)[:, None, :, None]
        return jnp.sum(wide * own, axis=4).reshape(B, T, N, H)
    out = jnp.einsum("BTKGS,BSKH->BTKGH", _by_head(p, K), v, preferred_element_type=jnp.float32)
    return out.reshape(B, T, N, H)


def _by_head(x: Float[Array, "B T N X"], K: int) -> Float[Array, "B T K G X"]:
    B, T, N, X = x.shape
    return x.reshape(B, T, K, N // K, X)


def _widened(cache: Float[Array, "B S K H"], rows: int) -> bool:
    """Return whether the products use the widened form: all kv heads at once.

    A query is then zero outside its own kv head, and the cache is a plain matrix [S, K*H], which no
    compiler transposes first. That costs K times the FLOPs. With few rows of queries they are free
    on a chip that waits for memory. On a CPU they cost more than the copy, until the key/value
    cache is larger than the CPU's cache.
    """
    if rows > FEW_ROWS:
        return False
    return chips.current().platform != "cpu" or cache.size >= LARGE
