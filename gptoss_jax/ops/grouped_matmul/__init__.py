"""Rows sorted by group times their group's matrix; packed matrices are decoded in the product."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from gptoss_jax.ops.dispatch import choose
from gptoss_jax.ops.grouped_matmul import reference, xla
from gptoss_jax.ops.grouped_matmul.weights import Weight

ORDER = {
    "tpu": ("pallas_tpu", "xla"),
    "gpu": ("pallas_gpu", "xla"),
    "cpu": ("xla",),
    "named": ("reference",),
}


def grouped_matmul(
    rows: Float[Array, "P C"],
    weight: Weight,
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> Float[Array, "P N"]:
    """Return rows[p] @ weight[e].T for the group e that row p is in, accumulated in float32.

    Group e has the `group_sizes[e]` rows after those of groups before it. Rows past the last group
    give anything that is finite or not, are read by nothing, and get a gradient of zero. Axes of
    `weight` between the first and the last are one of N in the result, which has the dtype of
    `rows`. Differentiable in `rows` and in a dense `weight`; a packed, relaid or stacked one gets
    no gradient, and `rows` gets its own from the same bytes, decoded again.
    """

    def refuse(name: str) -> str | None:
        if name == "pallas_tpu":
            from gptoss_jax.ops.grouped_matmul import pallas_tpu

            return pallas_tpu.refuse(rows, weight, group_sizes)
        if name == "pallas_gpu":
            from gptoss_jax.ops.grouped_matmul import pallas_gpu

            return pallas_gpu.refuse(rows, weight, group_sizes)
        return None

    name = choose("grouped_matmul", implementation, order=ORDER, refuse=refuse)
    if name == "pallas_tpu":
        from gptoss_jax.ops.grouped_matmul import pallas_tpu

        return pallas_tpu.grouped_matmul(rows, weight, group_sizes)
    if name == "pallas_gpu":
        from gptoss_jax.ops.grouped_matmul import pallas_gpu

        return pallas_gpu.grouped_matmul(rows, weight, group_sizes)
    run = reference.grouped_matmul if name == "reference" else xla.grouped_matmul
    return run(rows, weight, group_sizes)
