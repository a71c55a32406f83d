"""Attention of rows to a part of their keys, forward and backward, block by block.

Ring attention passes such parts round, so the softmax may be over more keys than one part. The
forward pass returns its logsumexp, by which parts are merged. The backward pass takes the logsumexp
of the whole softmax. `ops.attention` defines which keys a query sees; a block in which no key is
seen is skipped at run time.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.reference import MASKED, visible

# Limits of a block: its logits in float32 elements (128 MiB), its keys, and its queries.
MAX_LOGITS = 1 << 25
KEYS = 1024
QUERIES = 512


class Places(NamedTuple):
    """Segments and positions of tokens, which decide which keys a query sees."""

    segment_ids: Int[Array, "B T"]
    positions: Int[Array, "B T"]


class Rows(NamedTuple):
    """The inputs of the backward pass for a block of queries, grouped by kv head."""

    q: Float[Array, "B K G*T H"]  # scaled
    d_out: Float[Array, "B K G*T H"]
    lse: Float[Array, "B K G*T 1"]
    delta: Float[Array, "B K G*T 1"]


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    window: int | None,
    queries: Places,
    keys: Places,
    own: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
    """Attend without sinks; return output and logsumexp in float32.

    A query that sees no key gives 0 and -inf. `own` says whether queries and keys are the same
    tokens; it is for kernels that read no positions.
    """
    del own
    T, K = q.shape[1], k.shape[2]
    t, s = sizes(q, k)
    k_blocks = (_by_head(_cut(k, s)), _by_head(_cut(v, s)), _cut_places(keys, s))

    def rows(block):
        q, where = block
        start = (
            jnp.zeros(q.shape, jnp.float32),
            # Start above MASKED, so that a row that sees nothing has weights of zero.
            jnp.full((*q.shape[:3], 1), MASKED / 10, jnp.float32),
            jnp.zeros((*q.shape[:3], 1), jnp.float32),
        )

        def step(carry, block):
            k, v, there = block
            seen = _seen(where, there, window)

            def attend(carry):
                out, largest, total = carry
                logits = _masked(_dot(q, k.swapaxes(2, 3)), seen)
                new = jnp.maximum(largest, jnp.max(logits, axis=-1, keepdims=True))
                shrink, weights = jnp.exp(largest - new), jnp.exp(logits - new)
                out = out * shrink + _dot(weights.astype(v.dtype), v)
                return out, new, total * shrink + jnp.sum(weights, axis=-1, keepdims=True)

            return jax.lax.cond(jnp.any(seen), attend, lambda carry: carry, carry), None

        (out, largest, total), _ = jax.lax.scan(step, start, k_blocks)
        # Not `total > 0`: a NaN must not become -inf.
        lse = jnp.where(total == 0, -jnp.inf, largest + jnp.log(jnp.maximum(total, 1e-30)))
        return out / jnp.maximum(total, 1e-30), lse

    out, lse = jax.lax.map(rows, (_grouped(_scaled(_cut(q, t)), K), _cut_places(queries, t)))
    return _joined(_ungrouped(out, t), T), _joined(_ungrouped(lse, t), T)[..., 0]


def backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    d_out: Float[Array, "B T N H"],
    *,
    out: Float[Array, "B T N H"],
    lse: Float[Array, "B T N"],
    window: int | None,
    queries: Places,
    keys: Places,
    own: bool = False,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Return what these queries and keys add to dq, dk and dv, in float32.

    `out` and `lse` are those of the whole softmax, sinks included. With p the softmax, dlogits =
    p * (d_out v^T - rowsum(d_out * out)).
    """
    del own
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    T, H = q.shape[1], q.shape[3]
    S, K = k.shape[1:3]
    t, s = sizes(q, k)
    k_blocks = (_by_head(_cut(k, s)), _by_head(_cut(v, s)), _cut_places(keys, s))
    q_blocks = Rows(*(
        _grouped(_cut(x, t), K) for x in (_scaled(q), d_out, lse[..., None], delta[..., None])
    ))  # fmt: skip

    def rows(gradients, block):
        row, where = block

        def step(dq, block):
            (k, v, there), (dk, dv) = block
            seen = _seen(where, there, window)
            shapes = tuple(jnp.zeros(x.shape, jnp.float32) for x in (dq, dk, dv))

            def differentiate():
                return _block_gradients(row, k, v, seen)

            parts = jax.lax.cond(jnp.any(seen), differentiate, lambda: shapes)
            return dq + parts[0], (dk + parts[1], dv + parts[2])

        start = jnp.zeros(row.q.shape, jnp.float32)
        dq, gradients = jax.lax.scan(step, start, (k_blocks, gradients))
        return gradients, dq

    start = tuple(jnp.zeros(x.shape, jnp.float32) for x in k_blocks[:2])
    (dk, dv), dq = jax.lax.scan(rows, start, (q_blocks, _cut_places(queries, t)))
    dq = _joined(_ungrouped(dq, t), T) * H**-0.5
    return dq, _joined(_by_head(dk), S), _joined(_by_head(dv), S)


def _block_gradients(row: Rows, k: Array, v: Array, seen: Array) -> tuple[Array, Array, Array]:
    """Differentiate one block; dq lacks the scale of the logits."""
    p = jnp.exp(_masked(_dot(row.q, k.swapaxes(2, 3)), seen) - row.lse)
    ds = (p * (_dot(row.d_out, v.swapaxes(2, 3)) - row.delta)).astype(k.dtype)
    dk = _dot(ds.swapaxes(2, 3), row.q)
    dv = _dot(p.astype(v.dtype).swapaxes(2, 3), row.d_out)
    return _dot(ds, k), dk, dv


def sizes(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> tuple[int, int]:
    """Return the numbers of queries and keys per block: as even as possible within the limits."""
    B, T, N, _ = q.shape
    s = _even(k.shape[1], KEYS)
    return _even(T, max(1, min(QUERIES, MAX_LOGITS // (B * N * s)))), s


def _even(length: int, most: int) -> int:
    count = -(-length // most)
    return -(-length // count)


def _cut(x: Array, size: int) -> Array:
    """Cut [B, T, ...] into [T/size, B, size, ...], zeros at the end."""
    B, T = x.shape[:2]
    count = -(-T // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - T)] + [(0, 0)] * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(B, count, size, *x.shape[2:]), 1, 0)


def _cut_places(places: Places, size: int) -> Places:
    return Places(*(_cut(x, size) for x in places))


def _joined(x: Array, length: int) -> Array:
    """Undo `_cut`."""
    count, B, size = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(B, count * size, *x.shape[3:])[:, :length]


def _scaled(q: Array) -> Array:
    return q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)


def _by_head(x: Float[Array, "P B S K H"]) -> Float[Array, "P B K S H"]:
    """Make the keys of each head contiguous, or undo it."""
    return x.swapaxes(2, 3)


def _grouped(x: Float[Array, "P B T N H"], K: int) -> Float[Array, "P B K G*T H"]:
    """Stack the queries of each kv head along one axis."""
    P, B, T, N, H = x.shape
    return x.reshape(P, B, T, K, N // K, H).transpose(0, 1, 3, 4, 2, 5).reshape(P, B, K, -1, H)


def _ungrouped(x: Float[Array, "P B K G*T H"], T: int) -> Float[Array, "P B T N H"]:
    """Undo `_grouped`."""
    P, B, K, GT, H = x.shape
    return x.reshape(P, B, K, GT // T, T, H).transpose(0, 1, 4, 2, 3, 5).reshape(P, B, T, -1, H)


def _dot(a: Float[Array, "B K X Y"], b: Float[Array, "B K Y Z"]) -> Float[Array, "B K X Z"]:
    return jnp.einsum("BKXY,BKYZ->BKXZ", a, b, preferred_element_type=jnp.float32)


def _seen(queries: Places, keys: Places, window: int | None) -> Array:
    return visible(queries.segment_ids, keys.segment_ids, queries.positions, keys.positions, window)


def _masked(logits: Float[Array, "B K G*T S"], seen: Array) -> Float[Array, "B K G*T S"]:
    """Add MASKED where a key is not seen; with a select, XLA would store both branches in full."""
    B, K, GT, S = logits.shape
    T = seen.shape[1]
    mask = jnp.where(seen, 0.0, MASKED)[:, None, None]
    return (logits.reshape(B, K, GT // T, T, S) + mask).reshape(B, K, GT, S)
