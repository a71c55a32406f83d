"""Experts for a few rows in plain XLA, which reads the packed weights directly from their stack.

A weight in the layout "planes" has the first half of its columns in the low nibbles and the second
half in the high nibbles. So x needs no reordering, and decoding is arithmetic that XLA fuses into
the sum over columns. On a GPU each of the two products is then one reduction over the packed bytes
of the chosen experts: nothing is copied, and no decoded weight is stored. For this, one slot of all
rows is taken at a time; XLA would store the result of a gather for all slots.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops.grouped_matmul.weights import Weight, as_stack
from gptoss_jax.ops.moe.reference import clamped_swiglu
from gptoss_jax.ops.mxfp4.xla import decode_scales
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, LayerOf, Relaid

ROWS = 16  # most rows: each pair (row, slot) reads its expert's weights separately
FLOAT16_BIAS = 2.0**14  # e2m1's bits, read as float16, are too small by this factor


def refuse(
    x: Any,
    expert_ids: Any,
    expert_weights: Any,
    *,
    gate_up_weight: Weight,
    gate_up_bias: Any,
    down_weight: Weight,
    down_bias: Any,
) -> str | None:
    """Return why this implementation can't take these arguments, or None."""
    del expert_weights, gate_up_bias, down_bias
    if x.shape[0] > ROWS:
        return f"it is for up to {ROWS} rows, and these are {x.shape[0]}"
    for weight in (gate_up_weight, down_weight):
        stack = weight.stack if isinstance(weight, LayerOf) else weight
        if isinstance(stack, MXFP4):
            return 'packed weights have to be in layout "planes": see ops.mxfp4.layouts.relayout'
        if isinstance(stack, Relaid) and stack.layout != "planes":
            return (
                f'packed weights have to be in layout "planes", and these are in "{stack.layout}"'
            )
    return None


def experts(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Weight,
    gate_up_bias: Float[Array, "E 2 F"] | LayerOf,
    down_weight: Weight,
    down_bias: Float[Array, "E D"] | LayerOf,
    limit: float,
    mask: Bool[Array, " M"] | None,
) -> Float[Array, "M D"]:
    """Run each pair (row, slot) through its expert in float32, and sum over the slots."""
    num_experts = gate_up_weight.shape[0]
    routed = expert_ids < num_experts
    if mask is not None:
        routed &= mask[:, None]
    ids = jnp.where(routed, expert_ids, 0)

    def pair(vector: Array, e: Array) -> Array:
        h = _product(gate_up_weight, e, vector.astype(jnp.float32)) + _bias(gate_up_bias, e)
        gate, up = jnp.split(h, 2)
        act = clamped_swiglu(gate, up, limit=limit)
        return _product(down_weight, e, act) + _bias(down_bias, e)

    out = jnp.zeros(x.shape, jnp.float32)
    for a in range(expert_ids.shape[1]):
        y = jax.vmap(pair)(x, ids[:, a]) * expert_weights[:, a, None].astype(jnp.float32)
        # A select, not a product with 0: a dropped pair or a masked row may give NaN.
        out += jnp.where(routed[:, a, None], y, 0)
    return out.astype(x.dtype)


def _product(weight: Weight, e: Array, vector: Float[Array, " C"]) -> Float[Array, " N"]:
    """Return the matrix of expert `e` times `vector`; the matrix's row axes are merged into N."""
    stack: Any
    stack, layer = as_stack(weight)
    if not isinstance(stack, Relaid):
        matrix = _expert(stack.reshape(*stack.shape[:2], -1, stack.shape[-1]), layer, e)
        return jnp.sum(matrix.astype(jnp.float32) * vector, axis=-1)
    codes, scales = _expert(stack.codes, layer, e), _expert(stack.scales, layer, e)
    half = codes.shape[-1]
    factors = decode_scales(jnp.repeat(scales, MXFP4_BLOCK, axis=-1))
    low = decode_nibbles(codes & 15) * factors[:, :half] * vector[:half]
    high = decode_nibbles(codes >> 4) * factors[:, half:] * vector[half:]
    return jnp.sum(low + high, axis=-1)


def decode_nibbles(nibbles: Array) -> Float[Array, "*n"]:
    """Return the e2m1 values of codes 0 to 15 in float32, by way of float16.

    The three low bits of a code become the last two bits of float16's exponent and the first bit of
    its mantissa. This holds for the subnormal 0.5 too: subnormals of float16 become float32
    exactly, while those of bfloat16 are flushed to zero.
    """
    code = nibbles.astype(jnp.uint16)
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return lax.bitcast_convert_type(bits, jnp.float16).astype(jnp.float32) * FLOAT16_BIAS


def _bias(bias: Array | LayerOf, e: Array) -> Float[Array, " N"]:
    stack, layer = as_stack(bias)
    return _expert(stack, layer, e).astype(jnp.float32).reshape(-1)


def _expert(stack: Any, layer: Array, e: Array) -> Array:
    """Take expert `e` of layer `layer` out of [L, E, ...] with a single slice."""
    flat = stack.reshape(-1, *stack.shape[2:])
    return lax.dynamic_index_in_dim(flat, layer * stack.shape[1] + e, keepdims=False)
