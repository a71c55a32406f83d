"""The experts of a mixture: each row through the A that its router chose, and no others."""

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


# The order of packed weights in which a chip's kernels read them: give it to `loading.load`.
LAYOUTS = {
    "v5e": "columns",
    "v5p": "columns",
    "v6e": "columns",
    "tpu7x": "fp4",
    "h100": "hopper",
    "h200": "hopper",
}


def layout_for_chip() -> str | None:
    """Return the layout of packed experts that sampling on this chip copies nothing of."""
    chip = chips.current()
    if chip.platform == "cpu" or kernels_are_off():
        return None
    return LAYOUTS.get(chip.kind, "planes")


def relay(path: str, packed: MXFP4, *, layout: str) -> Relaid:
    """Relay out an expert weight, or a stack of them; its path ends in its name."""
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
    +-`limit`; index 0 of the axis of two is gate. Dropless, for any routing with ids in [0, E).
    A pair (row, slot) whose id is E is one that was dropped: it adds nothing, and nothing gets a
    gradient through it (see `drop_beyond_capacity`).
    Rows where `mask` is false give zeros and touch no gradient, whatever x holds there (NaN too).

    The weights are [E, 2, F, D] and [E, D, F]: arrays, `MXFP4`, `Relaid`, or a `LayerOf` a stack.
    Products take operands in the dtype of `x` (float32 on a CPU) and accumulate in float32, in
    which biases, swiglu and the sum are; the result has the dtype of `x`. Differentiable in `x`,
    `expert_weights`, the biases and dense weights; packed weights and layers of stacks get no
    gradient, x gets its own through what they decode to.

    `adapters` add to each projection of a row a low-rank product of its expert, (row A[e]) B[e]:
    before swiglu, and to W_down's. They are differentiated, whatever the weights are.

    `chunk`: rows at a time, each chunk's intermediates made again in the backward pass. Memory then
    follows the chunk; gradients of dense weights add up over chunks in the weights' dtype.

    `implementation`: "xla" (rows sorted by expert, loops; the cost follows the pairs that are not
    dropped, anywhere), "grouped" (two grouped matmuls, by kernels), "pallas_tpu", "pallas_gpu" and
    "planes" (few rows; packed weights relaid for them; differentiated, they take the gradient of
    another form) or "reference" (every expert on every row, float32). None takes the platform's
    first that supports the arguments.
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
    """Run on `chunk` rows at a time, the last chunk filled up with masked ones."""
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
    """Choose a form, and run it."""

    def refuse(name: str) -> str | None:
        if name in ("xla", "reference"):
            return None
        if name == "grouped":
            if named == "grouped":
                return None
            matrices = {key: w for key, w in weights.items() if key.endswith("weight")}
            return grouped.refuse(x, ids, **matrices)
        if weights["adapters"] is not None:
            return "it knows no adapters"
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
    """Cut a layer out of its stack and undo what was relaid: for the forms that know neither."""
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
    """Differentiate the form for many rows instead."""
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
    """Import a module of kernels, which costs time, only where one is asked about."""
    if name == "planes":
        from gptoss_jax.ops.moe import planes as module
    elif name == "pallas_tpu":
        from gptoss_jax.ops.moe import pallas_tpu_decode as module
    else:
        from gptoss_jax.ops.moe import pallas_gpu_decode as module
    return module
