"""Grouped matmuls for Hopper in Mosaic GPU: the shared frame, and the dense kernels.

Work is cut into items: tiles of a group's rows, times tiles of the result's columns. A group's
first tile of rows starts at the multiple of 8 at or before its first row. XLA computes beforehand
which item belongs to which group, a few hundred integers. Persistent thread blocks of one warpgroup
take items in turn. Two of them fit on a multiprocessor, so the loads and stores of one overlap with
the products of the other. If an axis is not a multiple of its tile, TMA reads zeros past its end
and writes nothing there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from gptoss_jax import chips


class Tile(NamedTuple):
    """The size of a tile of the result, and how its operands are loaded."""

    rows: int
    columns: int
    depth: int  # of the contracted axis, in one load
    stages: int  # loads in flight


class Blocks(NamedTuple):
    """Tiles of the kernels, and `resident`, the number of persistent thread blocks."""

    dense: Tile
    weight: Tile  # the dense weight's gradient: N, C, rows of a group
    packed: Tile
    packed_rows: Tile  # the gradient of rows from a packed weight
    resident: int


ALIGN = 8  # rows of a shared-memory tile for the tensor cores, and so for TMA
WIDE, NARROW = 64, 32  # columns of such a tile; TMA fills only whole tiles
# 192 columns divide 2880 and 5760. Of all widths that fit in a thread's registers without spills,
# 192 needs the least bandwidth of the L2 cache: 53 bytes per cycle of the tensor cores for dense
# weights, 29 for packed ones. Two such thread blocks fit in the registers of a multiprocessor, and
# with two stages in its shared memory. All this was counted; nothing was timed on a device.
_TILE = Tile(rows=128, columns=192, depth=64, stages=2)
_TILES = Blocks(dense=_TILE, weight=_TILE, packed=_TILE, packed_rows=_TILE, resident=2 * 132)
BLOCKS = {"h200": _TILES, "h100": _TILES}


INTERPRETED = 4  # thread blocks in the interpreter, whose race detection has a cost per block


class Work(NamedTuple):
    """Work items: the matrix, the tile of rows, and which rows of the tile belong to the group.

    The tile starts at row `start`, a multiple of `ALIGN`. The item has `size` rows from
    `start + skip` on. An item of size 0 is empty.
    """

    matrix: Int[Array, " I"]
    start: Int[Array, " I"]
    skip: Int[Array, " I"]
    size: Int[Array, " I"]


def work_items(
    group_sizes: Int[Array, " E"], first_matrix: Int[Array, ""], num_rows: int, tile: int
) -> Work:
    """Cut the groups' rows into tiles; the number of items is enough for any group sizes."""
    sizes = group_sizes.astype(jnp.int32)
    num_groups = sizes.shape[0]
    ends = jnp.cumsum(sizes)
    starts = (ends - sizes) // ALIGN * ALIGN
    tiles = jnp.where(sizes > 0, -((starts - ends) // tile), 0)
    last = jnp.cumsum(tiles)
    # A nonempty group fills its tiles, up to ALIGN - 1 rows before it and tile - 1 after it.
    most = (num_rows + min(num_groups, num_rows) * (tile + ALIGN - 2)) // tile
    item = jnp.arange(most, dtype=jnp.int32)
    group = jnp.searchsorted(last, item, side="right").astype(jnp.int32)
    inside = group < num_groups
    group = jnp.minimum(group, num_groups - 1)
    start = starts[group] + (item - (last - tiles)[group]) * tile
    first = jnp.maximum((ends - sizes)[group], start)
    size = jnp.minimum(ends[group], start + tile) - first
    start, skip, size = (jnp.where(inside, x, 0) for x in (start, first - start, size))
    return Work(first_matrix + group, start, skip, size)


def swizzled(width: int, dtype: Any, *, rows: int = ALIGN) -> tuple:
    """Return the layout of a matrix in shared memory, in tiles of `width` columns.

    The tensor cores read tiles of 8 rows. With tiles of one row, TMA can copy any range of rows.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    itemsize = jnp.dtype(dtype).itemsize
    return plgpu.TilingTransform((rows, width)), plgpu.SwizzleTransform(width * itemsize)


def swizzle_width(*axes: int) -> int:
    """Return the width of the widest tiles that divide all these axes; 32 divides them."""
    return WIDE if all(axis % WIDE == 0 for axis in axes) else NARROW


def multiply(
    rows: Float[Array, "P K"],
    weights: Sequence[Array],
    work: Work,
    *,
    columns: int,
    tile: Tile,
    width: int,
    specs: Sequence[Any],
    scratch: Sequence[Any],
    product: Callable[..., None],
) -> Float[Array, "P columns"]:
    """Return each item's rows times its matrix; rows of no item may hold anything.

    `weights` are arrays [matrices, ...]. `specs` are functions j -> BlockSpec, one per weight, for
    tile j of columns; a BlockSpec says which block of the matrix step k loads.

    `product(step, accumulator, rows, *blocks, *scratch)` adds the product of one step. One product
    may still run when the next step begins, and `product` has to wait for all but that one.
    Otherwise TMA overwrites operands that the tensor cores still read. The interpreter can't find
    this error, because it multiplies immediately.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    num_rows, contracted = rows.shape
    across = pl.cdiv(columns, tile.columns)
    # The result is written in tiles of one row, which can't have the narrow width.
    padded = pl.cdiv(columns, WIDE) * WIDE

    def body(matrix_ref, start_ref, skip_ref, size_ref, rows_ref, *refs):
        *weight_refs, out_ref = refs

        @plgpu.nd_loop((work.matrix.shape[0], across), collective_axes="block")
        def _(loop):
            item, j = loop.index
            start, size = pl.multiple_of(start_ref[item], ALIGN), size_ref[item]

            @pl.when(size > 0)
            def _():
                def accumulate(accumulator, *scratch_refs):
                    plgpu.emit_pipeline(
                        lambda index, *blocks: product(
                            index[0], accumulator, *blocks, *scratch_refs
                        ),
                        grid=(pl.cdiv(contracted, tile.depth),),
                        in_specs=[
                            plgpu.BlockSpec(
                                (pl.Element(tile.rows), tile.depth),
                                lambda k: (start, k),
                                delay_release=1,
                                transforms=swizzled(width, rows.dtype),
                            ),
                            *(spec(j) for spec in specs),
                        ],
                        max_concurrent_steps=tile.stages,
                    )(rows_ref, *(ref.at[matrix_ref[item]] for ref in weight_refs))
                    return accumulator[...]

                # The interpreter needs separate allocations of registers and shared memory.
                def accumulated(*scratch_refs):
                    return pl.run_scoped(
                        lambda accumulator: accumulate(accumulator, *scratch_refs),
                        plgpu.WGMMAAccumulatorRef((tile.rows, tile.columns), jnp.float32),
                    )

                result = pl.run_scoped(accumulated, *scratch)
                _store(result, out_ref, (start, j * tile.columns), skip=skip_ref[item], size=size)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, padded), rows.dtype),
        grid=(_resident(),),
        grid_names=("block",),
        interpret=chips.gpu_interpreter(),
    )
    return kernel(*work, rows, *weights)[:, :columns]


def _resident() -> int:
    chip = chips.current()
    return INTERPRETED if chip.interpret else BLOCKS[chip.kind].resident


def _store(result: Any, out_ref: Any, at: tuple[Any, Any], *, skip: Any, size: Any) -> None:
    """Write `size` rows of `result`, from row `skip` on; `result` belongs at (row, column) `at`.

    A TMA write has a static shape, so `size` is split into powers of two.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    tile_rows, tile_columns = result.shape

    def write(staged):
        staged[...] = result.astype(staged.dtype)
        plgpu.commit_smem()
        row = skip
        count = 1 << (min(tile_rows, out_ref.shape[0]).bit_length() - 1)
        while count:

            @pl.when(size & count != 0)
            def _(row=row, count=count):
                plgpu.copy_smem_to_gmem(
                    staged.at[pl.ds(row, count)],
                    out_ref.at[pl.ds(at[0] + row, count), pl.ds(at[1], tile_columns)],
                )

            row = row + (size & count)
            count //= 2
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    transforms = swizzled(WIDE, out_ref.dtype, rows=1)
    staged = plgpu.SMEM((tile_rows, tile_columns), out_ref.dtype, transforms=transforms)
    pl.run_scoped(write, staged)


def dense(
    rows: Float[Array, "P K"],
    weight: Float[Array, "matrices N C"],
    work: Work,
    *,
    transposed: bool,
    tile: Tile,
) -> Float[Array, "P Q"]:
    """Return the product of each work item's rows and its matrix, or the matrix's transpose.

    With `transposed` the result is [P, N] from rows [P, C]; otherwise it is [P, C] from [P, N].
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    width = swizzle_width(*weight.shape[1:])

    def spec(j):
        block, at = (tile.columns, tile.depth), lambda k: (j, k)
        if not transposed:
            block, at = (tile.depth, tile.columns), lambda k: (k, j)
        return plgpu.BlockSpec(block, at, delay_release=1, transforms=swizzled(width, weight.dtype))

    def product(step, accumulator, rows_smem, weight_smem):
        del step
        plgpu.wgmma(
            accumulator, rows_smem, weight_smem.transpose((1, 0)) if transposed else weight_smem
        )
        plgpu.wgmma_wait(1)

    return multiply(
        rows,
        (weight,),
        work,
        columns=weight.shape[1 if transposed else 2],
        tile=tile,
        width=width,
        specs=[spec],
        scratch=(),
        product=product,
    )


def weight_gradient(
    d_out: Float[Array, "P N"],
    rows: Float[Array, "P C"],
    group_sizes: Int[Array, " E"],
    *,
    tile: Tile,
) -> Float[Array, "E N C"]:
    """Return d_out.T @ rows over each group's rows; zeros for an empty group.

    In the first and the last block of a group, a select zeroes rows of other groups, which may hold
    NaN.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    sizes = group_sizes.astype(jnp.int32)
    ends = jnp.cumsum(sizes)
    (n, c), num_groups = (d_out.shape[1], rows.shape[1]), sizes.shape[0]
    transforms = swizzled(swizzle_width(n, c), rows.dtype)

    def body(first_ref, end_ref, d_out_ref, rows_ref, out_ref):
        @plgpu.nd_loop(
            (num_groups, pl.cdiv(n, tile.rows), pl.cdiv(c, tile.columns)), collective_axes="block"
        )
        def _(loop):
            group, i, j = loop.index
            first, end = first_ref[group], end_ref[group]
            start = lax.div(first, ALIGN) * ALIGN
            steps = lax.div(end - start + tile.depth - 1, tile.depth)

            def accumulate(accumulator):
                def product(index, d_out_smem, rows_smem):
                    row = start + index[0] * tile.depth

                    @pl.when((row < first) | (row + tile.depth > end))
                    def _():
                        for smem in (d_out_smem, rows_smem):
                            _keep_rows(smem, first - row, end - row)
                        plgpu.commit_smem()

                    plgpu.wgmma(accumulator, d_out_smem.transpose((1, 0)), rows_smem)
                    plgpu.wgmma_wait(1)

                def spec(width, at):
                    return plgpu.BlockSpec(
                        (pl.Element(tile.depth), width),
                        lambda k: (pl.multiple_of(start + k * tile.depth, ALIGN), at),
                        delay_release=1,
                        transforms=transforms,
                    )

                @pl.when(end > first)
                def _():
                    plgpu.emit_pipeline(
                        product,
                        grid=(steps,),
                        in_specs=[spec(tile.rows, i), spec(tile.columns, j)],
                        max_concurrent_steps=tile.stages,
                    )(d_out_ref, rows_ref)

                return accumulator[...]

            result = pl.run_scoped(
                accumulate, plgpu.WGMMAAccumulatorRef((tile.rows, tile.columns), jnp.float32)
            )

            def write(staged):
                staged[...] = result.astype(staged.dtype)
                plgpu.commit_smem()
                at = (pl.ds(i * tile.rows, tile.rows), pl.ds(j * tile.columns, tile.columns))
                plgpu.copy_smem_to_gmem(staged, out_ref.at[group].at[at])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            staged = plgpu.SMEM((tile.rows, tile.columns), out_ref.dtype, transforms=transforms)
            pl.run_scoped(write, staged)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_groups, n, c), rows.dtype),
        grid=(_resident(),),
        grid_names=("block",),
        interpret=chips.gpu_interpreter(),
    )
    return kernel(ends - sizes, ends, d_out, rows)


def _keep_rows(smem: Any, first: Any, end: Any) -> None:
    """Set rows before `first` and from `end` on to zero."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    for column in range(0, smem.shape[1], WIDE):  # all at once would take too many registers
        part = smem.at[:, pl.ds(column, WIDE)]
        values = part[...]
        row = plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
        part[...] = jnp.where((row >= first) & (row < end), values, jnp.zeros_like(values))
