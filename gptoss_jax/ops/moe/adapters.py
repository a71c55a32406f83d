"""Adapters of experts: low-rank products over rows that are sorted by expert.

For accelerators, each expert's rows are moved to blocks of their own, and the expert's last block
is padded with zeros. Each block then has one expert, and the products of all blocks are two batched
matrix products. The rank is too narrow for the kernels of `ops.grouped_matmul`, and on accelerators
`lax.ragged_dot` multiplies every row by every expert.

The functions at the end are for a loop over experts: they take the matrices of one expert.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax.ops.lora import LowRank

ROWS = 128  # most rows per block


class Adapters(NamedTuple):
    """The adapters of one layer's experts; None for a projection without an adapter."""

    gate_up: LowRank | None = None  # a [E, D, r], b [E, r, 2, F]
    down: LowRank | None = None  # a [E, F, r], b [E, r, D]


class Blocks(NamedTuple):
    """The places of the P sorted rows among Q = blocks * rows per block."""

    of_row: Int[Array, " P"]  # the place of a row; any place for a row of no expert
    row_at: Int[Array, " Q"]  # the row in a place; any row for an empty place
    is_row: Bool[Array, " P"]
    is_used: Bool[Array, " Q"]
    expert: Int[Array, " blocks"]


def blocks_of(sizes: Int[Array, " E"], *, pairs: int) -> Blocks:
    """Assign `pairs` sorted rows to blocks; expert e has the next `sizes[e]` rows."""
    num_experts = sizes.shape[0]
    rows = min(ROWS, max(8, 1 << (pairs // num_experts).bit_length()))
    count = min(pairs, pairs // rows + num_experts)  # sum of ceil(size / rows) is at most this
    used = -(-sizes // rows)
    starts, first = jnp.cumsum(sizes) - sizes, jnp.cumsum(used) - used
    # Blocks past the last one in use get the last expert and hold no rows.
    expert = jnp.searchsorted(jnp.cumsum(used), jnp.arange(count), side="right")
    expert = jnp.minimum(expert, num_experts - 1).astype(jnp.int32)
    place = jnp.arange(count * rows, dtype=jnp.int32)
    of_place = jnp.broadcast_to(expert[:, None], (count, rows)).reshape(-1)
    offset = place - first[of_place] * rows
    row = jnp.arange(pairs, dtype=jnp.int32)
    of_row = jnp.searchsorted(jnp.cumsum(sizes), row, side="right")
    is_row = of_row < num_experts
    of_row = jnp.minimum(of_row, num_experts - 1)
    return Blocks(
        of_row=jnp.where(is_row, first[of_row] * rows + row - starts[of_row], 0),
        row_at=jnp.minimum(starts[of_place] + offset, pairs - 1),
        is_row=is_row,
        is_used=offset < sizes[of_place],
        expert=expert,
    )


def product(rows: Float[Array, "P C"], adapter: LowRank, blocks: Blocks) -> Float[Array, "P N"]:
    """Return (row A[e]) B[e] for each row and its expert e; zeros for rows of no expert.

    Operands are in the dtype of `rows`. Sums and the result are in float32.
    """
    count, rank = blocks.expert.shape[0], adapter.a.shape[-1]
    dtype = rows.dtype
    b = adapter.b.reshape(adapter.b.shape[0], rank, -1)
    own_a, own_b = (_take(w.astype(dtype), blocks.expert) for w in (adapter.a, b))
    x = _place(rows, blocks).reshape(count, -1, rows.shape[1])
    low = jnp.einsum("bRC,bCr->bRr", x, own_a, preferred_element_type=jnp.float32).astype(dtype)
    out = jnp.einsum("bRr,brN->bRN", low, own_b, preferred_element_type=jnp.float32)
    return _collect(out.reshape(-1, out.shape[-1]), blocks)


@jax.custom_vjp
def _place(rows: Float[Array, "P C"], blocks: Blocks) -> Float[Array, "Q C"]:
    """Move rows to their places. The gradient is a gather too, and so is that of `_collect`."""
    return jnp.where(blocks.is_used[:, None], rows[blocks.row_at], 0)


def _place_bwd(blocks: Blocks, d_placed: Array) -> tuple[Array, None]:
    return jnp.where(blocks.is_row[:, None], d_placed[blocks.of_row], 0), None


_place.defvjp(lambda rows, blocks: (_place(rows, blocks), blocks), _place_bwd)


@jax.custom_vjp
def _collect(placed: Float[Array, "Q N"], blocks: Blocks) -> Float[Array, "P N"]:
    """Undo `_place`."""
    return jnp.where(blocks.is_row[:, None], placed[blocks.of_row], 0)


def _collect_bwd(blocks: Blocks, d_rows: Array) -> tuple[Array, None]:
    return jnp.where(blocks.is_used[:, None], d_rows[blocks.row_at], 0), None


_collect.defvjp(lambda placed, blocks: (_collect(placed, blocks), blocks), _collect_bwd)


@jax.custom_vjp
def _take(weight: Float[Array, "E C N"], expert: Int[Array, " blocks"]) -> Array:
    """Return each block's expert matrix; the gradient sums an expert's blocks by a product."""
    return weight[expert]


def _take_fwd(weight: Array, expert: Array) -> tuple[Array, tuple[Array, Array]]:
    return weight[expert], (weight[:, :0], expert)


def _take_bwd(saved: tuple[Array, Array], d_taken: Array) -> tuple[Array, None]:
    like, expert = saved
    mine = jax.nn.one_hot(expert, like.shape[0], axis=0, dtype=d_taken.dtype)
    d_weight = jnp.einsum(
        "Eb,bCN->ECN", mine, d_taken, preferred_element_type=jnp.float32, precision="highest"
    )
    return d_weight.astype(like.dtype), None


_take.defvjp(_take_fwd, _take_bwd)


def as_matrices(adapters: Adapters) -> Adapters:
    """Merge the gate and the up columns into one axis, to [E, C, r] and [E, r, N]."""
    return jax.tree.map(lambda w: w.reshape(*w.shape[:2], -1), adapters)


def add(
    y: Float[Array, "R N"], rows: Float[Array, "R C"], adapter: LowRank | None
) -> Float[Array, "R N"]:
    """Add one expert's low-rank product, with matrices [C, r] and [r, N], if it has an adapter."""
    if adapter is None:
        return y
    return y + _dot(_dot(rows, adapter.a, (1, 0)).astype(rows.dtype), adapter.b, (1, 0))


def gradient_of_rows(dy: Float[Array, "R N"], adapter: LowRank | None) -> Array | float:
    """Return the gradient of the rows, given `dy` of their low-rank product."""
    if adapter is None:
        return 0.0
    return _dot(_dot(dy, adapter.b, (1, 1)).astype(dy.dtype), adapter.a, (1, 1))


def gradient(
    rows: Float[Array, "R C"], dy: Float[Array, "R N"], adapter: LowRank | None
) -> LowRank | None:
    """Return the gradient of one expert's adapter, given `dy` of its product with the rows."""
    if adapter is None:
        return None
    low, d_low = _dot(rows, adapter.a, (1, 0)), _dot(dy, adapter.b, (1, 1))
    low, d_low = low.astype(rows.dtype), d_low.astype(rows.dtype)
    return LowRank(_dot(rows, d_low, (0, 0)), _dot(low, dy, (0, 0)))


def _dot(a: Array, b: Array, dims: tuple[int, int]) -> Array:
    """Contract axis dims[0] of `a` with dims[1] of `b`, accumulating in float32."""
    axes = (((dims[0],), (dims[1],)), ((), ()))
    return jax.lax.dot_general(a, b.astype(a.dtype), axes, preferred_element_type=jnp.float32)
