"""Attention in plain XLA, by blocks of queries: O(T W) in banded layers, memory linear in T."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.reference import MASKED, visible

# Limit for the logits of one block of queries, in float32 elements (128 MiB).
MAX_LOGITS = 1 << 25
# Blocks of queries in a full layer: block i attends only to the keys of blocks 0 to i.
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


def _banded(q, k, v, sinks, *, window, segment_ids, positions) -> Any:
    """Cut the row into chunks of `window`; queries attend to their own chunk and the one before."""
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
    where = Places(
        flat(segments), flat(with_previous(segments)), flat(places), flat(with_previous(places))
    )
    keys, values = flat(with_previous(chunks(k))), flat(with_previous(chunks(v)))
    out: Any = _attend(window, flat(chunks(q)), keys, values, sinks, where)
    return out.reshape(B, C * window, N, H)[:, :T]


def _full(q, k, v, sinks, *, window, segment_ids, positions) -> Any:
    """Cut the queries into blocks; each block attends to the keys up to its own end."""
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
    """Attend to keys in any order, as in a key/value cache; see `attention`."""
    return _in_blocks(q, k, v, sinks, window=window, segments=segments, positions=positions)


def _in_blocks(q, k, v, sinks, *, window, segments, positions) -> Any:
    """Attend in blocks of queries that are small enough for `MAX_LOGITS`."""
    B, T, N, H = q.shape
    S = k.shape[1]
    block = max(1, MAX_LOGITS // (B * N * S))

    def one(q, segment, position):
        where = Places(segment, segments[1], position, positions[1])
        return _attend(window, q, k, v, sinks, where)

    if block >= T:
        return one(q, segments[0], positions[0])
    C = -(-T // block)

    def chunks(x):
        x = jnp.pad(x, [(0, 0), (0, C * block - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, C, block, *x.shape[2:]), 1, 0)

    out = jax.lax.map(lambda row: one(*row), (chunks(q), chunks(segments[0]), chunks(positions[0])))
    return jnp.moveaxis(out, 0, 1).reshape(B, C * block, N, H)[:, :T]


class Places(NamedTuple):
    """Segments and positions, which decide which keys a query sees; see `reference.visible`."""

    q_segments: Int[Array, "B T"]
    k_segments: Int[Array, "B S"]
    q_positions: Int[Array, "B T"]
    k_positions: Int[Array, "B S"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int | None, q: Array, k: Array, v: Array, sinks: Any, where: Places) -> Any:
    """Attend with all logits in memory at once; the backward pass forms them again.

    All big products contract the last axis of one operand with the first of the other. In this form
    XLA on a CPU need not transpose [G T, S] arrays first; see `_attend_bwd`.
    """
    return _attend_fwd(window, q, k, v, sinks, where)[0]


def _grouped(x: Float[Array, "B T N H"], K: int) -> Float[Array, "B K G*T H"]:
    """Stack the queries of each kv head along one axis."""
    B, T, N, H = x.shape
    return x.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _ungrouped(x: Float[Array, "B K G*T H"], T: int) -> Float[Array, "B T N H"]:
    """Undo `_grouped`."""
    B, K, GT, H = x.shape
    return x.reshape(B, K, GT // T, T, H).transpose(0, 3, 1, 2, 4).reshape(B, T, -1, H)


def _dot(a: Float[Array, "B K X Y"], b: Float[Array, "B K Y Z"]) -> Float[Array, "B K X Z"]:
    return jnp.einsum("BKXY,BKYZ->BKXZ", a, b, preferred_element_type=jnp.float32)


def _masked_logits(window: int | None, q: Array, k: Array, where: Places) -> Array:
    """Return logits [B, K, G*T, S] of scaled, grouped queries; keys not seen get `MASKED`.

    The mask is added: with a select, XLA would store both branches in full.
    """
    B, K, GT, _ = q.shape
    T, S = where.q_positions.shape[1], k.shape[1]
    mask = jnp.where(visible(*where, window), 0.0, MASKED)[:, None, None]
    logits = _dot(q, k.transpose(0, 2, 3, 1)).reshape(B, K, GT // T, T, S)
    return (logits + mask).reshape(B, K, GT, S)


def _scaled(q: Array, K: int) -> Array:
    return _grouped(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), K)


def _sink_column(sinks: Array, K: int, T: int) -> Array:
    """Return the sinks in the layout of the grouped queries: [1, K, G*T, 1], float32."""
    return jnp.repeat(sinks.astype(jnp.float32).reshape(K, -1), T, axis=1)[None, :, :, None]


def _attend_fwd(window: int | None, q: Array, k: Array, v: Array, sinks: Any, where: Places) -> Any:
    T, K = q.shape[1], k.shape[2]
    logits = _masked_logits(window, _scaled(q, K), k, where)
    # The maximum stays above MASKED, so that a row that sees nothing has weights of zero.
    largest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), MASKED / 10)
    if sinks is not None:
        largest = jnp.maximum(largest, _sink_column(sinks, K, T))
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is not None:
        total += jnp.exp(_sink_column(sinks, K, T) - largest)
    total = jnp.maximum(total, 1e-30)
    out = _dot(weights.astype(v.dtype), v.transpose(0, 2, 1, 3)) / total
    out = _ungrouped(out, T).astype(q.dtype)
    return out, (q, k, v, sinks, where, out, largest + jnp.log(total))


def _attend_bwd(window: int | None, saved: Any, d_out: Array) -> tuple[Any, ...]:
    """Differentiate: with p the softmax, dlogits = p * (do v^T - rowsum(do * o)).

    A sink has dlogit = -p_sink * rowsum(do * o), summed over the rows of its head in float32. The
    gradients of k and v are formed transposed, so that no [G T, S] array has to be transposed.
    """
    q, k, v, sinks, where, out, logsumexp = saved
    B, T, N, H = q.shape
    K = k.shape[2]
    scaled = _scaled(q, K)
    p = jnp.exp(_masked_logits(window, scaled, k, where) - logsumexp)
    do = _grouped(d_out, K)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    delta = _grouped(delta, K)
    ds = (p * (_dot(do, v.transpose(0, 2, 3, 1)) - delta)).astype(q.dtype)
    dq = _ungrouped(_dot(ds, k.transpose(0, 2, 1, 3)) * H**-0.5, T)
    dk = _dot(scaled.transpose(0, 1, 3, 2), ds).transpose(0, 3, 1, 2)
    dv = _dot(do.transpose(0, 1, 3, 2), p.astype(do.dtype)).transpose(0, 3, 1, 2)
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(_sink_column(sinks, K, T) - logsumexp) * delta
        d_sinks = -jnp.sum(share.reshape(B, N, T), axis=(0, 2)).astype(sinks.dtype)
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), d_sinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)
