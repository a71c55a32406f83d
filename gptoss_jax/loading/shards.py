"""Fill leaves that are sharded over a mesh, piece by piece, so that each device gets its part only.

A host reads only the pieces that its own devices need a part of, and holds one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from gptoss_jax.types import MXFP4

Index = tuple[slice, ...]


@dataclass
class Shard:
    """One device's part of a leaf: its place in the whole leaf, and the values filled so far."""

    device: Any
    index: Any  # the structure of `leaf`, with an Index for each array
    leaf: Any


def empty(like: Any, shardings: Any) -> list[Shard]:
    """Make this host's shards of a leaf, filled with zeros; `like` has the shapes of its arrays."""
    arrays, tree = jax.tree.flatten(like)
    spreads = jax.tree.leaves(shardings)
    maps = [
        s.addressable_devices_indices_map(x.shape) for x, s in zip(arrays, spreads, strict=True)
    ]
    shards = []
    for device in maps[0]:
        index = [_whole(m[device], x.shape) for m, x in zip(maps, arrays, strict=True)]
        zeros = [
            jnp.zeros([part.stop - part.start for part in where], x.dtype, device=device)
            for where, x in zip(index, arrays, strict=True)
        ]
        shards.append(Shard(device, tree.unflatten(index), tree.unflatten(zeros)))
    return shards


def join(shards: list[Shard], like: Any, shardings: Any) -> Any:
    """Join the shards of all hosts into one leaf."""

    def one(x: Any, sharding: Any, *parts: Any) -> Any:
        return jax.make_array_from_single_device_arrays(x.shape, sharding, list(parts))

    return jax.tree.map(one, like, shardings, *(shard.leaf for shard in shards))


def put(
    shards: list[Shard],
    read: Callable[..., Any],
    rows: range,
    *,
    layer: int | None,
    relay: Callable[[MXFP4], Any] | None,
) -> bool:
    """Write rows of a leaf (or of one layer of it) into the shards that have a part of them.

    `read(rows=)` is called only if there is such a shard. Returns whether all written values are
    finite.
    """
    lead = 0 if layer is None else 1
    wanted = [shard for shard in shards if _common(_first(shard, lead), rows)]
    if not wanted:
        return True
    piece = jax.tree.map(np.asarray, read(rows=rows))
    all_finite = True
    for shard in wanted:
        first = _first(shard, lead)
        common = _common(first, rows)
        ours = slice(common.start - rows.start, common.stop - rows.start)
        index = _like(piece, shard.index)
        part = jax.tree.map(lambda x, i, at=(ours,): x[(*at, *i[lead + 1 :])], piece, index)
        if relay is not None:
            part = relay(jax.tree.map(jnp.asarray, part))
        part = jax.device_put(part, shard.device)
        at = (*((layer,) if lead else ()), common.start - first.start)
        shard.leaf, finite = write(shard.leaf, part, at)
        all_finite &= bool(finite)  # waits, so that pieces do not pile up
    return all_finite


def _first(shard: Shard, lead: int) -> slice:
    return next(_indices(shard.index))[lead]


def _like(piece: Any, index: Any) -> Any:
    """Return the piece's structure, with the index of the matching field for each array.

    If the leaf is relaid, it shares only the first axes with the piece, and only these are split.
    """
    if jax.tree.structure(piece) == jax.tree.structure(index, is_leaf=_is_index):
        return index
    first = next(_indices(index))[:2]
    return jax.tree.map(lambda _: first, piece)


def _indices(index: Any) -> Iterator[Index]:
    yield from jax.tree.leaves(index, is_leaf=_is_index)


def _is_index(x: Any) -> bool:
    return isinstance(x, tuple) and bool(x) and isinstance(x[0], slice)


def _common(a: slice, b: range) -> range:
    return range(max(a.start, b.start), min(a.stop, b.stop))


def _whole(index: Index, shape: tuple[int, ...]) -> Index:
    return tuple(slice(*part.indices(n)[:2]) for part, n in zip(index, shape, strict=True))


@partial(jax.jit, donate_argnums=0)
def write(leaf: Any, piece: Any, at: tuple[int, ...]) -> tuple[Any, jax.Array]:
    """Write a piece into a leaf in place, at leading indices `at`; return whether it is finite."""
    finite = jnp.array(True)

    def put(whole: jax.Array, rows: jax.Array) -> jax.Array:
        nonlocal finite
        rows = rows.astype(whole.dtype)
        if jnp.issubdtype(rows.dtype, jnp.floating) and rows.dtype.itemsize > 1:
            finite &= jnp.isfinite(rows).all()
        rows = rows.reshape((1,) * (whole.ndim - rows.ndim) + rows.shape)
        start = (*at, *(0,) * (whole.ndim - len(at)))
        return lax.dynamic_update_slice(whole, rows, start)

    return jax.tree.map(put, leaf, piece), finite
