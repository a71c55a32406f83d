"""Expert weights with the values that an export to MXFP4 gives, for quantisation-aware training."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from gptoss_jax.ops.grouped_matmul.weights import Weight, is_packed, layer_of
from gptoss_jax.ops.lora import LowRank, fold
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.mxfp4.fake import straight_through


def quantised(weights: dict[str, Any], dtype: DTypeLike) -> dict[str, Any]:
    """Return the weights of `ops.moe.experts` with MXFP4's values and with adapters folded in.

    See `quantised_weight`. Packed weights without an adapter do not change.
    """
    gate_up, down = weights.get("adapters") or Adapters()
    return {
        **weights,
        "gate_up_weight": quantised_weight(weights["gate_up_weight"], gate_up, dtype),
        "down_weight": quantised_weight(weights["down_weight"], down, dtype),
        "adapters": None,
    }


def quantised_weight(weight: Weight, adapter: LowRank | None, dtype: DTypeLike) -> Weight:
    """Return a layer's W, or W + A B, rounded to MXFP4 values, with a straight-through gradient.

    `ops.lora.fold` forms the sum, as for an export. With an adapter the result is in `dtype`; from
    bfloat16 up that loses nothing. The sum is formed for the whole layer. It takes 4 bytes per
    value for A B and the size of `dtype` for the result, and as much again in the backward pass for
    their gradients.
    """
    if adapter is None:
        return weight if is_packed(weight) else straight_through(weight)  # type: ignore[arg-type]
    return straight_through(fold(layer_of(weight), adapter, experts=True)).astype(dtype)
