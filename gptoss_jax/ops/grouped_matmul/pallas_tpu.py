"""Grouped matmul on TPU: one Pallas kernel for dense weights and for packed ones, decoded in VMEM.

The innermost loop goes over the pairs (row tile, group) that overlap. So a tile of a group's weight
is fetched, and decoded if packed, once for all rows of the group. A step contracts the whole axis.
Weights come as stacks [L, E, ...] with a layer index; fetches use the index, and no layer is copied
out of its stack. megablox's `gmm` supports neither packed weights nor a limit of fast memory; its
`tgmm` gives the gradient of a dense weight.

| weight | fetched tile | multiplied |
|---|---|---|
| dense [N, C] | [tile of N, C]; for d_rows [N, tile of C] | as it is |
| packed [C, N] | [C, tile of N]; for d_rows [tile of C, N] | decoded to the rows' dtype, exactly |

The compiler stores arguments in the memory order that needs the least padding, and copies an
argument that a kernel needs in another order. It would copy a dense [E, 5760, 2880], but not
[E, 2, 2880, 2880]. It also copies a dense weight on one device if E is a multiple of 128. Relaid
weights are padded so that this can't happen.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.grouped_matmul.blocks import BLOCKS, Blocks
from gptoss_jax.ops.grouped_matmul.weights import (
    Weight,
    as_it_lies,
    as_stack,
    is_packed,
    layer_of,
    wait_for,
)
from gptoss_jax.ops.mxfp4.layouts import SCALE_ROWS, relayout
from gptoss_jax.types import MXFP4, MXFP4_BLOCK, LayerOf, Relaid

# Values of the packed axis that are decoded at a time: one tile of the codes' dtype.
STEP = {"columns": 2 * MXFP4_BLOCK, "int8": MXFP4_BLOCK, "fp4": 2 * MXFP4_BLOCK}
SUBLANES = 8  # rows of scales, as float32, in a tile
LANES = 512  # columns of the weight decoded at a time; these fit in the registers
TWICE = int("C8643210", 16) - (1 << 32)  # e2m1's magnitudes, doubled, one per nibble
MINUS_ZERO = -128  # in layout "int8"


class Plan(NamedTuple):
    """The static parameters of a kernel call."""

    layout: str  # "dense" or one of `STEP`
    transposed: bool  # whether it computes d_rows, which contracts N
    columns: int  # C
    out: int  # columns of the result: N, or C if transposed
    rows_tile: int
    out_tile: int
    vmem: int


def refuse(rows: Any, weight: Any, group_sizes: Any) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    del group_sizes
    reason = chips.refuse_tpu_kernel()
    if reason is not None:
        return reason
    chip = chips.current().kind
    if chip not in BLOCKS:
        return f"it has no block sizes for a {chip}"
    if rows.dtype not in (jnp.float32, jnp.bfloat16):
        return f"rows are {rows.dtype}: it takes float32 and bfloat16"
    stack = weight.stack if isinstance(weight, LayerOf) else weight
    columns = weight.shape[-1]
    if isinstance(stack, Relaid):
        if stack.layout not in STEP:
            return f"a weight in layout {stack.layout!r}: it reads {', '.join(STEP)}"
        if stack.layout == "fp4" and (chip != "tpu7x" or columns % STEP["fp4"]):
            need = f"tpu7x and C a multiple of {STEP['fp4']}"
            return f"layout 'fp4' is for {need}, not {columns} on a {chip}"
    layout = _layout(stack)
    size = rows.shape[0], _width(weight), columns
    for transposed in (False, True):
        if _plan(layout, *size, transposed=transposed, dtype=rows.dtype) is None:
            return f"tiles of a weight of shape {weight.shape} do not fit a {chip}'s fast memory"
    return None


def grouped_matmul(
    rows: Float[Array, "P C"], weight: Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "P N"]:
    """Return rows[p] @ weight[e].T; see `ops.grouped_matmul`.

    A weight in the checkpoint's layout is relaid to "columns" on every call, which costs a pass
    over its layer; relay it once, when loading. Products of float32 rows have float32 precision.
    """
    stack, layer = as_stack(weight)
    if isinstance(stack, MXFP4):
        packed: Any = layer_of(wait_for(rows, weight))
        packed = _rows_last(packed) if isinstance(weight, LayerOf) else packed
        weight = relayout(packed, "columns", row_axes=packed.ndim - 2)
        stack, layer = as_stack(weight)
    width = _width(weight)
    if isinstance(stack, Relaid):
        leaves = (stack.codes, stack.scales)
    else:
        dense: Any = stack
        leaves = (dense.reshape(*stack.shape[:2], width, stack.shape[-1]),)
    if is_packed(weight):
        leaves = lax.stop_gradient(leaves)
    size = rows.shape[0], width, weight.shape[-1]
    plans = []
    for transposed in (False, True):
        plan = _plan(_layout(stack), *size, transposed=transposed, dtype=rows.dtype)
        assert plan is not None, "refuse() says so"
        plans.append(plan)
    sizes = group_sizes.astype(jnp.int32)
    return _product(tuple(plans), not is_packed(weight), rows, leaves, layer, sizes)


def _rows_last(layer: MXFP4) -> MXFP4:
    """Keep a layer in the memory order of stacked TPU arguments: rows closest (libtpu 0.0.48).

    If the stack has another order, it is copied with or without this function.
    """
    last = layer.ndim - 2
    rows, block = range(1, last), last + 1
    return MXFP4(
        as_it_lies(layer.blocks, 0, *rows, block, block + 1, last),
        as_it_lies(layer.scales, *rows, block, 0, last),
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    plans: tuple[Plan, Plan],
    trained: bool,
    rows: Array,
    leaves: tuple[Array, ...],
    layer: Array,
    group_sizes: Array,
) -> Array:
    del trained
    return _run(plans[0], rows, leaves, layer, group_sizes)


def _forward(
    plans: tuple[Plan, Plan], trained: bool, rows: Any, leaves: Any, layer: Any, sizes: Any
):
    kept = rows if trained else rows[:0]
    return _run(plans[0], rows, leaves, layer, sizes), (kept, leaves, layer, sizes)


def _backward(plans: tuple[Plan, Plan], trained: bool, residuals: Any, d_out: Array):
    rows, leaves, layer, sizes = residuals
    d_rows = _run(plans[1], d_out, leaves, layer, sizes)
    if not trained:
        return d_rows, None, None, None
    d_weight = _weight_gradient(rows, d_out, sizes, leaves[0].dtype)
    return d_rows, (d_weight[None],), None, None


_product.defvjp(_forward, _backward)


def _weight_gradient(rows: Array, d_out: Array, sizes: Array, dtype: Any) -> Float[Array, "E N C"]:
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tile, tile_n, tile_c = BLOCKS[chips.current().kind].gradient
    tile = min(tile, pl.cdiv(rows.shape[0], 16) * 16)
    pad = ((0, -rows.shape[0] % tile), (0, 0))
    rows, d_out = jnp.pad(rows, pad), jnp.pad(d_out, pad)
    tiling = (tile, min(tile_n, d_out.shape[1]), min(tile_c, rows.shape[1]))
    # `tgmm` has no argument for the precision of its products.
    with jax.default_matmul_precision("highest" if rows.dtype == jnp.float32 else "default"):
        return tgmm(
            d_out.T,
            rows,
            sizes,
            preferred_element_type=dtype,
            tiling=tiling,
            interpret=chips.tpu_interpreter(),
        )


class Work(NamedTuple):
    """The pairs (row tile, group) that overlap, in order, and the row range of every group."""

    groups: Int[Array, " W"]
    tiles: Int[Array, " W"]
    starts: Int[Array, " G"]
    ends: Int[Array, " G"]


def _work(group_sizes: Int[Array, " G"], num_rows: int, tile: int) -> tuple[Work, Int[Array, ""]]:
    """Return the pairs and their number.

    Neighbouring groups may share a tile, so there are at most G - 1 more pairs than tiles.
    """
    num_groups = group_sizes.shape[0]
    ends = jnp.cumsum(group_sizes, dtype=jnp.int32)
    starts = ends - group_sizes
    first = starts // tile
    count = jnp.where(group_sizes > 0, (ends - 1) // tile - first + 1, 0)
    last = jnp.cumsum(count, dtype=jnp.int32)
    index = jnp.arange(pl.cdiv(num_rows, tile) + num_groups - 1, dtype=jnp.int32)
    groups = jnp.sum(index[:, None] >= last[None, :], axis=1, dtype=jnp.int32)
    groups = jnp.minimum(groups, num_groups - 1)
    tiles = first[groups] + index - (last - count)[groups]
    tiles = jnp.clip(tiles, 0, pl.cdiv(num_rows, tile) - 1)
    return Work(groups, tiles, starts, ends), last[-1]


def _run(plan: Plan, rows: Array, leaves: Any, layer: Array, group_sizes: Array) -> Array:
    """Call the kernel: rows [P, K] times matrices [K, plan.out] of a stack."""
    met = min(group_sizes.shape[0], rows.shape[0])
    if plan.transposed:  # a gradient: rows of no group form one more group, which gets zeros
        left = rows.shape[0] - jnp.sum(group_sizes, keepdims=True)
        group_sizes = jnp.concatenate([group_sizes, left])
    work, num_steps = _work(group_sizes, rows.shape[0], plan.rows_tile)
    contracted = rows.shape[1]
    in_specs = [
        pl.BlockSpec((plan.rows_tile, contracted), lambda n, i, _, tiles, *__: (tiles[i], 0)),
        *(_weight_spec(plan, leaf, k) for k, leaf in enumerate(leaves)),
    ]
    out_spec = pl.BlockSpec(
        (plan.rows_tile, plan.out_tile), lambda n, i, _, tiles, *__: (tiles[i], n)
    )
    matrix = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) // (
        leaves[0].shape[0] * leaves[0].shape[1]
    )
    tiles_out = pl.cdiv(plan.out, plan.out_tile)
    return pl.pallas_call(
        functools.partial(_kernel, plan),
        out_shape=jax.ShapeDtypeStruct((rows.shape[0], plan.out), rows.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(tiles_out, num_steps),
            in_specs=in_specs,
            out_specs=out_spec,
            scratch_shapes=_scratch(plan, leaves[0].shape[3], rows.dtype),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=plan.vmem
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * rows.shape[0] * contracted * plan.out,
            bytes_accessed=rows.size * rows.dtype.itemsize * tiles_out
            + rows.shape[0] * plan.out * rows.dtype.itemsize
            + met * matrix,
            transcendentals=0,
        ),
        interpret=chips.tpu_interpreter(),
        name=f"grouped_matmul_{plan.layout}{'_d_rows' if plan.transposed else ''}",
    )(*work, layer.reshape(1), rows, *leaves)


def _weight_spec(plan: Plan, leaf: Array, which: int) -> pl.BlockSpec:
    """Return the BlockSpec of codes (leaf 0), of scales (leaf 1), or of a dense weight."""
    shape = leaf.shape
    if plan.layout == "dense":
        block = (shape[2], plan.out_tile) if plan.transposed else (plan.out_tile, shape[3])
    elif plan.transposed:
        height = _height(plan, plan.out_tile)
        if which == 1:
            height = pl.cdiv(height // MXFP4_BLOCK, SCALE_ROWS) * SCALE_ROWS
        elif plan.layout == "columns":
            height //= 2
        block = min(height, shape[2]), shape[3]
    else:
        block = shape[2], _tile_width(plan, shape[3])
    along_columns = plan.transposed == (plan.layout == "dense")

    def index(n: Any, i: Any, groups: Any, _: Any, __: Any, ___: Any, layer: Any) -> tuple:
        place = (0, n) if along_columns else (n, 0)
        return layer[0], jnp.minimum(groups[i], shape[1] - 1), *place

    return pl.BlockSpec((None, None, *block), index)


def _tile_width(plan: Plan, stored: int) -> int:
    """Return the number of columns of a packed matrix in a tile; `stored` is the padded N."""
    return stored if plan.transposed or plan.out_tile == plan.out else plan.out_tile


def _scratch(plan: Plan, stored: int, dtype: Any) -> list[Any]:
    """Return scratch memory for the decoded tile and its scales."""
    if plan.layout == "dense":
        return []
    width = _tile_width(plan, stored)
    height = _height(plan, plan.out_tile if plan.transposed else plan.columns)
    blocks = pl.cdiv(height // MXFP4_BLOCK, SCALE_ROWS) * SCALE_ROWS
    return [pltpu.VMEM((height, width), dtype), pltpu.VMEM((blocks, width), jnp.float32)]


def _height(plan: Plan, size: int) -> int:
    """Round `size`, a tile's part of C, up to whole decoding steps."""
    step = STEP[plan.layout]
    return pl.cdiv(size, step) * step


def _kernel(plan: Plan, groups: Any, tiles: Any, starts: Any, ends: Any, layer: Any, *refs: Any):
    del layer
    x, out = refs[0], refs[2 if plan.layout == "dense" else 3]
    i = pl.program_id(1)
    group = groups[i]
    row = tiles[i] * plan.rows_tile + lax.broadcasted_iota(jnp.int32, out.shape, 0)
    inside = (row >= starts[group]) & (row < ends[group])

    def store(values: Any) -> None:
        # The other rows of the tile belong to earlier or later groups.
        out[...] = jnp.where(inside, values, out[...].astype(jnp.float32)).astype(out.dtype)

    def multiply() -> None:
        if plan.layout == "dense":
            matrix = refs[1][...].astype(x.dtype)
            contract = 0 if plan.transposed else 1
        else:
            codes, scales, _, decoded, factors = refs[1:]

            @pl.when((i == 0) | (groups[jnp.maximum(i - 1, 0)] != group))
            def _():
                _decode(plan.layout, codes, scales, decoded, factors)

            contract = 1 if plan.transposed else 0
            size = (plan.out_tile, x.shape[1]) if plan.transposed else (x.shape[1], plan.out_tile)
            matrix = decoded[: size[0], : size[1]]
        product = lax.dot_general(
            x[...],
            matrix,
            (((1,), (contract,)), ((), ())),
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT,
            preferred_element_type=jnp.float32,
        )
        store(product)

    if plan.transposed:
        nothing = group == starts.shape[0] - 1
        pl.when(nothing)(lambda: store(0.0))
        pl.when(~nothing)(multiply)
    else:
        multiply()


def _decode(layout: str, codes: Any, scales: Any, decoded: Any, factors: Any) -> None:
    """Fill `decoded` [C, N] from tiles of codes and scales."""
    step = STEP[layout]
    # Nibbles and int8 give twice the value. Exponents stay at 0 or above: blocks with scale bytes 0
    # and 1 hold only zeros.
    half = 0 if layout == "fp4" else 1
    exponents = jnp.maximum(scales[: factors.shape[0], :].astype(jnp.int32) - half, 0)
    factors[...] = lax.bitcast_convert_type(exponents << 23, jnp.float32)
    height, width = decoded.shape

    def part(row: Any, num_blocks: int, lane: Any, num_lanes: int) -> None:
        lanes = pl.ds(lane, num_lanes)
        first = pl.multiple_of(row // MXFP4_BLOCK, SUBLANES)
        factor = factors[pl.ds(first, SUBLANES), lanes]
        for start in range(0, num_blocks * MXFP4_BLOCK, step):
            at = pl.multiple_of(row + start, step)
            for k, values in enumerate(_values(layout, codes, at, lanes)):
                b = start // MXFP4_BLOCK + k
                place = pl.ds(pl.multiple_of(at + k * MXFP4_BLOCK, MXFP4_BLOCK), MXFP4_BLOCK)
                decoded[place, lanes] = (values * factor[b : b + 1]).astype(decoded.dtype)

    def across(row: Any, num_blocks: int) -> None:
        """Decode from row `row` on, in turns of as many columns as fit in the registers."""
        whole, rest = divmod(width, LANES)
        if whole:

            def turn(j: Any, _: Any) -> None:
                part(row, num_blocks, pl.multiple_of(j * LANES, LANES), LANES)

            lax.fori_loop(0, whole, turn, None)
        if rest:
            part(row, num_blocks, whole * LANES, rest)

    rows = SUBLANES * MXFP4_BLOCK
    whole, rest = divmod(height, rows)
    if whole:
        lax.fori_loop(0, whole, lambda g, _: across(pl.multiple_of(g * rows, rows), SUBLANES), None)
    if rest:
        across(whole * rows, rest // MXFP4_BLOCK)


def _values(layout: str, codes: Any, row: Any, lanes: Any) -> list[Array]:
    """Return the blocks from row `row` of C on, in float32, without their scales."""
    step = STEP[layout]
    if layout == "columns":
        place = pl.ds(pl.multiple_of(row // 2, step // 2), step // 2)
        both = codes[place, lanes].astype(jnp.int32)
        return [_twice(both, 0), _twice(both, 4)]
    values = codes[pl.ds(row, step), lanes]
    if layout == "int8":
        values = values.astype(jnp.int32)
        return [jnp.where(values == MINUS_ZERO, 0, values).astype(jnp.float32)]
    values = values.astype(jnp.float32)
    return [values[:MXFP4_BLOCK], values[MXFP4_BLOCK:]]


def _twice(both: Int[Array, "32 n"], shift: int) -> Float[Array, "32 n"]:
    """Return twice the values of the nibbles at bit `shift`, from a table in one word."""
    place = (both << 2 if shift == 0 else both >> 2) & 28
    magnitude = (jnp.int32(TWICE) >> place & 15).astype(jnp.float32)
    sign = (both << (28 - shift)) & jnp.int32(-(1 << 31))
    return lax.bitcast_convert_type(
        lax.bitcast_convert_type(magnitude, jnp.int32) | sign, jnp.float32
    )


def _layout(stack: Any) -> str:
    if isinstance(stack, Relaid):
        return stack.layout
    return "columns" if isinstance(stack, MXFP4) else "dense"


def _width(weight: Any) -> int:
    width = 1
    for size in weight.shape[1:-1]:
        width *= size
    return width


def _plan(
    layout: str, num_rows: int, width: int, columns: int, *, transposed: bool, dtype: Any
) -> Plan | None:
    """Return tiles that fit the chip's fast memory, or None."""
    blocks: Blocks = BLOCKS[chips.current().kind]
    out = columns if transposed else width
    contracted = width if transposed else columns
    limit = blocks.dense if layout == "dense" else blocks.packed
    rows_tile = min(blocks.rows, num_rows)
    out_tile = min(limit, out)
    item = jnp.dtype(dtype).itemsize
    while True:
        plan = Plan(layout, transposed, columns, out, rows_tile, out_tile, blocks.vmem)
        if _bytes(plan, contracted, item) <= blocks.vmem:
            return plan
        if rows_tile > 128:
            rows_tile = pl.cdiv(rows_tile, 32) * 16
        elif out_tile > 128 and not (layout != "dense" and transposed):
            out_tile = pl.cdiv(out_tile, 256) * 128
        else:
            return None


def _bytes(plan: Plan, contracted: int, item: int) -> int:
    """Return the bytes of a step: two of each tile that is fetched or written, and the product."""
    streamed = plan.rows_tile * (contracted + plan.out_tile) * item
    product = 3 * plan.rows_tile * plan.out_tile * 4
    weight = contracted * plan.out_tile
    if plan.layout == "dense":
        return 2 * (streamed + weight * item) + product
    codes = weight if plan.layout == "int8" else weight // 2
    return 2 * (streamed + codes) + weight * item + weight // 8 + product
