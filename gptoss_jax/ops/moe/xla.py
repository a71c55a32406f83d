"""Experts over rows sorted by expert: the cost follows the routed rows, not the experts.

The M*A routed pairs (row, slot) are sorted by expert, without padding. A loop goes over the experts
that have rows, and fetches (and decodes) one expert's weights. An inner loop takes the expert's
rows in blocks of R. The numbers of iterations are dynamic, so any routing fits. A dropped pair has
id E and is in no expert's range. The last block of an expert reaches into the rows of the next
expert. In the forward pass the next expert overwrites the results there, since blocks go in order;
in the backward pass such rows have weight zero.

The gradient is a custom rule with the same loops. It adds up an expert's weight gradients in one
float32 buffer and writes them once, in the weight's dtype. Autodiff would lead XLA to scatters and
to copies of whole stacks in the loops.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.moe import adapters as low_rank
from gptoss_jax.ops.moe.adapters import Adapters
from gptoss_jax.ops.moe.reference import clamped_swiglu
from gptoss_jax.ops.mxfp4.xla import (
    decode_halves,
    decode_nibbles,
    decode_scales,
    from_halves,
    to_halves,
)
from gptoss_jax.types import MXFP4

FEW = 32  # up to this many pairs are taken one by one, where matrix products would not pay off
TILE = 256  # output rows of a matrix-vector product at a time, so that they stay in the cache


class Weights(NamedTuple):
    """One layer's expert weights, as `experts` takes them."""

    gate_up_weight: Float[Array, "E 2 F D"] | MXFP4
    gate_up_bias: Float[Array, "E 2 F"]
    down_weight: Float[Array, "E D F"] | MXFP4
    down_bias: Float[Array, "E D"]
    adapters: Adapters


class Expert(NamedTuple):
    """One expert's weights in the form that the loops take, or their gradients (None if frozen)."""

    gate_up_weight: Any
    gate_up_bias: Any
    down_weight: Any
    down_bias: Any
    adapters: Any


class Routes(NamedTuple):
    """The routed pairs in the order of their experts; P = M*A."""

    rows: Int[Array, " P+R"]  # the row of x of each sorted pair
    weights: Float[Array, " P+R"]
    slots: Int[Array, "M A"]  # the sorted place of each pair
    bounds: Int[Array, " E+1"]  # expert e has the sorted pairs bounds[e] to bounds[e+1]
    used: Int[Array, " E"]  # the experts that have rows, then the others
    num_used: Int[Array, ""]


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
    mask: Bool[Array, " M"] | None,
    adapters: Adapters | None = None,
) -> Float[Array, "M D"]:
    """Sort, loop over the experts in use, and sum each row's A outputs."""
    if mask is not None:
        x = jnp.where(mask[:, None], x, 0)
        expert_ids = jnp.where(mask[:, None], expert_ids, gate_up_bias.shape[0])
        expert_weights = jnp.where(mask[:, None], expert_weights, 0)
    adapters = adapters or Adapters()
    weights = Weights(gate_up_weight, gate_up_bias, down_weight, down_bias, adapters)
    out: Any = _experts(limit, x, expert_ids, expert_weights.astype(jnp.float32), weights)
    return out if mask is None else jnp.where(mask[:, None], out, 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _experts(limit: float, x: Array, ids: Array, shares: Array, weights: Weights) -> Array:
    if ids.size <= FEW:
        return _few(x, ids, shares, weights, limit=limit)
    return _forward(x, ids, shares, weights, limit=limit, keep=False)[0]


def _experts_fwd(limit: float, *args: Any) -> tuple[Array, Any]:
    # `perturbed` says whether a gradient is wanted; frozen weights get none.
    x, ids, shares, weights = jax.tree.map(lambda arg: arg.value, args)
    out, routes, hidden = _forward(x, ids, shares, weights, limit=limit, keep=True)
    # Residuals have to be arrays, so None stands for False.
    wanted = jax.tree.map(lambda arg: jnp.zeros(()) if arg.perturbed else None, args[3])
    return out, (x, ids, weights, wanted, routes, hidden)


def _block_rows(pairs: int, num_experts: int) -> int:
    """Return R: half of the mean rows per expert, as a power of two from 16 to 256 (measured)."""
    mean = max(pairs // num_experts, 1)
    return min(max(2 ** (mean.bit_length() - 2) if mean > 1 else 1, 16), 256)


def _compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return float32 on a CPU, which would widen narrower operands again in every block."""
    return jnp.dtype(jnp.float32) if chips.current().platform == "cpu" else dtype


def _dot(a: Array, b: Array, dims: tuple[int, int]) -> Array:
    """Contract axis dims[0] of `a` with dims[1] of `b`, accumulating in float32."""
    axes = (((dims[0],), (dims[1],)), ((), ()))
    return lax.dot_general(a, b.astype(a.dtype), axes, preferred_element_type=jnp.float32)


def _inward(rows: Array, weight: Array | MXFP4) -> Array:
    """Reorder `rows` like the last axis of the decoded `weight`; reordering rows is cheap."""
    return to_halves(rows) if isinstance(weight, MXFP4) else rows


def _outward(rows: Array, weight: Array | MXFP4) -> Array:
    """Undo `_inward`."""
    return from_halves(rows) if isinstance(weight, MXFP4) else rows


def _take_expert(weights: Weights, e: Array, dtype: jnp.dtype) -> Expert:
    """Fetch expert `e`: matrices [2F, D] and [D, F] in `dtype`, biases in float32.

    The last axis of a packed matrix comes in halves, even then odd elements (see `_inward`).
    """

    def take(weight: Array | MXFP4) -> Array:
        one = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w, e, keepdims=False), weight)
        return decode_halves(one, dtype) if isinstance(one, MXFP4) else one.astype(dtype)

    return Expert(
        take(weights.gate_up_weight).reshape(-1, weights.gate_up_weight.shape[-1]),
        weights.gate_up_bias[e].astype(jnp.float32).reshape(-1),
        take(weights.down_weight),
        weights.down_bias[e].astype(jnp.float32),
        jax.tree.map(take, low_rank.as_matrices(weights.adapters)),
    )


def _route(ids: Array, shares: Array, *, num_experts: int, block: int) -> Routes:
    """Sort the pairs by expert; pairs of id E (masked or dropped) come last, with no expert."""
    pairs, active = ids.size, ids.shape[1]
    iota = jnp.arange(pairs, dtype=jnp.int32)
    sorted_ids, order = lax.sort((ids.reshape(-1), iota), num_keys=1, is_stable=True)
    edges = jnp.arange(num_experts + 1, dtype=sorted_ids.dtype)
    bounds = jnp.searchsorted(sorted_ids, edges, method="compare_all").astype(jnp.int32)
    empty = bounds[1:] == bounds[:-1]
    return Routes(
        rows=jnp.pad(order // active, (0, block)),
        weights=jnp.pad(shares.reshape(-1)[order], (0, block)),
        slots=jnp.zeros_like(iota).at[order].set(iota, unique_indices=True).reshape(ids.shape),
        bounds=bounds,
        used=jnp.argsort(empty, stable=True).astype(jnp.int32),
        num_used=jnp.sum(~empty, dtype=jnp.int32),
    )


def _collect(sorted_rows: Array, slots: Array, scale: Array) -> Array:
    """Sum scale[:, a] * sorted_rows[slots[:, a]] over a; rows of scale 0 may hold anything."""
    total = jnp.zeros((slots.shape[0], sorted_rows.shape[1]), jnp.float32)
    for a in range(slots.shape[1]):
        weight = scale[:, a, None]
        total += jnp.where(weight == 0, 0, sorted_rows[slots[:, a]].astype(jnp.float32) * weight)
    return total


def _few(x: Array, ids: Array, shares: Array, weights: Weights, *, limit: float) -> Array:
    """Take the pairs one by one, by matrix-vector products that read only the chosen experts."""
    num_experts, _, width = weights.gate_up_bias.shape
    active = ids.shape[1]
    adapters = low_rank.as_matrices(weights.adapters)

    def pair(p: Array, out: Array) -> Array:
        m, a = p // active, p % active
        routed = ids[m, a] < num_experts
        e = jnp.where(routed, ids[m, a], 0)
        h = _matvec(weights.gate_up_weight, e, x[m].astype(jnp.float32), routed)
        h += weights.gate_up_bias[e].astype(jnp.float32).reshape(-1)
        gate_up, down = jax.tree.map(lambda w: w[e].astype(jnp.float32), adapters)
        h = low_rank.add(h[None], x[m].astype(jnp.float32)[None], gate_up)[0]
        act = clamped_swiglu(h[:width], h[width:], limit=limit)
        y = _matvec(weights.down_weight, e, act, routed) + weights.down_bias[e].astype(jnp.float32)
        y = low_rank.add(y[None], act[None], down)[0]
        return out.at[m].add(jnp.where(routed, shares[m, a] * y, 0))

    out = lax.fori_loop(0, ids.size, pair, jnp.zeros(x.shape, jnp.float32))
    return out.astype(x.dtype)


def _matvec(weight: Array | MXFP4, e: Array, vector: Array, routed: Array) -> Array:
    """Return expert `e`'s matrix times `vector` in float32; nothing is read unless `routed`.

    On a CPU it takes a tile of rows at a time: to decode or copy a whole expert for one product
    would cost ten times as much, because of page faults. On an accelerator XLA fuses the whole
    product, so there is one tile.
    """
    columns = weight.shape[-1]
    flat = jax.tree.map(lambda w: w.reshape(w.shape[0], -1, *w.shape[weight.ndim - 1 :]), weight)
    rows = flat.shape[1]
    tile = min(TILE, rows) if chips.current().platform == "cpu" else rows

    def product(part: Array | MXFP4) -> Array:
        if not isinstance(part, MXFP4):
            return part.astype(jnp.float32) @ vector
        even, odd = vector.reshape(columns // 32, 16, 2).transpose(2, 0, 1)
        terms = decode_nibbles(part.blocks & 15) * even + decode_nibbles(part.blocks >> 4) * odd
        # A product with ones sums 16 terms, because XLA:CPU does not vectorise the reduction.
        sums = (terms.reshape(-1, 16) @ jnp.ones(16)).reshape(part.scales.shape)
        return jnp.sum(sums * decode_scales(part.scales), axis=-1)

    def step(i: Array, out: Array) -> Array:
        at = jnp.minimum(i * tile, rows - tile)  # the last tile may overlap the one before

        def cut(w: Array) -> Array:
            start = (e, at, *[0] * (w.ndim - 2))
            return lax.dynamic_slice(w, start, (1, tile, *w.shape[2:]))[0]

        return lax.dynamic_update_slice(out, product(jax.tree.map(cut, flat)), (at,))

    trips = jnp.where(routed, -(-rows // tile), 0)
    return lax.fori_loop(0, trips, step, jnp.zeros(rows, jnp.float32))


def _forward(
    x: Array, ids: Array, shares: Array, weights: Weights, *, limit: float, keep: bool
) -> tuple[Array, Routes, Array | None]:
    """Return output and routes, and if `keep` the sorted pairs' pre-activations [P+R, 2F]."""
    num_experts, _, width = weights.gate_up_bias.shape
    block = _block_rows(ids.size, num_experts)
    dtype = _compute_dtype(x.dtype)
    routes = _route(ids, shares, num_experts=num_experts, block=block)

    def expert(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        e = routes.used[i]
        one = _take_expert(weights, e, dtype)
        start, stop = routes.bounds[e], routes.bounds[e + 1]

        def rows(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
            at = start + j * block
            row = x[lax.dynamic_slice(routes.rows, (at,), (block,))].astype(dtype)
            h = (
                _dot(_inward(row, weights.gate_up_weight), one.gate_up_weight, (1, 1))
                + one.gate_up_bias
            )
            h = low_rank.add(h, row, one.adapters.gate_up)
            act = clamped_swiglu(h[:, :width], h[:, width:], limit=limit).astype(dtype)
            y = _dot(_inward(act, weights.down_weight), one.down_weight, (1, 1)) + one.down_bias
            y = low_rank.add(y, act, one.adapters.down)
            new = (y, h)[: len(carry)]
            put = lax.dynamic_update_slice
            return tuple(
                put(old, part.astype(old.dtype), (at, 0))
                for old, part in zip(carry, new, strict=True)
            )

        return lax.fori_loop(0, (stop - start + block - 1) // block, rows, carry)

    length = ids.size + block
    init = (jnp.zeros((length, x.shape[1]), jnp.float32),)
    if keep:
        init = (*init, jnp.zeros((length, 2 * width), dtype))
    y, *hidden = lax.fori_loop(0, routes.num_used, expert, init)
    routed = jnp.where(routes.slots < routes.bounds[-1], shares, 0)
    out = _collect(y, routes.slots, routed).astype(x.dtype)
    # The name is for rematerialisation, which keeps a loop's results only if they are named.
    return out, routes, checkpoint_name(hidden[0], "experts_hidden") if keep else None


def _experts_bwd(limit: float, saved: Any, d_out: Array) -> tuple[Array, None, Array, Weights]:
    x, ids, weights, wanted, routes, hidden = saved
    if isinstance(d_out, SymbolicZero):
        d_out = jnp.zeros_like(x)
    dtype = _compute_dtype(x.dtype)
    like = _wanted(weights, wanted)
    length, double_width = hidden.shape
    block = length - ids.size

    def activate(h: Array) -> Array:
        return clamped_swiglu(h[:, : double_width // 2], h[:, double_width // 2 :], limit=limit)

    def rows(at: Array, stop: Array, one: Expert) -> tuple[Array, Array, Expert]:
        """Return one block's gradients: of x, of the sum's weights, and of the expert's weights."""
        row = lax.dynamic_slice(routes.rows, (at,), (block,))
        inside = at + jnp.arange(block, dtype=jnp.int32) < stop
        share = jnp.where(inside, lax.dynamic_slice(routes.weights, (at,), (block,)), 0)[:, None]
        dy = d_out[row].astype(dtype)
        h = lax.dynamic_slice(hidden, (at, 0), (block, double_width)).astype(jnp.float32)
        act, pull = jax.vjp(activate, h)
        d_act = _outward(_dot(dy, one.down_weight, (1, 0)), weights.down_weight)
        d_act += low_rank.gradient_of_rows(dy, one.adapters.down)
        d_share = jnp.sum(act * d_act, 1) + jnp.sum(dy * one.down_bias, 1)
        (dh,) = pull(d_act * share)
        dh, dy = dh.astype(dtype), (dy * share).astype(dtype)
        dx = _outward(_dot(dh, one.gate_up_weight, (1, 0)), weights.gate_up_weight)
        dx += low_rank.gradient_of_rows(dh, one.adapters.gate_up)
        d_weights = Expert(
            _dot(dh, x[row].astype(dtype), (0, 0)) if like.gate_up_weight is not None else None,
            jnp.sum(dh, 0, dtype=jnp.float32) if like.gate_up_bias is not None else None,
            _dot(dy, act.astype(dtype), (0, 0)) if like.down_weight is not None else None,
            jnp.sum(dy, 0, dtype=jnp.float32) if like.down_bias is not None else None,
            Adapters(
                low_rank.gradient(x[row].astype(dtype), dh, one.adapters.gate_up),
                low_rank.gradient(act.astype(dtype), dy, one.adapters.down),
            ),
        )
        return dx, d_share, _where_wanted(like, d_weights)

    return _backward_loops(x, weights, routes, rows, like=like)


def _wanted(weights: Weights, wanted: Any) -> Expert:
    """Return the weights whose gradient is wanted; None for the others and for packed ones."""
    kept = _where_wanted(wanted, weights)
    return Expert(*(None if isinstance(w, MXFP4) else w for w in kept))


def _where_wanted(like: Any, tree: Any) -> Any:
    """Return `tree` with None wherever `like` has None."""
    return jax.tree.map(
        lambda w, x: None if w is None else x, like, tree, is_leaf=lambda w: w is None
    )


def _backward_loops(
    x: Array, weights: Weights, routes: Routes, rows: Any, *, like: Expert
) -> tuple[Array, None, Array, Weights]:
    """Run `rows` over every block, gather each expert's gradients, and undo the sorting."""
    block = routes.rows.shape[0] - routes.slots.size
    originals = like
    # The loops merge the gate and the up rows into one axis of 2F.
    like = like._replace(
        gate_up_weight=_merged(like.gate_up_weight),
        gate_up_bias=_merged(like.gate_up_bias),
        adapters=low_rank.as_matrices(like.adapters),
    )

    def expert(i: Array, carry: Any) -> Any:
        dx, d_share, stacks = carry
        e = routes.used[i]
        one = _take_expert(weights, e, _compute_dtype(x.dtype))
        start, stop = routes.bounds[e], routes.bounds[e + 1]

        def step(j: Array, carry: Any) -> Any:
            dx, d_share, sums = carry
            at = start + j * block
            new_dx, new_share, new = rows(at, stop, one)
            dx = lax.dynamic_update_slice(dx, new_dx.astype(dx.dtype), (at, 0))
            d_share = lax.dynamic_update_slice(d_share, new_share, (at,))
            return dx, d_share, jax.tree.map(jnp.add, sums, new)

        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape[1:], jnp.float32), like)
        dx, d_share, sums = lax.fori_loop(
            0, (stop - start + block - 1) // block, step, (dx, d_share, zeros)
        )
        put = lax.dynamic_update_index_in_dim
        stacks = jax.tree.map(lambda s, new: put(s, new.astype(s.dtype), e, 0), stacks, sums)
        return dx, d_share, stacks

    init = (
        jnp.zeros((routes.rows.shape[0], x.shape[1]), jnp.float32),
        jnp.zeros(routes.rows.shape, jnp.float32),
        jax.tree.map(jnp.zeros_like, like),
    )
    dx, d_share, stacks = lax.fori_loop(0, routes.num_used, expert, init)
    routed = (routes.slots < routes.bounds[-1]).astype(jnp.float32)
    dx = _collect(dx, routes.slots, routed).astype(x.dtype)
    d_share = jnp.where(routed > 0, d_share[routes.slots], 0)
    grads = jax.tree.map(lambda d, w: d.reshape(w.shape), stacks, originals)
    return dx, None, d_share, Weights(*grads)


def _merged(stack: Array | None) -> Array | None:
    return None if stack is None else stack.reshape(stack.shape[0], -1, *stack.shape[3:])


_experts.defvjp(_experts_fwd, _experts_bwd, symbolic_zeros=True)
