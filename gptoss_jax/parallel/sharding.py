"""How arrays are sharded over the mesh: parameters, optimizer state, key/value cache, batch.

The table of parameters (`parameters/table.py`) says over which mesh axes each axis of a parameter
is split. FSDP splits over `fsdp` and the other axes in `table.DENSE`. If an op needs a parameter
whole along these axes, it is gathered where it is used, one layer at a time, and its gradient is
summed and scattered again.
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
_PACKED = ("blocks", "scales")  # of MXFP4; they end in an axis of blocks (and one of bytes)
_RELAID = ("codes", "scales")


def spec(path: str, shape: tuple[int, ...], mesh: Any) -> PartitionSpec:
    """Return the sharding of an array, according to the parameter in its path (`table.place`).

    An optimizer moment whose axes differ from its parameter's (Adafactor's rows and columns) is
    split only over layers and experts. A number or a short vector that belongs to no parameter is
    not split.

    Raises:
        ValueError: The table does not know the path.
        UserError: The mesh does not divide an axis.
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
        axes = (*axes[:kv], None, *axes[kv + 1 :])  # not split, with fewer kv heads than shards
    if rest in ("", *_PACKED, *_RELAID):
        _check(path, shape, axes, mesh)
    else:  # a moment of Adafactor, which is a single zero where Adafactor does not need it
        axes = tuple(
            axis if n % _parts(axis, mesh) == 0 else None
            for axis, n in zip(axes, shape, strict=False)
        )
    return PartitionSpec(*axes)


def _parts(axis: Axis, mesh: Any) -> int:
    """Return the number of parts that an axis is split into."""
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
    """Return the `spec` of each array in a tree of parameters, or in a state that holds some."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: spec(path_name(path), x.shape, mesh), tree
    )


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the `NamedSharding` of each array in a tree; see `spec`."""
    return jax.tree.map(
        lambda s: NamedSharding(mesh, s),
        specs(tree, mesh),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def place(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return the shapes of a tree with the shardings of the table."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings(tree, mesh)
    )


def padded(config: ModelConfig) -> ModelConfig:
    """Return a model's config with the `expert_padding` that the current mesh needs.

    The hidden dimension of experts that are packed, or computed as if packed (`qat`), is padded.
    Then each shard along `tensor` has whole blocks (there are 90 blocks, which neither 4 nor 8
    divides), and FSDP can split the rows. Zero rows and blocks change no result, and their
    gradients are zero.
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
    """Refuse a mesh that splits packed experts along axes that can't split a relaid weight."""
    axes = [axis for axis in ("tensor", *EXPERT) if mesh.shape[axis] > 1]
    if axes:
        raise UserError(
            f"experts in a kernel's layout can be split over mesh.expert only, and the mesh has "
            f"{', '.join(axes)}: load them without layout="
        )


def batch_spec(x: Any) -> PartitionSpec:
    """Return the sharding of an array of a batch, [B, T] or [B]."""
    return PartitionSpec(ROWS, "context") if x.ndim > 1 else PartitionSpec(ROWS)


def batch_shardings(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Return the shardings of a batch's arrays."""
    shared = jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), batch.shared)
    batch = batch.replace(shared=None)  # type: ignore[attr-defined]
    batch = jax.tree.map(lambda x: NamedSharding(mesh, batch_spec(x)), batch)
    return batch.replace(shared=shared)  # type: ignore[attr-defined]


def cache_spec(x: Any, mesh: Any) -> PartitionSpec:
    """Return the sharding of a cache's array: keys or values [B, S, K, H], or positions [B, S]."""
    if x.ndim == 2:
        return PartitionSpec(ROWS, None)
    split = x.shape[2] % mesh.shape["tensor"] == 0
    return PartitionSpec(ROWS, None, HEADS if split else None, None)


def constrain_cache(cache: KVCache) -> KVCache:
    """Constrain a key/value cache to the shardings of `cache_spec`."""
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
    """Constrain the sharding of an array under jit; without a mesh, return the array unchanged."""
    if current() is None:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def constrain_tree(tree: Any) -> Any:
    """Constrain a tree of parameters, or a state, to the shardings of the table."""
    mesh = current()
    return tree if mesh is None else jax.lax.with_sharding_constraint(tree, specs(tree, mesh))


def replicate(tree: Any) -> Any:
    """Constrain arrays under jit to be whole on every device of the current mesh."""
    return jax.tree.map(constrain, tree)


def microbatches(x: Any) -> Any:
    """Constrain an array [microbatches, B, T] or [microbatches, B] to be sharded like a batch."""
    return constrain(x, None, ROWS, *(("context",) if x.ndim > 2 else ()))


def tokens(x: Any) -> Any:
    """Constrain an array [B, T, ...] to be sharded like a batch."""
    return constrain(x, ROWS, "context", *(None,) * (x.ndim - 2))


def rows(x: Any) -> Any:
    """Constrain an array [B, T, ...] to have its rows sharded like a batch's, and tokens whole."""
    return constrain(x, ROWS, *(None,) * (x.ndim - 1))


def each_token(f: Callable[[Any], Any], x: Any, *, whole_rows: bool = False) -> Any:
    """Run `f` on each device's own tokens of an array [B, T, ...], so that XLA does not gather it.

    With `whole_rows` tokens are not split over `context`, as in decoding.
    """
    if current() is None:
        return f(x)
    where = PartitionSpec(ROWS, None if whole_rows else "context")
    return jax.shard_map(f, in_specs=where, out_specs=where, check_vma=False)(x)


def gathered(path: str, weight: Any) -> Any:
    """Gather a layer's weight over the axes that FSDP splits it by; `path` names the weight."""
    mesh = current()
    if mesh is None:
        return weight
    kept = [
        HEADS if axis == HEADS and size % mesh.shape[HEADS] == 0 else None
        for axis, size in zip(table.row(path).mesh_axes, weight.shape, strict=True)
    ]
    return constrain(weight, *kept)
