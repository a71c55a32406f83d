"""The forms of a grouped weight: dense, packed or relaid, each alone or as a layer of a stack."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.mxfp4 import decode
from gptoss_jax.types import MXFP4, LayerOf, Relaid

Weight = Float[Array, "E *N C"] | MXFP4 | Relaid | LayerOf


def as_stack(weight: Any) -> tuple[Array | MXFP4 | Relaid, Int[Array, ""]]:
    """Return the weight in the form for kernels: a stack [L, E, ...] and the index of its layer."""
    if isinstance(weight, LayerOf):
        return weight.stack, jnp.asarray(weight.layer, jnp.int32)
    return weight[None], jnp.int32(0)


def wait_for(rows: Array, weight: Any) -> Any:
    """Return the weight; XLA can't take a layer out of its stack before `rows` are computed.

    Use this for a weight that is relaid on each call. Otherwise XLA would relay several layers
    ahead, and each of them is a copy. If layers are unrolled, their index is a constant; then XLA
    would relay all layers ahead, even with a barrier, and in decoding once for the whole loop. So
    the index is computed from the rows.
    """
    if not isinstance(weight, LayerOf):
        return weight
    index = jnp.asarray(weight.layer, jnp.int32)
    some = lax.stop_gradient(rows[:1, :1]).astype(jnp.bfloat16)
    bits = lax.bitcast_convert_type(some, jnp.uint16).astype(jnp.int32)
    index, zero = lax.optimization_barrier((index, jnp.sum(bits >> 16)))
    return LayerOf(weight.stack, index + zero)


def as_it_lies(layer: Array, *order: int) -> Array:
    """Fix the memory order of a layer that was taken out of its stack; the last axis is closest.

    Otherwise XLA may prefer another order for the next operation, and transpose the whole stack
    before the loop over layers.
    """
    return with_layout_constraint(layer, Layout(order))


def layer_of(weight: Any) -> Array | MXFP4 | Relaid:
    """Return the layer, taken out of its stack: a copy, unless XLA fuses it into its reader."""
    if not isinstance(weight, LayerOf):
        return weight
    stack, i = weight.stack, weight.layer

    def cut(a: Array) -> Array:
        return lax.dynamic_index_in_dim(a, i, keepdims=False)

    if isinstance(stack, MXFP4):
        return MXFP4(cut(stack.blocks), cut(stack.scales))
    if isinstance(stack, Relaid):
        return stack.replace(codes=cut(stack.codes), scales=cut(stack.scales))  # type: ignore[attr-defined]
    return cut(stack)


def dense(weight: Any, dtype: DTypeLike) -> Float[Array, "E *N C"]:
    """Return the layer as an array in `dtype`, decoded if need be."""
    layer = layer_of(weight)
    if isinstance(layer, MXFP4 | Relaid):
        return decode(layer, dtype)
    return layer.astype(dtype)


def is_packed(weight: Any) -> bool:
    """Return whether the weight gets no gradient."""
    return isinstance(weight, MXFP4 | Relaid | LayerOf)
