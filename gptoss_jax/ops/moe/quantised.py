"""Experts as exporting them to MXFP4 would leave them: what training for that computes with."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from gptoss_jax.ops.grouped_matmul.weights import Weight, is_packed, layer_of
from gptoss_jax.ops.lora import LowRank, fold
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.mxfp4.fake import straight_through


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

    The sum is `ops.lora.fold`'s, as exporting has it; with an adapter the result is in `dtype`,
    which loses nothing from bfloat16 up. It is formed in full for the layer: 4 bytes a value for
    A B, and `dtype` for the result, and as much again in the backward pass for their gradients.
    """
    if adapter is None:
        return weight if is_packed(weight) else straight_through(weight)  # type: ignore[arg-type]
    return straight_through(fold(layer_of(weight), adapter, experts=True)).astype(dtype)
