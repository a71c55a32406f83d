"""Experts for accelerators: two grouped matmuls over rows sorted by expert.

XLA fuses sorting, bias, swiglu and the sum. `ops.grouped_matmul` forms the products and takes
packed weights and layers of stacks directly. Rows move only by gathers, also in the backward pass,
where autodiff would use scatters.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops.grouped_matmul import choice, grouped_matmul
from gptoss_jax.ops.grouped_matmul.weights import Weight, layer_of
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.ops.moe import adapters as low_rank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.moe.reference import clamped_swiglu


class Order(NamedTuple):
    """The P = M*A pairs sorted by expert; those of no expert come last."""

    rows: Int[Array, " P"]  # the row of x of each sorted pair
    slots: Int[Array, "M A"]  # the sorted place of each pair
    sizes: Int[Array, " E"]  # pairs of each expert
    expert: Int[Array, " P"]  # the expert of each sorted pair; E for no expert


def refuse(x: Any, expert_ids: Any, *, gate_up_weight: Any, down_weight: Any) -> str | None:
    """Return why another implementation is better, or None.

    Without a kernel, the grouped matmul multiplies every row by every expert.
    """
    pairs = expert_ids.size
    for weight, width in ((gate_up_weight, x.shape[-1]), (down_weight, down_weight.shape[-1])):
        rows: Any = jax.ShapeDtypeStruct((pairs, width), x.dtype)
        sizes: Any = jax.ShapeDtypeStruct((weight.shape[0],), jnp.int32)
        if choice(rows, weight, sizes) == "xla":
            return "there is no kernel for its grouped matmul"
    return None


def experts(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Weight,
    gate_up_bias: Float[Array, "E 2 F"],
    down_weight: Weight,
    down_bias: Float[Array, "E D"],
    limit: float,
    mask: Bool[Array, " M"] | None,
    adapters: Adapters | None = None,
) -> Float[Array, "M D"]:
    """Sort, multiply, add biases and activate, multiply, and sum each row's A outputs."""
    biases: Any = layer_of(gate_up_bias), layer_of(down_bias)
    num_experts, _, width = gate_up_bias.shape
    if mask is not None:
        x = jnp.where(mask[:, None], x, 0)
        expert_ids = jnp.where(mask[:, None], expert_ids, num_experts)
    order = _sort(expert_ids, num_experts)
    rows = _spread(x, order)

    blocks = low_rank.blocks_of(order.sizes, pairs=expert_ids.size) if adapters else None

    def adapted(y: Array, inputs: Array, adapter: LowRank | None) -> Array:
        if adapter is None or blocks is None:
            return y
        return (y.astype(jnp.float32) + low_rank.product(inputs, adapter, blocks)).astype(y.dtype)

    # The backward pass keeps only the two products, in the dtype of x.
    @jax.checkpoint
    def activate(h: Array, bias: Array) -> Array:
        h = _add_bias(h, bias.reshape(num_experts, -1), order.expert)
        return clamped_swiglu(h[:, :width], h[:, width:], limit=limit).astype(x.dtype)

    @jax.checkpoint
    def combine(y: Array, bias: Array, shares: Array) -> Array:
        routed = jnp.where(expert_ids < num_experts, shares, 0)
        return _gather_sum(_add_bias(y, bias, order.expert), routed, order).astype(x.dtype)

    gate_up, down = adapters or Adapters()
    h = adapted(grouped_matmul(rows, gate_up_weight, order.sizes), rows, gate_up)
    act = activate(h, biases[0])
    y = adapted(grouped_matmul(act, down_weight, order.sizes), act, down)
    return combine(y, biases[1], expert_weights)


def _sort(ids: Int[Array, "M A"], num_experts: int) -> Order:
    pairs, active = ids.size, ids.shape[1]
    iota = jnp.arange(pairs, dtype=jnp.int32)
    expert, order = lax.sort((ids.reshape(-1).astype(jnp.int32), iota), num_keys=1, is_stable=True)
    bounds = jnp.searchsorted(expert, jnp.arange(num_experts + 1), method="compare_all")
    slots = jnp.zeros_like(iota).at[order].set(iota, unique_indices=True)
    return Order(order // active, slots.reshape(ids.shape), jnp.diff(bounds), expert)


@jax.custom_vjp
def _spread(x: Float[Array, "M D"], order: Order) -> Float[Array, "P D"]:
    """Copy each row to its A places."""
    return x[order.rows]


def _spread_fwd(x: Array, order: Order) -> tuple[Array, Any]:
    return x[order.rows], order


def _spread_bwd(order: Order, d_rows: Array) -> tuple[Array, None]:
    real = (order.slots < jnp.sum(order.sizes))[..., None]
    gathered = jnp.where(real, d_rows[order.slots].astype(jnp.float32), 0)
    return jnp.sum(gathered, axis=1).astype(d_rows.dtype), None


_spread.defvjp(_spread_fwd, _spread_bwd)


@jax.custom_vjp
def _add_bias(h: Float[Array, "P N"], bias: Float[Array, "E N"], expert: Array) -> Array:
    """Add to each row its expert's bias, in float32; rows of no expert become zeros."""
    real = (expert < bias.shape[0])[:, None]
    wide = bias.astype(jnp.float32)[jnp.minimum(expert, bias.shape[0] - 1)]
    return jnp.where(real, h.astype(jnp.float32) + wide, 0)


def _add_bias_fwd(h: Array, bias: Array, expert: Array) -> tuple[Array, Any]:
    # Residuals have to be arrays, so empty arrays carry the dtypes.
    return _add_bias(h, bias, expert), (jnp.zeros((0,), h.dtype), bias[:, :0], expert)


def _add_bias_bwd(saved: Any, d_out: Array) -> tuple[Array, Array, None]:
    """Sum over an expert's rows by a product with its indicator, because a scatter is slower."""
    like, like_bias, expert = saved
    num_experts = like_bias.shape[0]
    indicator = jax.nn.one_hot(expert, num_experts, axis=0, dtype=jnp.float32)
    d_out = jnp.where((expert < num_experts)[:, None], d_out, 0)
    d_bias = jnp.dot(indicator, d_out, precision="highest")
    return d_out.astype(like.dtype), d_bias.astype(like_bias.dtype), None


_add_bias.defvjp(_add_bias_fwd, _add_bias_bwd)


@jax.custom_vjp
def _gather_sum(y: Float[Array, "P D"], share: Float[Array, "M A"], order: Order) -> Array:
    """Return the sum over a of share[:, a] * y[slots[:, a]] in float32."""
    total = jnp.zeros((share.shape[0], y.shape[1]), jnp.float32)
    for a in range(share.shape[1]):
        total += share[:, a, None].astype(jnp.float32) * y[order.slots[:, a]]
    return total


def _gather_sum_fwd(y: Array, share: Array, order: Order) -> tuple[Array, Any]:
    return _gather_sum(y, share, order), (y, share, order)


def _gather_sum_bwd(saved: Any, d_out: Array) -> tuple[Array, Array, None]:
    y, share, order = saved
    by_pair = jnp.zeros(y.shape[:1], jnp.float32)
    by_pair = by_pair.at[order.slots.reshape(-1)].set(
        share.reshape(-1).astype(jnp.float32), unique_indices=True
    )
    d_y = by_pair[:, None] * d_out[order.rows]
    d_share = [jnp.sum(y[order.slots[:, a]] * d_out, axis=1) for a in range(share.shape[1])]
    return d_y.astype(y.dtype), jnp.stack(d_share, axis=1).astype(share.dtype), None


_gather_sum.defvjp(_gather_sum_fwd, _gather_sum_bwd)
