"""Attention to a cache, split over its keys: each shard gives (output, logsumexp), then merged."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.attention.sink_algebra import apply_sinks
from gptoss_jax.ops.attention.xla import MAX_LOGITS

# Keys of a shard, at least: fewer don't pay for the merge.
SHARD = 512
# Shards, at most: with a kv head or a sequence each they fill the chip.
MAX_SHARDS = 32
# Elements of a cache from which a CPU takes the widened form (measured: 2 cores, 8 kv heads).
LARGE = 1 << 23
# Rows (T * N) up to which the widened products are still bound by the cache's bytes.
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
    """Attend to keys in any order, as they lie in a cache, by few queries; see `attention`.

    The shards are as many as divide the cache evenly, so that it is cut without a copy. All logits
    of the call are in memory at once, or where they are more than `MAX_LOGITS` of a block of
    queries.
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
    """Attend in blocks of queries, the last one padded with what sees nothing."""
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
    """Return into how many equal shards a cache of `slots` is cut: the most that its rules allow.

    A prime number of slots is one shard: give a cache a length that divides well.
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

    Which key is seen says `attention`. Where a query sees none of these keys the output is 0 and
    the logsumexp -inf, which `merge` takes.
    """
    mask = visible(segments[0], segments[1], positions[0], positions[1], window)
    mask = mask[:, :, None, :]
    logits = _logits(q, k) * q.shape[-1] ** -0.5
    logits = jnp.where(mask, logits, MASKED)
    # Above MASKED, so that a row which sees nothing has weights of zero.
    largest = jnp.maximum(jnp.max(logits, axis=-1), MASKED / 10)
    weights = jnp.exp(logits - largest[..., None])
    total = jnp.sum(weights, axis=-1)
    out = _outputs(weights.astype(v.dtype), v) / jnp.maximum(total, 1e-30)[..., None]
    seen = total != 0  # a NaN too, which is not to become zero
    return out, jnp.where(seen, largest + jnp.log(jnp.where(seen, total, 1.0)), -jnp.inf)


def merge(
    outs: Float[Array, "P B T N H"], lses: Float[Array, "P B T N"]
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Merge what attention to parts of the keys gave, all float32: as if attended to at once.

    Associative, so shards may be merged as they come. The sinks take part once, at the end:
    `sink_algebra.apply_sinks`.
    """
    largest = jnp.maximum(jnp.max(lses, axis=0), MASKED)
    weights = jnp.exp(lses - largest)
    total = jnp.sum(weights, axis=0)
    seen = total != 0  # a NaN too, which is not to become zero
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
    """Sum the values of each query's kv head by its weights, in float32."""
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
    """Say whether the products run over all kv heads at once, zeros off a query's own.

    So the cache is a plain matrix [S, K*H], which no compiler transposes first. That costs K times
    the FLOPs, which are free on a chip that waits for memory, as it does with few rows of queries,
    and on a CPU dearer than the copy until the cache has outgrown the CPU's own.
    """
    if rows > FEW_ROWS:
        return False
    return chips.current().platform != "cpu" or cache.size >= LARGE
