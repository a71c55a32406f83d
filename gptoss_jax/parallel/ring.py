"""Ring attention: the keys of rows that are sharded over `context` are passed round the shards.

The tokens of a row are in the balanced order (see `context.balance`): a shard has an early chunk
`lo` and a late chunk `hi`. First a shard attends to its own keys. Then the keys of the other shards
arrive one by one. Its two chunks of queries and two chunks of such keys make four pairs, of which
causal attention always needs exactly two. The queries `hi` always see the other shard's `lo`. In
addition `lo` sees `lo` if the keys come from an earlier shard, or `hi` sees `hi` if they come from
a later one. So at every step all shards do the same work, half of the four pairs.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention.sink_algebra import with_sink
from gptoss_jax.ops.attention.split import merge
from gptoss_jax.ops.dispatch import choose
from gptoss_jax.parallel import blocks
from gptoss_jax.parallel.blocks import Places

# Implementations of attention to a part of the keys.
ORDER = {"tpu": ("pallas_tpu", "xla"), "gpu": ("xla",), "cpu": ("xla",)}
AXIS = "context"
LO, HI = 0, 1
PAIRS = 2  # pairs of chunks at every step but the first


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend over a shard's tokens, inside a `shard_map`; see `context.attention`.

    The backward pass keeps q, k, v, the output and its logsumexp. It passes k and v round once
    more, together with their gradients.
    """
    parts = _parts(q, k, v, window)
    forward, backward = (functools.partial(f, parts, window) for f in (_forward, _backward))
    return with_sink(forward, backward)(q, k, v, sinks, Places(segment_ids, positions))


def _parts(q: Any, k: Any, v: Any, window: int | None) -> Any:
    """Return the module whose `forward` and `backward` attend to a part of the keys."""

    def refuse(name: str) -> str | None:
        return None if name == "xla" else _kernel().refuse(q, k, v, window=window)

    name = choose("ring attention", None, order=ORDER, refuse=refuse)
    return blocks if name == "xla" else _kernel()


def _kernel() -> Any:
    from gptoss_jax.parallel import ring_tpu  # kernels take long to import

    return ring_tpu


class Keys(NamedTuple):
    """A shard's keys and values, `lo` and `hi`, which are passed round the ring."""

    k: Float[Array, "2 B L K H"]
    v: Float[Array, "2 B L K H"]
    places: Places


def _forward(
    parts: Any, window: int | None, q: Any, k: Any, v: Any, places: Places
) -> tuple[Any, Any]:
    """Attend without sinks; return output and logsumexp in float32."""
    keys = Keys(_halves(k), _halves(v), _half_places(places))
    following = _pass_on(keys)  # transferred while the shard attends to its own keys
    own = parts.forward(q, k, v, window=window, queries=places, keys=places, own=True)
    queries = (_halves(q), _half_places(places))

    def step(number, carry):
        keys, *so_far = carry
        following = _pass_on(keys)

        def meet(pair, so_far):
            mine, theirs = _pair(number, pair)
            q, where = _half(queries, mine)
            k, v, there = _half(keys, theirs)
            part = parts.forward(q, k, v, window=window, queries=where, keys=there, own=False)
            both = zip(_half(so_far, mine), part, strict=True)
            merged = merge(*(jnp.stack(x) for x in both))
            return [x.at[mine].set(new) for x, new in zip(so_far, merged, strict=True)]

        return following, *jax.lax.fori_loop(0, PAIRS, meet, so_far)

    start = (following, *(_halves(x) for x in own))
    _, out, lse = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, start)
    return _whole(out), _whole(lse)


def _backward(
    parts: Any,
    window: int | None,
    q: Any,
    k: Any,
    v: Any,
    places: Places,
    out: Any,
    lse: Any,
    d_out: Any,
) -> tuple[Any, Any, Any]:
    """Return dq, dk and dv; `out` and `lse` are those of the whole softmax, sink included."""
    keys = Keys(_halves(k), _halves(v), _half_places(places))
    following = _pass_on(keys)
    dq, *d_keys = parts.backward(
        q, k, v, d_out, out=out, lse=lse, window=window, queries=places, keys=places, own=True
    )
    rows = tuple(_halves(x) for x in (q, d_out, out, lse))
    queries = (rows, _half_places(places))

    def step(number, carry):
        keys, d_keys, dq = carry
        # The gradients computed here are added to those that arrive meanwhile.
        following, arriving = _pass_on(keys), _pass_on(d_keys)

        def meet(pair, gradients):
            mine, theirs = _pair(number, pair)
            (q, d_out, out, lse), where = _half(queries, mine)
            k, v, there = _half(keys, theirs)
            more = parts.backward(
                q, k, v, d_out, out=out, lse=lse, window=window, queries=where, keys=there,
                own=False,
            )  # fmt: skip
            halves = (mine, theirs, theirs)
            return [x.at[i].add(y) for x, i, y in zip(gradients, halves, more, strict=True)]

        zeros = [jnp.zeros_like(x) for x in d_keys]
        dq, *more = jax.lax.fori_loop(0, PAIRS, meet, [dq, *zeros])
        return following, [x + y for x, y in zip(arriving, more, strict=True)], dq

    start = (following, [_halves(x) for x in d_keys], _halves(dq))
    _, d_keys, dq = jax.lax.fori_loop(1, jax.lax.axis_size(AXIS), step, start)
    dk, dv = (_whole(x) for x in _pass_on(d_keys))  # back to their own shard
    return _whole(dq).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)


def _pair(number: Any, pair: Any) -> tuple[Any, Any]:
    """Return the halves of queries and keys in pair 0 or 1 of step `number`; steps count from 1.

    The keys come from the shard that is `number` places before this one on the ring.
    """
    later = (jax.lax.axis_index(AXIS) < number).astype(jnp.int32)
    return jnp.where(pair == 0, HI, later), jnp.where(pair == 0, LO, later)


def _pass_on(x: Any) -> Any:
    """Send a pytree to the next shard, and return the pytree of the shard before."""
    C = jax.lax.axis_size(AXIS)
    return jax.lax.ppermute(x, AXIS, [(i, (i + 1) % C) for i in range(C)])


def _half(tree: Any, which: Any) -> Any:
    return jax.tree.map(lambda x: x[which], tree)


def _halves(x: Array) -> Array:
    """Cut [B, T, ...] into [2, B, T/2, ...]."""
    B, T = x.shape[:2]
    return jnp.moveaxis(x.reshape(B, 2, T // 2, *x.shape[2:]), 1, 0)


def _half_places(places: Places) -> Places:
    return Places(*(_halves(x) for x in places))


def _whole(x: Array) -> Array:
    """Undo `_halves`."""
    _, B, L = x.shape[:3]
    return jnp.moveaxis(x, 0, 1).reshape(B, 2 * L, *x.shape[3:])
