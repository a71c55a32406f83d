"""The zero columns that experts have on a mesh whose `tensor` axis does not divide their blocks.

`ModelConfig.expert_padding` says how many: see `sharding.padded`. They are made where parameters
are read or begin, and left out where they are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import path_name
from gptoss_jax.types import MXFP4_BLOCK


def resize(tree: Any, *, by: int) -> Any:
    """Add `by` zero columns to experts' hidden dimension, or take as many away if negative.

    The tree is of parameters, stacked [L, ...] or as tuples of L, or a state with such trees in it:
    what has no hidden dimension stays. Works on arrays and on `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: a path that the table of parameters does not know.
    """
    if not by:
        return tree

    def one(path: tuple[Any, ...], x: Any) -> Any:
        place = table.place_in_state(path_name(path), x.ndim)
        if place is None or "F" not in place.letters:
            return x
        rest = place.rest.split("/")
        axis = place.letters.index("F") - rest[0].isdigit()  # of a tuple of layers
        if x.ndim <= axis:
            return x
        in_blocks = place.letters.endswith("F") and rest[-1] in ("blocks", "scales")
        size = x.shape[axis] + by // (MXFP4_BLOCK if in_blocks else 1)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
        if size <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, size, axis=axis)
        wide = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, wide)

    return jax.tree_util.tree_map_with_path(one, tree)
