"""Experts as exporting them to MXFP4 would leave them: what training for that computes with."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.grouped_matmul.weights import Weight, is_packed, layer_of
from gptoss_jax.ops.lora import LowRank, dense
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.mxfp4.fake import straight_through
from gptoss_jax.types import MXFP4, Relaid


def quantised(weights: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Return `ops.moe.experts`' weights with MXFP4's values in their place, adapters folded in.

    See `quantised_weight`. Of packed weights those that have no adapter stay what they are.
    """
    gate_up, down = weights.get("adapters") or Adapters()
    return {
        **weights,
        "gate_up_weight": quantised_weight(weights["gate_up_weight"], gate_up, dtype),
        "down_weight": quantised_weight(weights["down_weight"], down, dtype),
        "adapters": None,
    }


def quantised_weight(weight: Weight, adapter: LowRank | None, dtype: DTypeLike) -> Weight:
    """Return what MXFP4 makes of a layer's weight W, or of W + A B, gradients straight through.

    The sum is `merged`'s, as exporting forms it; with an adapter the result is in `dtype`, which
    loses nothing from bfloat16 up. It is formed in full for the layer: 4 bytes a value for A B, and
    `dtype` for the result, and as much again in the backward pass for their gradients.
    """
    if adapter is None:
        return weight if is_packed(weight) else straight_through(weight)  # type: ignore[arg-type]
    return straight_through(merged(weight, adapter)).astype(dtype)


def merged(weight: Weight, adapter: LowRank) -> Float[Array, "E *N C"]:
    """Return W + A B, of [E, *N, C] and A [E, C, r], B [E, r, *N] that holds the scale.

    The sum is in float32; that is kept for a packed W, and else rounded to the dtype of W.
    """
    layer: Any = layer_of(weight)
    update = jnp.moveaxis(dense(adapter, experts=True), 1, -1)
    if isinstance(layer, MXFP4 | Relaid):
        return mxfp4.decode(layer, jnp.float32) + update
    return (layer.astype(jnp.float32) + update).astype(layer.dtype)
