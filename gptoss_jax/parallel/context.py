"""Attention over the mesh: rows split over their axes, heads over `tensor`, tokens over `context`.

If `context` has C > 1 shards, the tokens of a row are in the balanced order: the row is cut into 2C
chunks, and shard i holds chunks i and 2C-1-i, one after the other. So causal attention costs every
shard the same. In a banded layer each chunk fetches the few keys before it (its halo) from the
shard that has them, and attends to them as on one device. In a full layer all keys go round the
shards: see `ring`.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.ops import attention as op
from gptoss_jax.parallel import heads, mesh, ring

AXIS = "context"
# Kernels' blocks are multiples of this, so halos are too, unless their chunk is shorter.
LANES = 128


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    *,
    sinks: Float[Array, " N"] | None,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    over_context: bool = True,
) -> Float[Array, "B T N H"]:
    """Compute self-attention of global arrays under the current mesh; see `ops.attention`.

    Rows are split over `mesh.ROWS`, heads over `tensor` (kv heads too, if there are enough), and
    tokens over `context`. If `context` has several shards, q, k, v, segment ids and positions must
    be in the balanced order (`balance`), and the output is too. Before balancing, segments must be
    contiguous and positions must rise by one in them, as the op requires. `over_context=False`
    keeps tokens whole and in order on every shard of `context`, for a prefill. Without a mesh this
    is the op itself.

    Raises:
        ValueError: The mesh does not divide the rows, tokens or heads.
    """
    where: dict[str, Any] = {"segment_ids": segment_ids, "positions": positions}
    if mesh.current() is None:
        return op.attention(q, k, v, sinks=sinks, window=window, **where)
    shards = mesh.size(AXIS) if over_context else 1
    if shards > 1 and q.shape[1] % (2 * shards):
        raise ValueError(f"{q.shape[1]} tokens are no multiple of 2 * mesh.context = {2 * shards}")
    K, tensor = k.shape[2], mesh.size(heads.AXIS)

    def local(q, k, v, sinks, segment_ids, positions):
        k, v = (heads.own(x, K, tensor) for x in (k, v))
        run = op.attention if shards == 1 else functools.partial(_split, shards)
        return run(
            q, k, v, sinks=sinks, window=window, segment_ids=segment_ids, positions=positions
        )

    return _island(
        local, q, k, v, sinks, (segment_ids, positions), tokens=AXIS if shards > 1 else None
    )


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    sinks: Float[Array, " N"] | None,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    kv_segment_ids: Int[Array, "B S"],
    kv_positions: Int[Array, "B S"],
) -> Float[Array, "B T N H"]:
    """Attend from new tokens to a key/value cache, under the current mesh.

    Rows and heads are split as in `attention`. Tokens and cache are the same on all shards of
    `context`. Without a mesh this is the op itself. Raises ValueError as `attention` does.
    """
    ids = (segment_ids, positions, kv_segment_ids, kv_positions)
    K, tensor = k.shape[2], mesh.size(heads.AXIS)

    def local(q, k, v, sinks, segment_ids, positions, kv_segment_ids, kv_positions):
        k, v = (heads.own(x, K, tensor) for x in (k, v))
        return op.attention(
            q, k, v, sinks=sinks, window=window, segment_ids=segment_ids, positions=positions,
            kv_segment_ids=kv_segment_ids, kv_positions=kv_positions,
        )  # fmt: skip

    if mesh.current() is None:
        return local(q, k, v, sinks, *ids)
    return _island(local, q, k, v, sinks, ids, tokens=None)


def balance(x: Any, *, shards: int, axis: int = 1) -> Array:
    """Put a row's tokens into the balanced order: chunks 0, 2C-1, 1, 2C-2, ... of 2C.

    C is `shards`; with one shard the order does not change. Raises ValueError if the length of the
    axis is not a multiple of 2C.
    """
    return _ordered(x, _balanced(shards), axis)


def unbalance(x: Any, *, shards: int, axis: int = 1) -> Array:
    """Undo `balance`."""
    return _ordered(x, np.argsort(_balanced(shards)), axis)


def _balanced(shards: int) -> np.ndarray:
    early = np.arange(shards)
    return np.stack([early, 2 * shards - 1 - early], axis=1).ravel()


def _ordered(x: Any, order: np.ndarray, axis: int) -> Array:
    x = jnp.asarray(x)
    chunks, axis = len(order), axis % x.ndim
    if chunks == 2:  # one shard
        return x
    if x.shape[axis] % chunks:
        raise ValueError(f"{x.shape[axis]} tokens are no multiple of {chunks}: 2 for each shard")
    cut = x.reshape(*x.shape[:axis], chunks, -1, *x.shape[axis + 1 :])
    return jnp.take(cut, order, axis=axis).reshape(x.shape)


def _island(run: Any, q: Any, k: Any, v: Any, sinks: Any, ids: tuple, *, tokens: str | None) -> Any:
    """Call `run` on each device's part of the arrays; the mesh axis `tokens` splits the tokens."""
    N, K = q.shape[2], k.shape[2]
    rows, tensor = mesh.size(*mesh.ROWS), mesh.size(heads.AXIS)
    if q.shape[0] % rows:
        raise ValueError(f"{q.shape[0]} rows do not divide over data x fsdp x expert = {rows}")
    heads.check(N, K, tensor)
    queries = P(mesh.ROWS, tokens, heads.AXIS, None)
    keys = P(mesh.ROWS, tokens, heads.kv_axis(K, tensor), None)
    specs = (queries, keys, keys, P(heads.AXIS), *(P(mesh.ROWS, tokens) for _ in ids))
    # check_vma is off: custom gradients of kernels don't track which axes a value varies over.
    over = jax.shard_map(run, in_specs=specs, out_specs=queries, check_vma=False)
    return over(q, k, v, sinks, *ids)


def _split(shards: int, q: Any, k: Any, v: Any, *, window: int | None, **where: Any) -> Any:
    """Attend over a shard's tokens: by halos, or by the ring if a halo is longer than a chunk."""
    if window is None or window - 1 > q.shape[1] // 2:
        return ring.attend(q, k, v, where.pop("sinks"), window=window, **where)
    return _banded(shards, q, k, v, window=window, **where)


def _banded(
    shards: int,
    q: Any,
    k: Any,
    v: Any,
    *,
    sinks: Any,
    window: int,
    segment_ids: Any,
    positions: Any,
) -> Any:
    """Attend over both chunks as separate rows, each preceded by its halo.

    A halo and its chunk are neighbours in the row, so kernels for self-attention can process them.
    The halo's tokens are queries too, whose outputs are dropped. A halo before the beginning of the
    row has segment 0.
    """
    B, T, N, H = q.shape
    L = T // 2
    halo = min(L, -(-(window - 1) // LANES) * LANES)

    def extended(x):
        chunks = (x[:, :L], x[:, L:])
        ends = (chunk[:, L - halo :] for chunk in chunks)
        pieces = zip(_halos(shards, *ends), chunks, strict=True)
        return jnp.concatenate([jnp.concatenate(piece, axis=1) for piece in pieces])

    queries = jnp.pad(q.reshape(B, 2, L, N, H), [(0, 0), (0, 0), (halo, 0), (0, 0), (0, 0)])
    out = op.attention(
        jnp.moveaxis(queries, 1, 0).reshape(2 * B, halo + L, N, H),
        extended(k),
        extended(v),
        sinks=sinks,
        window=window,
        segment_ids=extended(segment_ids),
        positions=extended(positions),
    )
    out = out[:, halo:].reshape(2, B, L, N, H)
    return jnp.moveaxis(out, 0, 1).reshape(B, T, N, H)


def _halos(shards: int, early: Array, late: Array) -> tuple[Array, Array]:
    """Return the halos of a shard's two chunks, from the ends of all chunks; zeros before the row.

    Chunk i follows chunk i-1, of the previous shard. Chunk 2C-1-i follows chunk 2C-2-i, of the next
    shard; on the last shard it follows the shard's own early chunk.
    """
    before = jax.lax.ppermute(early, AXIS, [(i, i + 1) for i in range(shards - 1)])
    behind = jax.lax.ppermute(late, AXIS, [(i + 1, i) for i in range(shards - 1)])
    last = jax.lax.axis_index(AXIS) == shards - 1
    return before, jnp.where(last, early, behind)
