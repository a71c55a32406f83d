"""The experts of a mixture: each row through the A that its router chose, and no others."""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops.moe import reference, xla
from gptoss_jax.ops.moe.capacity import drop_beyond_capacity
from gptoss_jax.types import MXFP4

__all__ = ["drop_beyond_capacity", "experts"]


def experts(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Float[Array, "E 2 F D"] | MXFP4,
    gate_up_bias: Float[Array, "E 2 F"],
    down_weight: Float[Array, "E D F"] | MXFP4,
    down_bias: Float[Array, "E D"],
    limit: float,
    mask: Bool[Array, " M"] | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Return sum_a w_a * (W_down[e_a] swiglu(W_gate_up[e_a] x + b_gate_up) + b_down) for each row.

    swiglu is gate * sigmoid(1.702 gate) * (up + 1) with gate at most `limit` and up within
    +-`limit`; index 0 of the axis of two is gate. Dropless, for any routing with ids in [0, E).
    A pair (row, slot) whose id is E is one that was dropped: it adds nothing, and nothing gets a
    gradient through it (see `drop_beyond_capacity`).
    Rows where `mask` is false give zeros and touch no gradient, whatever x holds there (NaN too).

    Products take operands in the dtype of `x` (float32 on a CPU) and accumulate in float32, in
    which biases, swiglu and the sum are; the result has the dtype of `x`. Differentiable in `x`,
    `expert_weights`, the biases and dense weights; packed weights get no gradient, x gets its own
    through what they decode to.

    `implementation`: "xla" (rows sorted by expert; the cost follows the pairs that are not dropped,
    on an accelerator one matrix product a block: the kernels for those come later) or "reference"
    (every expert on every row, float32). None picks "xla".
    """
    if implementation not in (None, "xla", "reference"):
        raise ValueError(f"implementation={implementation!r}: use 'xla', 'reference' or None")
    run = reference.experts if implementation == "reference" else xla.experts
    return run(
        x,
        expert_ids,
        expert_weights,
        gate_up_weight=gate_up_weight,
        gate_up_bias=gate_up_bias,
        down_weight=down_weight,
        down_bias=down_bias,
        limit=limit,
        mask=mask,
    )
