"""The zero columns that experts have on a mesh whose `tensor` axis does not divide their blocks.

`ModelConfig.expert_padding` says how many: see `sharding.padded`. They are made where parameters
are read or begin, and left out where they are written.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.parameters.tree import path_name
from gptoss_jax.types import MXFP4_BLOCK

# The axis of F, with that of layers in front, and how many columns an entry stands for.
_HIDDEN = {
    "lora/layers/experts/gate_up_weight/b": 4,  # [L, E, r, 2, F]
    "lora/layers/experts/down_weight/a": 2,  # [L, E, F, r]
    "layers/experts/gate_up_weight": 3,  # [L, E, 2, F, ...]
    "layers/experts/gate_up_bias": 3,
    "layers/experts/down_weight": 3,  # [L, E, D, F], packed [L, E, D, F/32, ...]
}


def resize(tree: Any, *, by: int) -> Any:
    """Add `by` zero columns to experts' hidden dimension, or take as many away if negative.

    The tree is of parameters, stacked [L, ...] or as tuples of L, or a state with such trees in it:
    what is no expert's stays. Works on arrays and on `jax.ShapeDtypeStruct`s.
    """
    if not by:
        return tree

    def one(path: tuple[Any, ...], x: Any) -> Any:
        full = f"/{path_name(path)}/"
        name = next((name for name in _HIDDEN if f"/{name}/" in full), None)
        if name is None or ("/lora/" in full and not name.startswith("lora/")):
            return x
        rest = full.split(f"/{name}/", 1)[1].strip("/").split("/")
        axis = _HIDDEN[name] - rest[0].isdigit()  # of a tuple of layers
        if x.ndim <= axis:
            return x
        in_blocks = name.endswith("down_weight") and rest[-1] in ("blocks", "scales")
        size = x.shape[axis] + by // (MXFP4_BLOCK if in_blocks else 1)
        if isinstance(x, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype)
        if size <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, size, axis=axis)
        wide = [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, wide)

    return jax.tree_util.tree_map_with_path(one, tree)
