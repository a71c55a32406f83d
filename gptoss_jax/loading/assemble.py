"""Build a tree of parameters from a source, leaf by leaf, in place: on a device or over a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import shards
from gptoss_jax.ops import moe
from gptoss_jax.parallel import padding, sharding
from gptoss_jax.parallel.mesh import AXES
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest, split_layers
from gptoss_jax.types import MXFP4, Params
from gptoss_jax.weights.names import packed_shape
from gptoss_jax.weights.sources import ParamsSource, pieces, read_as, zeros


def on_device(
    source: Any,
    config: ModelConfig,
    *,
    sharding: jax.NamedSharding | None,
    split: bool,
    layout: str | None,
    requantise: bool,
    advance: Callable[[int], None],
) -> Params:
    """Build the parameters of `config` leaf by leaf, in place; `requantise` as in `load`.

    If `source` holds them in memory (a workdir) in the wanted form already, they are used as they
    are. If it holds them in another form, each leaf is removed from `source` once it is converted,
    so that the device holds the parameters only once.
    """
    moves = sharding is not None or layout is not None
    if isinstance(source, ParamsSource) and source.config == config and not moves:
        params = nest(source.leaves)
        if split:
            params["layers"] = split_layers(params["layers"], config.num_layers)
        return params
    leaves: dict[str, Any] = {}
    how: dict[str, Any] = {"sharding": sharding, "layout": layout, "requantise": requantise}
    one = partial(_fill, source=source, config=config, advance=advance, **how)
    for path, shape in source.shapes.items():
        empty = partial(zeros, config, path, sharding=sharding, layout=layout)
        with _on_host(source, path):
            if not path.startswith("layers/"):
                leaves[path] = one(empty(shape), path, None)
            elif split:
                stack = [one(empty(shape), path, n) for n in range(config.num_layers)]
                leaves[path] = tuple(stack)
            else:
                stack = empty((config.num_layers, *shape))
                for n in range(config.num_layers):
                    stack = one(stack, path, n)
                leaves[path] = stack
    return nest(leaves)


@contextmanager
def _on_host(source: Any, path: str) -> Iterator[None]:
    """Move a leaf of a `ParamsSource` to the host while it is read, and delete it afterwards.

    One leaf may be two thirds of all parameters: the device has no room for both it and its
    converted copy.
    """
    if not isinstance(source, ParamsSource):
        yield
        return
    source.leaves[path] = jax.device_get(source.leaves[path])
    yield
    del source.leaves[path]


def adapters(tree: Params, config: ModelConfig, mesh: jax.sharding.Mesh | None) -> Params:
    """Place a workdir's adapters on the mesh; they stay float32, whatever the weights' dtype."""
    tree = padding.resize({"lora": tree}, by=config.expert_padding)
    if mesh is None:
        return tree["lora"]
    spread = mesh.axis_names == AXES and mesh.size > 1
    where: Any = sharding.shardings(tree, mesh) if spread else jax.NamedSharding(mesh, jax.P())
    return jax.device_put(tree, where)["lora"]


def over_mesh(
    source: Any,
    config: ModelConfig,
    mesh: jax.sharding.Mesh,
    *,
    layout: str | None,
    requantise: bool,
    advance: Callable[[int], None],
) -> Params:
    """Build the parameters of `config` in the shards of this host's devices; see `shards`."""
    form: dict[str, Any] = {"form": config.experts, "dtype": config.param_dtype}
    leaves: dict[str, Any] = {}
    for path, shape in source.shapes.items():
        in_layers = path.startswith("layers/")
        stack = (config.num_layers, *shape) if in_layers else shape
        make = partial(zeros, config, path, stack, sharding=None, layout=layout)
        tree = padding.resize(nest({path: jax.eval_shape(make)}), by=config.expert_padding)
        like, spread = (flatten(t)[path] for t in (tree, sharding.shardings(tree, mesh)))
        made = shards.empty(like, spread)
        packed = table.row(path).packable and config.experts == "mxfp4"
        relay = partial(moe.relay, path, layout=layout) if packed and layout else None
        for layer in range(config.num_layers) if in_layers else (None,):
            for rows in pieces(path, source.config, config.experts, shape):
                read = partial(read_as, source, path, layer, requantise=requantise, **form)
                if not shards.put(made, read, rows, layer=layer, relay=relay):
                    name = source.describe(path, layer)
                    raise UserError(f"{name} has NaN or infinity as {config.param_dtype}")
                advance(_leaf_bytes(config, path, (len(rows), *shape[1:])))
        leaves[path] = shards.join(made, like, spread)
    return nest(leaves)


def no_mesh() -> Any:
    """Return a context without a mesh: the programs that fill shards each run on one device."""
    return jax.set_mesh(jax.sharding.Mesh(np.empty((), object), ()))


def num_bytes(source: Any, config: ModelConfig) -> int:
    """Return the size of all parameters of `config`, in bytes."""
    total = 0
    for path, shape in source.shapes.items():
        layers = config.num_layers if path.startswith("layers/") else 1
        total += layers * _leaf_bytes(config, path, shape)
    return total


def _leaf_bytes(config: ModelConfig, path: str, shape: tuple[int, ...]) -> int:
    if table.row(path).packable and config.experts == "mxfp4":
        return sum(math.prod(packed_shape(shape, field)) for field in ("blocks", "scales"))
    return math.prod(shape) * jnp.dtype(config.param_dtype).itemsize


def _fill(
    leaf: Any,
    path: str,
    layer: int | None,
    *,
    source: Any,
    config: ModelConfig,
    sharding: jax.NamedSharding | None,
    layout: str | None,
    requantise: bool,
    advance: Callable[[int], None],
) -> Any:
    """Write one layer of a leaf into its stack, or into an array of its own."""
    shape = source.shapes[path]
    in_stack = len(leaf.shape) > len(shape)
    form: dict[str, Any] = {"form": config.experts, "dtype": config.param_dtype}
    for rows in pieces(path, source.config, config.experts, shape):
        piece = read_as(source, path, layer, rows=rows, requantise=requantise, **form)
        packed = isinstance(piece, MXFP4)
        itemsize = 1 if packed else leaf.dtype.itemsize
        size = sum(part.size for part in jax.tree.leaves(piece)) * itemsize
        if packed and layout is not None:
            piece = moe.relay(path, jax.tree.map(jnp.asarray, piece), layout=layout)
        if sharding is not None:
            piece = jax.device_put(piece, sharding)
        lead = (layer,) if in_stack else ()
        leaf, finite = shards.write(leaf, piece, (*lead, rows.start))
        if not finite:  # waits for the write too, so that pieces do not pile up
            name = source.describe(path, layer)
            raise UserError(f"{name} has NaN or infinity as {config.param_dtype}")
        advance(size)
    return leaf
