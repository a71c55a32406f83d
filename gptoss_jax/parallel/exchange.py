"""Exchange of rows: send them to the shards that hold their experts, and send the results back.

For use inside `shard_map(..., check_vma=False)`, along one axis of X shards. Shard s holds the
experts [s * E_local, (s + 1) * E_local). A row goes once to each shard that has any of its experts,
so at most min(A, X) times. Rows for one shard are contiguous, and so are rows received from one
shard; they are in the order of shards and without gaps. The buffers are as large as the worst
routing needs. Nothing reads a buffer past its last row, so the rest may hold anything.

Backends with `jax.lax.ragged_all_to_all` send only these rows. The others pad the rows for each
shard to the greatest possible number, and put the received rows into the same order.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

Exchange = Literal["all_gather", "all_to_all"]

# The value of buffer entries without a row. Tests set it to NaN to show that nothing reads it.
EMPTY = 0.0


class Route(NamedTuple):
    """The rows that this shard sends, ordered by destination, in P = M * min(A, X) places."""

    rows: Int[Array, " P"]  # the row at each place; any row past the last place in use
    slots: Int[Array, "M A"]  # the place of a pair's row, if `first`
    first: Bool[Array, "M A"]  # whether the pair is the first of its row that needs that shard
    counts: Int[Array, "X X"]  # rows from shard i to shard j, the same on all shards


class Way(NamedTuple):
    """How rows are sent; all fields are static."""

    axis: str
    size: int  # rows of the buffer that receives
    most: int  # rows that one shard can send to another
    ragged: bool


def destinations(ids: Int[Array, "M A"], *, num_experts: int, shards: int) -> Int[Array, "M A"]:
    """Return the shard that each pair sends its row to, or `shards` if it sends nothing.

    A pair sends nothing if it was dropped (id E), or if an earlier pair of the row has the same
    shard.
    """
    shard = ids.astype(jnp.int32) // (num_experts // shards)
    again = jnp.any(jnp.tril(shard[:, :, None] == shard[:, None, :], -1), axis=2)
    return jnp.where(again, shards, shard)


def route(ids: Int[Array, "M A"], *, num_experts: int, axis: str) -> Route:
    """Plan where this shard's rows go; masked rows must have ids of E."""
    shards = lax.axis_size(axis)
    active = ids.shape[1]
    where = destinations(ids, num_experts=num_experts, shards=shards)
    iota = jnp.arange(ids.size, dtype=jnp.int32)
    in_order, order = lax.sort((where.reshape(-1), iota), num_keys=1, is_stable=True)
    slots = jnp.zeros_like(iota).at[order].set(iota, unique_indices=True).reshape(ids.shape)
    bounds = jnp.searchsorted(in_order, jnp.arange(shards + 1), method="compare_all")
    places = ids.shape[0] * min(active, shards)
    counts = lax.all_gather(jnp.diff(bounds).astype(jnp.int32), axis)
    return Route((order // active)[:places], slots, where < shards, counts)


@jax.custom_vjp
def spread(x: Float[Array, "M D"], route: Route) -> Float[Array, "P D"]:
    """Copy rows to the places from which they are sent; gradients are added in float32."""
    return x[route.rows]


def _spread_fwd(x: Array, route: Route) -> tuple[Array, Route]:
    return x[route.rows], route


def _spread_bwd(route: Route, d_places: Array) -> tuple[Array, None]:
    return _add_up(d_places, route).astype(d_places.dtype), None


spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def combine(places: Float[Array, "P D"], route: Route) -> Float[Array, "M D"]:
    """Sum the results that came back for each row, in float32; zeros for a row not sent."""
    return _add_up(places, route)


def _combine_fwd(places: Array, route: Route) -> tuple[Array, Any]:
    # Residuals have to be arrays, so an empty array carries the dtype.
    return _add_up(places, route), (places[:0], route)


def _combine_bwd(saved: Any, d_out: Array) -> tuple[Array, None]:
    like, route = saved
    used = jnp.arange(route.rows.shape[0]) < jnp.sum(route.first)
    return jnp.where(used[:, None], d_out[route.rows], 0).astype(like.dtype), None


combine.defvjp(_combine_fwd, _combine_bwd)


def _add_up(places: Array, route: Route) -> Array:
    total = jnp.zeros((route.slots.shape[0], places.shape[1]), jnp.float32)
    for a in range(route.slots.shape[1]):
        first = route.first[:, a]
        rows = places[jnp.where(first, route.slots[:, a], 0)]
        total += jnp.where(first[:, None], rows.astype(jnp.float32), 0)
    return total


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def send(rows: Float[Array, "P D"], counts: Int[Array, "X X"], way: Way) -> Float[Array, "R D"]:
    """Send each shard its rows, and return the rows received.

    `rows` has `counts[me, 0]` rows for shard 0, then those for shard 1, and so on. The result has
    `counts[0, me]` rows from shard 0, and so on. With `counts` transposed it sends rows back, which
    is also the gradient.
    """
    return _send(rows, counts, way)


def _send_fwd(rows: Array, counts: Array, way: Way) -> tuple[Array, Any]:
    return _send(rows, counts, way), (rows[:, :0], counts)


def _send_bwd(way: Way, saved: Any, d_received: Array) -> tuple[Array, None]:
    like, counts = saved
    return _send(d_received, counts.T, way._replace(size=like.shape[0])), None


send.defvjp(_send_fwd, _send_bwd)


def _send(rows: Array, counts: Array, way: Way) -> Array:
    me = lax.axis_index(way.axis)
    sent, received = counts[me], counts[:, me]
    starts = jnp.cumsum(sent) - sent
    if way.ragged:
        before_mine = (jnp.cumsum(counts, axis=0) - counts)[me]
        empty = jnp.full((way.size, rows.shape[1]), EMPTY, rows.dtype)
        return lax.ragged_all_to_all(
            rows, empty, starts, sent, before_mine, received, axis_name=way.axis
        )
    lane = jnp.arange(way.most)
    blocks = rows[jnp.minimum(starts[:, None] + lane, rows.shape[0] - 1)]
    blocks = jnp.where((lane < sent[:, None])[..., None], blocks, EMPTY)
    blocks = lax.all_to_all(blocks, way.axis, split_axis=0, concat_axis=0, tiled=True)
    ends = jnp.cumsum(received)
    place = jnp.arange(way.size)
    source = jnp.minimum(jnp.searchsorted(ends, place, side="right"), received.shape[0] - 1)
    lane = place - (ends - received)[source]
    result = blocks[source, jnp.minimum(lane, way.most - 1)]
    return jnp.where((place < ends[-1])[:, None], result, EMPTY)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(x: Float[Array, "M D"], axis: str) -> Float[Array, "R D"]:
    """Gather the rows of all shards; the gradient is summed over them in float32."""
    return lax.all_gather(x, axis, tiled=True)


def _gather_fwd(x: Array, axis: str) -> tuple[Array, Array]:
    return gather(x, axis), x[:0]


def _gather_bwd(axis: str, like: Array, d_all: Array) -> tuple[Array]:
    return (scatter(d_all, axis).astype(like.dtype),)


gather.defvjp(_gather_fwd, _gather_bwd)


def scatter(x: Float[Array, "R D"], axis: str) -> Float[Array, "M D"]:
    """Sum rows over shards in float32, and keep this shard's part.

    If input and output are bfloat16, XLA for TPUs sends bfloat16 and adds in float32 on the way.
    """
    return lax.psum_scatter(x.astype(jnp.float32), axis, scatter_dimension=0, tiled=True)


def rows_moved(
    ids: Int[Array, "M A"],
    mask: Bool[Array, " M"] | None = None,
    *,
    num_experts: int,
    shards: int,
    exchange: Exchange,
) -> Int[Array, "X X"]:
    """Count the rows that go from shard i to shard j in one direction of one exchange.

    Rows are split over the shards in order. Rows that stay on their shard do not count, nor does
    the padding that a backend without a ragged exchange sends.
    """
    others = ~jnp.eye(shards, dtype=bool)
    rows = ids.shape[0] // shards
    if exchange == "all_gather":
        return jnp.where(others, rows, 0)
    if mask is not None:
        ids = jnp.where(mask[:, None], ids, num_experts)
    where = destinations(ids, num_experts=num_experts, shards=shards)
    goes = jax.nn.one_hot(where.reshape(shards, -1), shards, dtype=jnp.int32)
    return jnp.where(others, jnp.sum(goes, axis=1), 0)


def receive_rows(rows_local: int, shards: int) -> int:
    """Return the rows of the receive buffer for the worst routing: all rows of all shards."""
    return rows_local * shards
