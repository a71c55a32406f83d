"""Zero columns that pad experts, on a mesh whose `tensor` axis does not divide their blocks.

`ModelConfig.expert_padding` is their number: see `sharding.padded`. They are added where parameters
are read or initialised, and removed where parameters are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import path_name
from gptoss_jax.types import MXFP4_BLOCK


def resize(tree: Any, *, by: int) -> Any:
    """Add `by` zero columns to the experts' hidden dimension; a negative `by` removes columns.

    `tree` holds parameters, stacked [L, ...] or as tuples of L, or is a state that contains such
    trees. Arrays without the hidden dimension do not change. Works on arrays and on
    `jax.ShapeDtypeStruct`s.

    Raises:
        ValueError: The table of parameters does not know a path.
    """
    if not by:
        return tree

    def one(path: tuple[Any, ...], x: Any) -> Any:
        place = table.place_in_state(path_name(path), x.ndim)
        if place is None or "F" not in place.letters:
            return x
        rest = place.rest.split("/")
        axis = place.letters.index("F") - rest[0].isdigit()  # a tuple of layers has no layer axis
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
