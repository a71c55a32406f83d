"""Attention with sinks for Hopper, forward and backward, by kernels of Pallas' Mosaic GPU backend.

A tile of queries runs an online softmax over blocks of keys, from the first key that any of its
queries sees (by window and segment) to the causal end. Other blocks are not loaded, so a banded
layer costs O(T W), and a packed row costs the sum over its segments. The softmax starts from the
sink, a logit without a value. The backward pass keeps the output and the logsumexp, which includes
the sink.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention import pallas_gpu_kernels as kernels
from gptoss_jax.ops.attention.pallas_gpu_kernels import Band, Blocks, Task

LANES = 64  # head dims are padded to a multiple of this: 128 bytes, the widest swizzle
MAX_HEAD_DIM = 128  # the accumulators of a wider head leave too few registers


class Plan(NamedTuple):
    """The tiles of the three kernels."""

    forward: Blocks
    queries: Blocks
    keys: Blocks


# By chip, by whether the band is narrow (wide tiles of keys waste work at its edges), and by head
# dim. All fit in 227 KiB of shared memory and, without spills, 240 registers per thread.
_PLANS = {
    ("narrow", 64): Plan(
        forward=Blocks(64, 64, 3, in_turn=True),
        queries=Blocks(64, 64, 3, in_turn=True),
        keys=Blocks(64, 64, 3),
    ),
    ("wide", 64): Plan(
        forward=Blocks(64, 128, 3, alternate=True),
        queries=Blocks(64, 64, 3),
        keys=Blocks(64, 64, 3),
    ),
    ("narrow", 128): Plan(
        forward=Blocks(64, 64, 3, in_turn=True),
        queries=Blocks(64, 64, 2, in_turn=True),
        keys=Blocks(32, 64, 3),
    ),
    ("wide", 128): Plan(
        forward=Blocks(64, 128, 2, alternate=True),
        queries=Blocks(64, 64, 3),
        keys=Blocks(32, 64, 3),
    ),
}
BLOCKS: dict[str, dict[tuple[str, int], Plan]] = dict.fromkeys(chips.HOPPER, _PLANS)
NARROW = 512  # the widest window that counts as narrow


def refuse(
    q: Any, k: Any, v: Any, sinks: Any, *, window: int | None, segment_ids: Any, positions: Any
) -> str | None:
    """Return why the kernels can't take these arguments here, or None."""
    reason = chips.refuse_hopper_kernel()
    if reason is not None:
        return reason
    dtypes = {str(x.dtype) for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes.isdisjoint(("bfloat16", "float16")):
        return (
            f"it takes bfloat16 or float16, the same for all, and got {', '.join(sorted(dtypes))}"
        )
    if q.shape[-1] > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, and got {q.shape[-1]}"
    if q.shape[1] != k.shape[1]:
        return f"it is for self-attention, and got {q.shape[1]} queries and {k.shape[1]} keys"
    return None


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
    """Attend over rows whose index order is their causal order; see `attention`.

    Operands are bfloat16 or float16; the softmax and all sums are float32. Positions are not read:
    they rise by one in a segment, so distances are differences of indices. Rows of padding give
    zeros, and their cotangents are not read.
    """
    T, H = q.shape[1], q.shape[-1]
    width = "narrow" if window is not None and window <= NARROW else "wide"
    plan = BLOCKS[chips.current().kind][width, H + -H % LANES]
    extra = -T % _multiple(plan)
    heads = [(0, 0), (0, extra), (0, 0), (0, -H % LANES)]
    q, k, v = (jnp.pad(x, heads) for x in (q, k, v))
    segment_ids = jnp.pad(segment_ids, [(0, 0), (0, extra)])
    static = _Static(H**-0.5, window, plan, chips.gpu_interpreter())
    out: Any = _attend(static, q, k, v, sinks, segment_ids)
    return out[:, :T, :, :H]


class _Static(NamedTuple):
    scale: float
    window: int | None
    plan: Plan
    interpreter: Any

    def task(self, blocks: Blocks) -> Task:
        return Task(self.scale, blocks, self.interpreter)


def _multiple(plan: Plan) -> int:
    """Return the least multiple for the length; two warpgroups share the rows of a tile."""
    forward, queries, keys = plan
    over_keys = [rows for tiles in (forward, queries) for rows in (2 * tiles.queries, tiles.keys)]
    return math.lcm(*over_keys, keys.queries, 2 * keys.keys)


def _band(window: int | None, segments: Int[Array, "B T"]) -> Band:
    """Return, as ranges of indices, which keys each query sees and which queries see each key."""
    T = segments.shape[1]
    index = jnp.arange(T, dtype=jnp.int32)
    edge = jnp.ones_like(segments[:, :1], bool)
    changes = segments[:, 1:] != segments[:, :-1]
    begins = jnp.where(jnp.concatenate([edge, changes], axis=1), index, 0)
    ends = jnp.where(jnp.concatenate([changes, edge], axis=1), index, T)
    low = jax.lax.cummax(begins, axis=1)
    high = jax.lax.cummin(ends, axis=1, reverse=True)
    if window is not None:
        low, high = jnp.maximum(low, index - window + 1), jnp.minimum(high, index + window - 1)
    padding = segments == 0
    return Band(jnp.where(padding, T, low), jnp.where(padding, -1, high))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, q: Array, k: Array, v: Array, sinks: Any, segments: Array) -> Array:
    return _attend_fwd(static, q, k, v, sinks, segments)[0]


def _attend_fwd(
    static: _Static, q: Array, k: Array, v: Array, sinks: Any, segments: Array
) -> tuple[Array, tuple]:
    wide = None if sinks is None else sinks.astype(jnp.float32)
    band = _band(static.window, segments)
    out, lse = kernels.forward(q, k, v, wide, band, static.task(static.plan.forward))
    return out, (q, k, v, sinks, segments, out, lse)


def _attend_bwd(static: _Static, saved: tuple, d_out: Array) -> tuple[Any, ...]:
    """Differentiate; the gradient of a sink is -rowsum(do * o) times its share of the softmax."""
    q, k, v, sinks, segments, out, lse = saved
    d_out = jnp.where((segments != 0)[:, :, None, None], d_out, 0)
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    delta = delta.transpose(0, 2, 1)
    args = (q, k, v, d_out, lse, delta, _band(static.window, segments))
    dq = kernels.backward_queries(*args, static.task(static.plan.queries))
    dk, dv = kernels.backward_keys(*args, static.task(static.plan.keys))
    d_sinks = None
    if sinks is not None:
        share = jnp.exp(sinks.astype(jnp.float32)[None, :, None] - lse)
        d_sinks = -jnp.sum(share * delta, axis=(0, 2)).astype(sinks.dtype)
    return dq, dk, dv, d_sinks, None


_attend.defvjp(_attend_fwd, _attend_bwd)
