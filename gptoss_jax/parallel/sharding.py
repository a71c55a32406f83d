"""How arrays are spread over the mesh: parameters, optimizer state, cache, batch.

The table of parameters (`parameters/table.py`) says over which mesh axes each axis of a parameter
is split. What an op needs whole along `fsdp` (and the axes that FSDP goes over besides, see
`table.DENSE`) is gathered where it is used, a layer at a time, and its gradient is summed and
scattered again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parallel import heads
from gptoss_jax.parallel.mesh import ROWS, current
from gptoss_jax.parameters import table
from gptoss_jax.parameters.table import EXPERT, Axis
from gptoss_jax.parameters.tree import path_name
from gptoss_jax.types import MXFP4_BLOCK, Batch, KVCache

HEADS = "tensor"
VOCABULARY = table.row("unembedding/weight").mesh_axes[0]
_PACKED = ("blocks", "scales")  # of MXFP4: an axis of blocks, and one of their bytes, at the end
_RELAID = ("codes", "scales")


def spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Return how an array is spread, by what its path speaks of (`table.place`).

    A moment with other axes than its parameter (Adafactor's rows and columns) is split over layers
    and experts alone; a number or a short vector that belongs to no parameter not at all.

    Raises:
        ValueError: a path that the table does not know.
        UserError: an axis that the mesh does not divide.
    """
    place = table.place_in_state(path, len(shape))
    if place is None:
        return PartitionSpec()
    axes, rest = place.mesh_axes, place.rest
    if path in (place.path, f"params/{place.path}") and len(shape) != len(axes):
        raise ValueError(f"{path} has {len(shape)} axes, and the table of parameters {len(axes)}")
    if rest in _PACKED and len(shape) in (len(axes), len(axes) + 1):
        axes = (*axes, None)[: len(shape)]
    elif rest in (*_PACKED, *_RELAID) or len(shape) != len(axes):
        axes = (None, "expert") if "E" in place.row.lead and len(shape) > 1 else ()
    kv = place.letters.find("K")
    if 0 <= kv < len(axes) == len(shape) and shape[kv] % mesh.shape["tensor"]:
        axes = (*axes[:kv], None, *axes[kv + 1 :])  # with fewer kv heads than shards: whole
    if rest in ("", *_PACKED, *_RELAID):
        _check(path, shape, axes, mesh)
    else:  # Adafactor's; what it does not need is one zero
        axes = tuple(
            axis if n % _parts(axis, mesh) == 0 else None
            for axis, n in zip(axes, shape, strict=False)
        )
    return PartitionSpec(*axes)


def _parts(axis: Axis, mesh: Any) -> int:
    """Return in how many parts an axis is split."""
    names = () if axis is None else (axis,) if isinstance(axis, str) else axis
    return math.prod(mesh.shape[name] for name in names)


def _check(path: str, shape: tuple[int, ...], axes: tuple[Axis, ...], mesh: Any) -> None:
    for i, axis in enumerate(axes):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        if shape[i] % _parts(axis, mesh):
            on = " x ".join(f"{name} {mesh.shape[name]}" for name in names if mesh.shape[name] > 1)
            raise UserError(
                f"mesh: axis {i} of {path}, of {shape[i]}, can't be split over {on}: choose sizes "
                f"whose product divides {shape[i]}"
            )


def specs(tree: Any, mesh: Any) -> Any:
    """Return the `spec` of each array of a tree: parameters, or a state that holds some."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: spec(path_name(path), x.shape, mesh), tree
    )


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the sharding of each array of a tree, see `spec`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        specs(tree, mesh),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def place(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Give the shapes of a tree the shardings of the table."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def padded(config: ModelConfig) -> ModelConfig:
    """Return a model's config with `expert_padding` as the current mesh needs it.

    The hidden dimension of packed experts, or of those that compute as if they were (`qat`), is
    filled up so that each shard along `tensor` has whole blocks (90 of them divide by neither 4 nor
    8), and FSDP can split its rows. Zero rows and blocks change no result, and their gradients are
    zero.
    """
    mesh = current()
    padding = 0
    if mesh is not None:
        try:
            heads.check(config.num_heads, config.num_kv_heads, mesh.shape["tensor"])
        except ValueError as error:
            raise UserError(str(error)) from None
    if mesh is not None and (config.experts == "mxfp4" or config.qat):
        whole = math.lcm(MXFP4_BLOCK, math.prod(mesh.shape[axis] for axis in EXPERT))
        padding = -config.d_expert % (mesh.shape["tensor"] * whole)
    return dataclasses.replace(config, expert_padding=padding)


def check_layout(mesh: Any) -> None:
    """Refuse a mesh that splits more of packed experts than a relaid one can be split by."""
    axes = [axis for axis in ("tensor", *EXPERT) if mesh.shape[axis] > 1]
    if axes:
        raise UserError(
            f"experts in a kernel's layout can be spread over mesh.expert alone, and the mesh has "
            f"{', '.join(axes)}: load them without layout="
        )


def batch_spec(x: Any) -> PartitionSpec:
    """Return how an array of a batch is spread: [B, T], or [B]."""
    return PartitionSpec(ROWS, "context") if x.ndim > 1 else PartitionSpec(ROWS)


def batch_shardings(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Return the shardings of a batch's arrays."""
    shared = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), batch.shared)
    batch = batch.replace(shared=None)  # type: ignore[attr-defined]
    batch = jax.tree.map(lambda x: NamedSharding(mesh, batch_spec(x)), batch)
    return batch.replace(shared=shared)  # type: ignore[attr-defined]


def cache_spec(x: Any, mesh: Any) -> PartitionSpec:
    """Return how an array of a cache is spread: keys and values [B, S, K, H], positions [B, S]."""
    if x.ndim == 2:
        return PartitionSpec(ROWS, None)
    split = x.shape[2] % mesh.shape["tensor"] == 0
    return PartitionSpec(ROWS, None, HEADS if split else None, None)


def constrain_cache(cache: KVCache) -> KVCache:
    """Say that a cache is spread as `cache_spec` says."""
    mesh = current()
    if mesh is None:
        return cache
    return jax.tree.map(lambda x: constrain(x, *cache_spec(x, mesh)), cache)


def check_batch(rows: int, length: int, mesh: Any) -> None:
    """Refuse a batch that the mesh does not divide. Raises UserError."""
    parts = math.prod(mesh.shape[axis] for axis in ROWS)
    if rows % parts:
        raise UserError(
            f"data.batch_size over optimizer.accumulate is {rows}, and the mesh spreads rows over "
            f"{parts} devices (data x fsdp x expert): make it a multiple of {parts}"
        )
    chunks = 2 * mesh.shape["context"]
    if chunks > 2 and length % chunks:
        raise UserError(
            f"data.sequence_length is {length}: with mesh.context {chunks // 2} it has to be a "
            f"multiple of {chunks}"
        )


def constrain(x: Any, *axes: Axis) -> Any:
    """Say how an array under jit is spread over the current mesh; without a mesh, nothing."""
    if current() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def constrain_tree(tree: Any) -> Any:
    """Say that arrays of a tree of parameters, or of a state, are spread by the table."""
    mesh = current()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, specs(tree, mesh))


def replicate(tree: Any) -> Any:
    """Say that arrays under jit are whole on every device of the current mesh."""
    return jax.tree.map(constrain, tree)


def microbatches(x: Any) -> Any:
    """Say that an array [microbatches, B, T] or [microbatches, B] is spread as a batch is."""
    return constrain(x, None, ROWS, *(("context",) if x.ndim > 2 else ()))


def tokens(x: Any) -> Any:
    """Say that an array [B, T, ...] is spread as a batch is."""
    return constrain(x, ROWS, "context", *(None,) * (x.ndim - 2))


def rows(x: Any) -> Any:
    """Say that the rows of an array [B, T, ...] are spread as a batch's, and its tokens are not."""
    return constrain(x, ROWS, *(None,) * (x.ndim - 1))


def each_token(f: Callable[[Any], Any], x: Any, *, whole_rows: bool = False) -> Any:
    """Run `f` on each device's tokens of an array [B, T, ...]: for what XLA would gather it for.

    With `whole_rows` tokens are not split over `context`, as in decoding.
    """
    if current() is None:
        return f(x)
    where = PartitionSpec(ROWS, None if whole_rows else "context")
    return jax.shard_map(f, in_specs=where, out_specs=where, check_vma=False)(x)


def gathered(path: str, weight: Any) -> Any:
    """Gather a layer's weight, under its path, over the axes that FSDP splits it by."""
    mesh = current()
    if mesh is None:
        return weight
    kept = [
        HEADS if axis == HEADS and size % mesh.shape[HEADS] == 0 else None
        for axis, size in zip(table.row(path).mesh_axes, weight.shape, strict=True)
    ]
    return constrain(weight, *kept)
