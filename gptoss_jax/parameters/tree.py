"""Trees of parameters: nested dicts, their paths, single layers of stacks, replaced leaves."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.types import MXFP4, LayerOf, Params, Relaid


def is_weight(x: Any) -> bool:
    """Say whether `x` is one weight of a parameter tree: for `is_leaf` of `jax.tree.map`."""
    return isinstance(x, MXFP4 | Relaid | LayerOf) or not isinstance(x, dict)


def path_name(path: tuple[Any, ...]) -> str:
    """Write a path of `jax.tree_util` as its keys, names and indices, with slashes between."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(params: Params, prefix: str = "") -> dict[str, Any]:
    """Return path -> leaf, where a leaf is a weight (see `is_weight`) or a tuple of L of these."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        path = f"{prefix}{name}"
        flat |= flatten(value, f"{path}/") if isinstance(value, dict) else {path: value}
    return flat


def nest(flat: dict[str, Any]) -> Params:
    """Rebuild the tree from what `flatten` returns."""
    params: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = params
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return params


def replace(tree: Params, part: Params) -> Params:
    """Return `tree` with the leaves of `part` in place of its own at their paths."""
    new = dict(tree)
    for name, child in part.items():
        new[name] = replace(tree[name], child) if isinstance(child, dict) else child
    return new


def take_layer(layers: Params, i: int) -> Params:
    """Return layer `i` of `params["layers"]`, whose stacks are arrays [L, ...] or tuples of L."""
    return jax.tree.map(lambda stack: stack[i], layers, is_leaf=is_weight)


def point_at_layer(stacks: Params, i: Any) -> Params:
    """Return layer `i` of a tree as `take_layer` does, but each packed stack as a `LayerOf`."""

    def point(stack: Any) -> Any:
        if isinstance(stack, MXFP4 | Relaid):
            return LayerOf(stack, jnp.asarray(i, jnp.int32))
        return stack[i]

    return jax.tree.map(point, stacks, is_leaf=is_weight)


def split_layers(layers: Params, num_layers: int) -> Params:
    """Turn stacks [L, ...] into tuples of L arrays, the form a CPU decodes from without copies."""

    def split(stack: Any) -> Any:
        return stack if isinstance(stack, tuple) else tuple(stack[i] for i in range(num_layers))

    return jax.tree.map(split, layers, is_leaf=is_weight)


@jax.jit
def overlay(params: Params, over: Params) -> Params:
    """Replace leaves of `params` by those of `over` at their paths, cast to the old dtypes."""

    def join(params: Params, over: Params) -> Params:
        return {
            name: child
            if name not in over
            else join(child, over[name])
            if isinstance(child, dict)
            else over[name].astype(child.dtype)
            for name, child in params.items()
        }

    return join(params, over)
