"""Mixture-of-experts layer: each row goes only through the A experts that the router chose."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.dispatch import choose, kernels_are_off
from gptoss_jax.ops.grouped_matmul.weights import Weight, is_packed, layer_of
from gptoss_jax.ops.moe import grouped, reference, xla
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.moe.capacity import drop_beyond_capacity
from gptoss_jax.ops.moe.quantised import quantised
from gptoss_jax.types import MXFP4, LayerOf, Relaid

__all__ = ["ORDER", "Adapters", "drop_beyond_capacity", "experts", "quantised"]

# The Pallas kernels and "planes" are for few rows, as in decoding.
ORDER = {
    "tpu": ("pallas_tpu", "grouped", "xla"),
    "gpu": ("pallas_gpu", "planes", "grouped", "xla"),
    "cpu": ("xla",),
    "named": ("grouped", "planes", "reference"),
}


# The layout of packed weights that a chip's kernels read; pass it to `loading.load`.
LAYOUTS = {
    "v5e": "columns",
    "v5p": "columns",
    "v6e": "columns",
    "tpu7x": "fp4",
    "h100": "hopper",
    "h200": "hopper",
}


def layout_for_chip() -> str | None:
    """Return the layout of packed experts that sampling on this chip reads without a copy."""
    chip = chips.current()
    if chip.platform == "cpu" or kernels_are_off():
        return None
    return LAYOUTS.get(chip.kind, "planes")


def relay(path: str, packed: MXFP4, *, layout: str) -> Relaid:
    """Convert an expert weight, or a stack of them, to `layout`; its path ends in its name."""
    from gptoss_jax.ops.mxfp4.layouts import relayout

    return relayout(packed, layout, row_axes=2 if path.endswith("gate_up_weight") else 1)


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
    mask: Bool[Array, " M"] | None = None,
    chunk: int | None = None,
    adapters: Adapters | None = None,
    implementation: str | None = None,
) -> Float[Array, "M D"]:
    """Return sum_a w_a * (W_down[e_a] swiglu(W_gate_up[e_a] x + b_gate_up) + b_down) for each row.

    swiglu is gate * sigmoid(1.702 gate) * (up + 1) with gate at most `limit` and up within
    +-`limit`; index 0 of the axis of two is gate. No pair (row, slot) with an id in [0, E) is
    dropped, whatever the routing. A pair whose id is E was dropped before: it adds nothing, and
    nothing gets a gradient through it (see `drop_beyond_capacity`). Rows where `mask` is false give
    zeros and affect no gradient, whatever x holds there (also NaN).

    The weights are [E, 2, F, D] and [E, D, F]: arrays, `MXFP4`, `Relaid`, or `LayerOf` a stack.
    Operands of products are in the dtype of `x` (float32 on a CPU). Products are accumulated in
    float32; biases, swiglu and the sum are in float32 too. The result has the dtype of `x`.
    Differentiable in `x`, `expert_weights`, the biases and dense weights. Packed weights and layers
    of stacks get no gradient; the gradient of `x` uses their decoded values.

    `adapters` add a low-rank product of the row's expert, (row A[e]) B[e], to each projection: to
    W_gate_up's before swiglu, and to W_down's. They get gradients whatever form the weights have.

    `chunk` is the number of rows to take at a time; None means all. The backward pass computes each
    chunk's intermediates again, so memory follows the chunk. Gradients of dense weights add up over
    chunks in the weights' dtype.

    `implementation`:
    - "xla": rows sorted by expert, and loops. The cost follows the pairs that are not dropped.
      Runs on every platform.
    - "grouped": two grouped matmuls, by kernels.
    - "pallas_tpu", "pallas_gpu" and "planes": for few rows and packed weights relaid for them.
      Their gradient is that of another implementation.
    - "reference": every expert on every row, in float32.
    - None: the first of the platform that supports the arguments.
    """
    weights = {
        "gate_up_weight": gate_up_weight,
        "gate_up_bias": gate_up_bias,
        "down_weight": down_weight,
        "down_bias": down_bias,
        "adapters": adapters,
    }
    if mask is None:
        mask = jnp.ones(x.shape[:1], bool)
    if chunk is None or chunk >= x.shape[0]:
        return _experts(
            x, expert_ids, expert_weights, weights, mask, limit=limit, named=implementation
        )
    run = jax.checkpoint(functools.partial(_experts, limit=limit, named=implementation))
    return _in_chunks(run, chunk, (x, expert_ids, expert_weights, mask), weights)


def _in_chunks(run: Callable, chunk: int, args: tuple[Array, ...], weights: Any) -> Any:
    """Run on `chunk` rows at a time; the last chunk is padded with masked rows."""
    rows, width = args[0].shape
    chunks = -(-rows // chunk)

    def split(a: Array) -> Array:
        padding = [(0, chunks * chunk - rows)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding).reshape(chunks, chunk, *a.shape[1:])

    parts = tuple(map(split, args))
    out = jax.lax.map(lambda part: run(*part[:3], weights, part[3]), parts)
    return out.reshape(-1, width)[:rows]


def _experts(
    x, ids, shares, weights: dict[str, Any], mask, *, limit: float, named: str | None
) -> Any:
    """Choose an implementation and run it."""

    def refuse(name: str) -> str | None:
        if name in ("xla", "reference"):
            return None
        if name == "grouped":
            if named == "grouped":
                return None
            matrices = {key: w for key, w in weights.items() if key.endswith("weight")}
            return grouped.refuse(x, ids, **matrices)
        if weights["adapters"] is not None:
            return "it does not support adapters"
        return _kernel(name).refuse(x, ids, shares, **_without_adapters(weights))

    name = choose("experts", named, order=ORDER, refuse=refuse)
    if name == "grouped":
        return grouped.experts(x, ids, shares, **weights, limit=limit, mask=mask)
    if name not in ("xla", "reference"):
        weights = _without_adapters(weights)
        return _with_gradient(_kernel(name).experts, limit, x, ids, shares, weights, mask)
    run = reference.experts if name == "reference" else xla.experts
    weights = {key: w if key == "adapters" else _plain(w) for key, w in weights.items()}
    return run(x, ids, shares, **weights, limit=limit, mask=mask)


def _without_adapters(weights: dict[str, Any]) -> dict[str, Any]:
    return {key: w for key, w in weights.items() if key != "adapters"}


def _plain(weight: Any) -> Any:
    """Take a layer out of its stack and restore its layout, for implementations that need both."""
    weight = layer_of(weight)
    if isinstance(weight, Relaid):
        from gptoss_jax.ops.mxfp4.layouts import restore

        weight = restore(weight)
    return weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(run: Callable, limit: float, x, ids, shares, weights, mask) -> Any:
    """Run a kernel that has no backward pass of its own."""
    return run(x, ids, shares, **weights, limit=limit, mask=mask)


def _forward(run: Callable, limit: float, x, ids, shares, weights, mask) -> tuple[Any, Any]:
    return run(x, ids, shares, **weights, limit=limit, mask=mask), (x, ids, shares, weights, mask)


def _backward(run: Callable, limit: float, saved: Any, d_out: Array) -> tuple[Any, ...]:
    """Differentiate "grouped" or "xla" instead, the implementations for many rows."""
    x, ids, shares, weights, mask = saved
    free = {key: w for key, w in weights.items() if not is_packed(w)}
    fixed = {key: w for key, w in weights.items() if is_packed(w)}
    matrices = {key: w for key, w in weights.items() if key.endswith("weight")}
    other = "xla" if grouped.refuse(x, ids, **matrices) else "grouped"

    def again(x, shares, free):
        every = {**free, **fixed, "adapters": None}
        return _experts(x, ids, shares, every, mask, limit=limit, named=other)

    _, pull = jax.vjp(again, x, shares, free)
    d_x, d_shares, d_free = pull(d_out)
    return d_x, None, d_shares, {**d_free, **dict.fromkeys(fixed)}, None


_with_gradient.defvjp(_forward, _backward)


def _kernel(name: str) -> Any:
    """Import a module of kernels only when it is needed, because the import costs time."""
    if name == "planes":
        from gptoss_jax.ops.moe import planes as module
    elif name == "pallas_tpu":
        from gptoss_jax.ops.moe import pallas_tpu_decode as module
    else:
        from gptoss_jax.ops.moe import pallas_gpu_decode as module
    return module
