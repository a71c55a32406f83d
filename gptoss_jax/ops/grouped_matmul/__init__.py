"""Grouped matmul: rows sorted by group, each times its group's matrix, dense or packed (MXFP4)."""

from __future__ import annotations

from typing import Any

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
    """Return rows[p] @ weight[e].T for the group e of each row p, accumulated in float32.

    Group e has the next `group_sizes[e]` rows after those of the groups before it. Rows past the
    last group affect no other row; their results may be anything, finite or not, and their gradient
    is zero. The axes of `weight` between the first and the last are merged into one axis N of the
    result, which has the dtype of `rows`. Differentiable in `rows` and in a dense `weight`. A
    packed, relaid or stacked weight gets no gradient; the gradient of `rows` decodes its bytes
    again.
    """

    name = choice(rows, weight, group_sizes, implementation=implementation)
    if name in ("xla", "reference"):
        run = reference.grouped_matmul if name == "reference" else xla.grouped_matmul
    else:
        run = _kernel(name).grouped_matmul
    return run(rows, weight, group_sizes)


def choice(
    rows: Float[Array, "P C"],
    weight: Weight,
    group_sizes: Int[Array, " E"],
    *,
    implementation: str | None = None,
) -> str:
    """Return the name of the implementation that `grouped_matmul` chooses for these arguments."""

    def refuse(name: str) -> str | None:
        if name in ("xla", "reference"):
            return None
        return _kernel(name).refuse(rows, weight, group_sizes)

    return choose("grouped matmul", implementation, order=ORDER, refuse=refuse)


def _kernel(name: str) -> Any:
    """Import a module of kernels only when it is needed, because the import costs time."""
    if name == "pallas_tpu":
        from gptoss_jax.ops.grouped_matmul import pallas_tpu as module
    else:
        from gptoss_jax.ops.grouped_matmul import pallas_gpu as module
    return module
