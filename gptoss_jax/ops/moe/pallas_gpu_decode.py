"""Experts for a decode batch on Hopper: packed weights are read once and decoded in registers.

The pairs (row, slot) are grouped by expert, with up to R pairs of one expert in a group. The grid
is (tile of rows of the matrix, group). A thread block takes 64 rows of a matrix, 16 per warp: 32 of
gate with the same 32 of up, or 64 of down. TMA loads bytes several stages ahead, directly from the
stack of layers and experts. Every 64 columns are decoded to pairs of fp16 and multiplied by the
group's rows on the tensor cores (`mma` of 16 x 8 x 16), so that eight rows cost as much as one.

A nibble becomes the fp16 number with the nibble's sign, and with its other three bits at bits 11 to
9. This is the value times 2**-14, and it is exact. Codes 1 and 9 become subnormals, which tensor
cores keep. The scale of a block multiplies the block's float32 sum and also undoes the factor
2**-14. Scale bytes 2 to 240 are exact.

The rows of x are fp16 too. Each row is scaled by a power of two that brings its largest entry to
2**14 or more, so a bfloat16 entry is exact unless it is less than 2**-31 of the largest. The values
of swiglu are fp16 scaled by one power of two, if the clamp keeps them in range; otherwise they are
scaled like rows of x.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.grouped_matmul.weights import as_stack
from gptoss_jax.ops.moe.reference import clamped_swiglu
from gptoss_jax.types import MXFP4_BLOCK, LayerOf, Relaid

plgpu: Any = mosaic_gpu  # from jax 0.11.2 on; older versions have other names


class Blocks(NamedTuple):
    """How the work is divided on a chip."""

    rows: int  # most rows of x in a group: 2, 4 or the tensor core's 8
    gate_up_stages: int  # stages of bytes in flight, for each thread block
    down_stages: int
    splits: int  # of the down projection's columns, as its tiles alone leave multiprocessors idle


# By M, the rows of the batch: the first entry that is at least M applies. Chosen by counting, not
# timed. For one expert, gate and up have 90 tiles and down has 45. Three stages take 54 KiB, so
# four thread blocks share a multiprocessor, with 120 KiB in flight. Two stages take 35 KiB, and the
# 540 blocks of a row's four experts in three splits all run at once.
FEW, SOME = Blocks(2, 3, 2, 3), Blocks(4, 3, 2, 3)
MANY = Blocks(8, 3, 3, 1)
BLOCKS = {chip: {2: FEW, 4: SOME, 64: MANY} for chip in chips.HOPPER}
MAX_ROWS = 64  # rows of a batch; a larger batch needs a kernel that reuses a decoded tile
HALF = 32  # rows of the matrix in half a tile: gate and up, or two halves of down
TILE = 2 * HALF
COLUMNS = 8  # of the tensor core's tile: rows of x, and padding
GROUP = 2 * MXFP4_BLOCK  # columns of the matrix in 32 bytes
GRANULES = 8  # most granules (32 bytes) of a row in one TMA copy
SHIFT = 14  # a decoded nibble is the value times 2**-SHIFT
TOP = 14  # a row's largest entry in fp16 is in [2**TOP, 2**(TOP + 1)), the top of fp16's range
RAISED = 8  # sums are scaled by 2**-RAISED, or scale byte 240 would overflow
FP16_MAX = 65504.0


def refuse(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Any,
    gate_up_bias: Any,
    down_weight: Any,
    down_bias: Any,
) -> str | None:
    """Return why the kernel can't take these arguments here, or None."""
    del expert_ids, expert_weights, gate_up_bias, down_bias
    reason = chips.refuse_hopper_kernel()
    if reason is not None:
        return reason
    for name, weight in (("gate_up_weight", gate_up_weight), ("down_weight", down_weight)):
        stack = weight.stack if isinstance(weight, LayerOf) else weight
        if not isinstance(stack, Relaid) or stack.layout != "hopper":
            return f'it takes weights packed in the layout "hopper", and {name} is not'
    if x.dtype != jnp.bfloat16:
        return f"x has to be bfloat16, and it is {x.dtype}"
    if x.shape[1] < TILE:
        return f"it takes {TILE} rows of a matrix at a time, and down_weight has {x.shape[1]}"
    if x.shape[0] > MAX_ROWS:
        return f"it is for {MAX_ROWS} rows at most, and x has {x.shape[0]}"
    return None


def experts(
    x: Float[Array, "M D"],
    expert_ids: Int[Array, "M A"],
    expert_weights: Float[Array, "M A"],
    *,
    gate_up_weight: Relaid | LayerOf,
    gate_up_bias: Float[Array, "E 2 F"] | LayerOf,
    down_weight: Relaid | LayerOf,
    down_bias: Float[Array, "E D"] | LayerOf,
    limit: float,
    mask: Bool[Array, " M"] | None,
) -> Float[Array, "M D"]:
    """Run the routed experts as `ops.moe.experts` does; no gradient is defined.

    Temporary memory is a few rows of D and F per pair. No weight is copied or gathered.
    """
    num_experts, _, width = gate_up_bias.shape
    sizes = BLOCKS[chips.current().kind]
    blocks = next(blocks for most, blocks in sizes.items() if len(x) <= most)
    ids = expert_ids if mask is None else jnp.where(mask[:, None], expert_ids, num_experts)
    groups = _group(ids, num_experts=num_experts, size=blocks.rows)
    shift = _shift(limit)
    hidden = _hidden(
        x, groups, gate_up_weight, gate_up_bias, limit=limit, shift=shift, blocks=blocks
    )
    if shift is None:
        act, factors = _to_fp16(hidden[:, : blocks.rows], columns=_padded(width))
        factors = jnp.pad(factors, ((0, 0), (0, COLUMNS - blocks.rows)))
    else:
        act = jnp.pad(hidden, ((0, 0), (0, 0), (0, _padded(width) - width)))
        factors = 2.0 ** (RAISED - shift)
    down, layer = _stack(down_weight)
    y = _down(layer[None], groups.expert, act, factors, down, blocks=blocks)
    return _combine(y, groups, ids, expert_weights, down_bias).astype(x.dtype)


def _hidden(
    x: Float[Array, "M D"],
    groups: Groups,
    weight: Any,
    bias: Any,
    *,
    limit: float,
    shift: int | None,
    blocks: Blocks,
) -> Float[Array, "G 8 F"]:
    """Return swiglu of each group's rows, as `_gate_up` does."""
    operand, factors = _to_fp16(x.astype(jnp.float32), columns=_padded(x.shape[1]))
    row = groups.pair // groups.group.shape[1]
    weight, layer = _stack(weight)
    bias, bias_layer = _stack(bias)
    return _gate_up(
        layer[None],
        bias_layer[None],
        groups.expert,
        operand[row],
        jnp.pad(factors[row], ((0, 0), (0, COLUMNS - blocks.rows))),
        weight,
        bias,
        limit=limit,
        shift=shift,
        blocks=blocks,
    )


class Groups(NamedTuple):
    """The routed pairs, grouped by expert. A group with expert E is empty, and nothing runs."""

    expert: Int[Array, " G"]
    pair: Int[Array, "G R"]  # 0 for an unused place
    group: Int[Array, "M A"]  # the group of a pair
    slot: Int[Array, "M A"]  # the place of a pair in its group


def _group(ids: Int[Array, "M A"], *, num_experts: int, size: int) -> Groups:
    """Group pairs of the same expert, `size` per group, by comparing all pairs with each other.

    There are enough groups for any routing of P pairs: with R pairs per group, an expert leaves at
    most R - 1 places empty.
    """
    flat = ids.reshape(-1)
    pairs = flat.size
    if ids.shape[0] == 1:
        own = jnp.arange(pairs, dtype=jnp.int32).reshape(1, -1)
        return Groups(flat, jnp.repeat(own.T, size, axis=1), own, jnp.zeros_like(own))
    count = min(pairs, (pairs + (size - 1) * min(num_experts, pairs)) // size)
    index = jnp.arange(pairs, dtype=jnp.int32)
    routed = flat < num_experts
    earlier = index[None] < index[:, None]
    same = (flat[None] == flat[:, None]) & routed
    rank = jnp.sum(same & earlier, axis=1, dtype=jnp.int32)
    slot = rank % size
    first = (slot == 0) & routed
    number = jnp.sum(first[None] & earlier, axis=1, dtype=jnp.int32)
    leader = same & first[None] & (rank[None] == (rank - slot)[:, None])
    group = jnp.sum(jnp.where(leader, number[None], 0), axis=1)
    groups = jnp.arange(count, dtype=jnp.int32)
    opens = first[None] & (number[None] == groups[:, None])
    expert = num_experts + jnp.sum(jnp.where(opens, flat[None] - num_experts, 0), axis=1)
    places = jnp.arange(size, dtype=jnp.int32)
    inside = (group == groups[:, None]) & routed  # [G, P]
    holds = inside[:, None] & (slot == places[:, None])  # [G, R, P]
    pair = jnp.sum(jnp.where(holds, index, 0), axis=2)
    return Groups(expert, pair, group.reshape(ids.shape), slot.reshape(ids.shape))


def _to_fp16(x: Float[Array, "*n C"], *, columns: int) -> tuple[Array, Float[Array, "*n"]]:
    """Return rows in fp16, padded to `columns`, and a power of two for each row.

    A returned row times its power of two is the row of `x` times 2**RAISED.
    """
    largest = jnp.max(jnp.abs(x), axis=-1)
    # Rows below 2**-112 are scaled up less, so that both powers of two are normal numbers.
    exponent = jnp.maximum(lax.bitcast_convert_type(largest, jnp.int32) >> 23, 127 - 112)

    def power(biased: Array) -> Array:
        return lax.bitcast_convert_type(biased << 23, jnp.float32)

    scaled = (x * power(254 + TOP - exponent)[..., None]).astype(jnp.float16)
    pad = [(0, 0)] * (x.ndim - 1) + [(0, columns - x.shape[-1])]
    return jnp.pad(scaled, pad), power(exponent + (RAISED - TOP))


def _stack(weight: Any) -> tuple[Any, Int[Array, ""]]:
    return as_stack(weight)


def _padded(columns: int) -> int:
    return -(-columns // GROUP) * GROUP


def _shift(limit: float) -> int | None:
    """Return the exponent of the power of two that scales swiglu to fp16; None if out of range."""
    most = limit * (limit + 1)
    return int(np.floor(np.log2(FP16_MAX / most))) if most < FP16_MAX / 2**RAISED else None


def _combine(
    y: Float[Array, "S G 8 D"],
    groups: Groups,
    ids: Int[Array, "M A"],
    shares: Float[Array, "M A"],
    bias: Any,
) -> Float[Array, "M D"]:
    """Sum the splits, add the bias, and sum the slots of each row with their weights."""
    stack, layer = _stack(bias)
    num_experts, width = stack.shape[1:]
    whole = width // TILE * TILE
    routed = (ids < num_experts)[..., None]
    part = jnp.sum(y[:, groups.group, groups.slot], axis=0)
    if whole < width:
        part = jnp.concatenate([part[..., :whole], part[..., whole + HALF :]], axis=-1)
    part += stack[layer, jnp.minimum(ids, num_experts - 1)].astype(jnp.float32)
    return jnp.sum(jnp.where(routed, shares[..., None] * part, 0), axis=1)


# The layouts of arrays in registers. A warp has 16 rows of a tile; four lanes share a row.
SUMS = plgpu.Layout.WGMMA  # [64, 8] float32


def _codes_layout() -> Any:
    """Return the layout of [2, 32, 32] bytes: 8 per lane, with rows as in `SUMS`."""
    tiles = ((2, HALF, MXFP4_BLOCK), (1, 16, MXFP4_BLOCK), (8, MXFP4_BLOCK), (8,))
    return _tiled(tiles, warps=(-9, -8), lanes=(-3, -2))


def _rows_layout() -> Any:
    """Return the layout of [8, 32] fp16 entries of x: 8 per lane, the same in all warps."""
    return _tiled(((8, MXFP4_BLOCK), (8,)), warps=(plgpu.Replicated(4),), lanes=(-3, -2))


def _halves_layout() -> Any:
    """Return the layout of [2, 32], one entry per row of the tile, placed like `SUMS`' rows."""
    tiles = ((2, HALF), (1, 16), (8,), (1,))
    return _tiled(tiles, warps=(-6, -5), lanes=(-2, plgpu.Replicated(4)))


def _tiled(tiles: Any, *, warps: Any, lanes: Any) -> Any:
    """Return a layout made by repeated tiling; a lane's vector is the last axis."""
    from jax.experimental.mosaic import gpu as mgpu

    full = mgpu.TiledLayout(plgpu.Tiling(tiles), warps, lanes, -1, _check_canonical=False)
    layout = full.canonicalize()
    return plgpu.Layout.TILED(layout.tiling, layout.warp_dims, layout.lane_dims, layout.vector_dim)


def _products(
    codes: Array, low_rows: Array, high_rows: Array, *, emulate: bool
) -> tuple[Array, Array]:
    """Return 2**-14 times two products [64, 8] of 32 columns each, in float32.

    `codes` is uint8 [2, 32, 32]. Its low nibbles multiply `low_rows`, fp16 [8, 32], and its high
    nibbles multiply `high_rows`. The interpreter can't run the inlined code; `emulate` computes the
    same without it.
    """
    if emulate:
        codes = codes.reshape(TILE, MXFP4_BLOCK)

        def product(nibbles: Array, rows: Array) -> Array:
            wide = nibbles.astype(jnp.uint16)
            bits = ((wide & 8) << 12) | ((wide & 7) << 9)
            values = lax.bitcast_convert_type(bits, jnp.float16)
            return jnp.dot(values.astype(jnp.float32), rows.astype(jnp.float32).T)

        return product(codes & 15, low_rows), product(codes >> 4, high_rows)
    out = plgpu.ShapeDtypeStruct((TILE, COLUMNS), jnp.float32, layout=SUMS)

    @plgpu.inline_mgpu(
        arg_types=(_codes_layout(), _rows_layout(), _rows_layout()), return_type=(out, out)
    )
    def run(_: Any, codes: Any, low_rows: Any, high_rows: Any) -> tuple[Any, Any]:
        low, high = _decode(codes)
        return _multiply(low, low_rows), _multiply(high, high_rows)

    return run(codes, low_rows, high_rows)


def _decode(codes: Any) -> tuple[list[Any], list[Any]]:
    """Return words of two fp16 for the low and the high nibbles, in the form for `mma`.

    Each lane has 8 bytes of rows g and g + 8. The words are in the order of the 16 x 8 parts of the
    operand: columns outermost, then the row. The order of columns is free, as long as x has the
    same: here bytes 2j and 2j + 1 of a lane are its two columns of part j.
    """
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    i32 = ir.IntegerType.get_signless(32)

    def constant(value: int) -> Any:
        return arith.constant(i32, ir.IntegerAttr.get(i32, np.int32(np.uint32(value)).item()))

    def shift(word: Any, left: int) -> Any:
        if left == 0:
            return word
        op = arith.shli if left > 0 else arith.shrui
        return op(word, constant(abs(left)))

    def fp16(word: Any, nibble: int) -> Any:
        """Convert one nibble of each half of the word: sign to bit 15, the rest to bits 11 to 9."""
        sign = arith.andi(shift(word, 12 - 4 * nibble), constant(0x80008000))
        rest = arith.andi(shift(word, 9 - 4 * nibble), constant(0x0E000E00))
        return arith.ori(sign, rest)

    low: list[Any] = [None] * 8
    high: list[Any] = [None] * 8
    for half, register in enumerate(codes.registers.flatten()):
        words = vector.bitcast(ir.VectorType.get((2,), i32), register)
        for i in range(2):
            word = vector.extract(
                words, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
            )
            # Move bytes 0 and 1 to the low bytes of the halves, and bytes 2 and 3 to the high ones.
            word = utils.prmt(word, word, constant(0x3120))
            for j in range(2):
                low[2 * (2 * i + j) + half] = fp16(word, 2 * j)
                high[2 * (2 * i + j) + half] = fp16(word, 2 * j + 1)
    return low, high


def _multiply(words: list[Any], rows: Any) -> Any:
    """Multiply words from `_decode` by rows of x."""
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    f16, f32 = ir.F16Type.get(), ir.F32Type.get()
    pair = ir.VectorType.get((2,), f16)
    layouts = mgpu.MMALayouts(jnp.float16)

    def array(registers: list[Any], layout: Any, shape: tuple[int, int]) -> Any:
        filled = np.array(registers, dtype=object).reshape(layout.registers_shape(shape))
        return mgpu.FragmentedArray(_registers=filled, _layout=layout, _is_signed=None)

    a = [utils.bitcast(word, pair) for word in words]
    b = [
        utils.vector_slice(register, slice(2 * j, 2 * j + 2))
        for register in rows.registers.flatten()
        for j in range(4)
    ]
    zero = arith.constant(f32, ir.FloatAttr.get(f32, 0.0))
    zeros = mgpu.FragmentedArray.splat(zero, (TILE, COLUMNS), layouts.acc)
    return mgpu.mma(
        zeros,
        array(a, layouts.lhs, (TILE, MXFP4_BLOCK)),
        array(b, layouts.rhs, (MXFP4_BLOCK, COLUMNS)),
    )


def _per_row(values: Float[Array, "2 32"], *, emulate: bool) -> Float[Array, "64 8"]:
    """Repeat one entry per row of the tile along the tile's columns."""
    if emulate:
        return jnp.broadcast_to(values.reshape(TILE, 1), (TILE, COLUMNS))

    @plgpu.inline_mgpu(
        arg_types=(_halves_layout(),),
        return_type=plgpu.ShapeDtypeStruct((TILE, COLUMNS), values.dtype, layout=SUMS),
    )
    def run(_: Any, values: Any) -> Any:
        from jax.experimental.mosaic import gpu as mgpu
        from jax.experimental.mosaic.gpu import utils

        layout = SUMS.to_mgpu()
        twice = [utils.vector_concat([one, one]) for one in values.registers.flatten()]
        filled = np.array(twice, dtype=object).reshape(layout.registers_shape((TILE, COLUMNS)))
        return mgpu.FragmentedArray(_registers=filled, _layout=layout, _is_signed=None)

    return run(values)


class Stream(NamedTuple):
    """How the bytes of a tile are loaded: in `steps` steps of `granules` * 32 bytes per row."""

    rows: int  # rows of x to copy
    granules: int
    steps: int
    stages: int

    @property
    def bytes(self) -> int:
        """Bytes of a row of the matrix in one step."""
        return self.granules * MXFP4_BLOCK

    @property
    def scratch(self) -> dict[str, Any]:
        """Shared memory and barriers, by name."""
        depth = min(self.stages, self.steps)
        scale_rows = 2 * self.granules * self.steps
        return {
            "tile": plgpu.SMEM((depth, 2, HALF, self.bytes), jnp.uint8),
            "rows": plgpu.SMEM((depth, 2, COLUMNS, self.bytes), jnp.float16),
            "block_scales": plgpu.SMEM((scale_rows, 2, HALF), jnp.uint8),
            "exchange": plgpu.SMEM((TILE, COLUMNS), jnp.float32),
            "ready": plgpu.Barrier(num_arrivals=3, num_barriers=depth),
            "scaled": plgpu.Barrier(num_arrivals=1),
        }


def _stream(bytes_: int, *, rows: int, stages: int, splits: int) -> tuple[Stream, int]:
    """Choose the granules of a step; return the stream and the number of splits (or 1).

    The number of granules is odd: rows of shared memory that are an odd multiple of 32 bytes apart
    have no bank conflicts. If `splits` does not divide the steps, there is one split.
    """
    granules = bytes_ // MXFP4_BLOCK
    each = max(n for n in range(1, GRANULES, 2) if granules % n == 0)
    steps = granules // each
    splits = splits if steps % splits == 0 else 1
    return Stream(rows, each, steps // splits, stages), splits


def _accumulate(
    stream: Stream,
    *,
    codes: Any,
    scales: Any,
    x: Any,
    split: Any,
    scratch: dict[str, Any],
    emulate: bool,
) -> Float[Array, "64 8"]:
    """Multiply a tile by the group's rows of x, over the columns of `split`.

    Shapes in global memory: `codes` [2, 32, bytes], `scales` [blocks, 2, 32], `x` [R or more,
    columns].
    """
    depth = min(stream.stages, stream.steps)
    count = 2 * stream.granules * stream.steps
    plgpu.copy_gmem_to_smem(
        scales.at[pl.ds(split * count, count)], scratch["block_scales"], scratch["scaled"]
    )

    def fetch(step: Any, slot: Any) -> None:
        at = (split * stream.steps + step) * stream.bytes
        plgpu.copy_gmem_to_smem(
            codes.at[:, :, pl.ds(at, stream.bytes)],
            scratch["tile"].at[slot],
            scratch["ready"].at[slot],
        )
        for half in range(2):
            plgpu.copy_gmem_to_smem(
                x.at[pl.ds(0, stream.rows), pl.ds(2 * at + half * stream.bytes, stream.bytes)],
                scratch["rows"].at[slot, half, pl.ds(0, stream.rows)],
                scratch["ready"].at[slot],
            )

    for step in range(depth):
        fetch(step, step)
    plgpu.barrier_wait(scratch["scaled"])

    def factor(block: Any) -> Array:
        byte = plgpu.load(
            scratch["block_scales"].at[block], layout=_halves_layout(), optimized=False
        )
        bits = (byte.astype(jnp.int32) << 23) + ((SHIFT - RAISED) << 23)
        return _per_row(lax.bitcast_convert_type(bits, jnp.float32), emulate=emulate)

    def rows(slot: Any, granule: int) -> Array:
        half, at = divmod(granule * MXFP4_BLOCK, stream.bytes)
        tile = scratch["rows"].at[slot, half, :, pl.ds(at, MXFP4_BLOCK)]
        return plgpu.load(tile, layout=_rows_layout(), optimized=False)

    def body(step: Any, total: Array) -> Array:
        slot = lax.rem(step, depth)
        plgpu.barrier_wait(scratch["ready"].at[slot])
        for g in range(stream.granules):
            tile = scratch["tile"].at[slot, :, :, pl.ds(g * MXFP4_BLOCK, MXFP4_BLOCK)]
            low, high = _products(
                plgpu.load(tile, layout=_codes_layout(), optimized=False),
                rows(slot, 2 * g),
                rows(slot, 2 * g + 1),
                emulate=emulate,
            )
            block = 2 * (step * stream.granules + g)
            total = total + low * factor(block)
            total = total + high * factor(block + 1)

        @pl.when(step + depth < stream.steps)
        def _() -> None:
            plgpu.commit_smem()  # finish reads of the slot before TMA writes to it
            fetch(step + depth, slot)

        return total

    zeros = plgpu.layout_cast(jnp.zeros((TILE, COLUMNS), jnp.float32), SUMS)
    return lax.fori_loop(0, stream.steps, body, zeros)


def _transposed_halves(total: Float[Array, "64 8"], exchange: Any) -> tuple[Array, Array]:
    """Transpose the two halves of a tile to [8, 32] each, by way of shared memory."""
    exchange[...] = total

    def half(i: int) -> Array:
        part = exchange.at[pl.ds(i * HALF, HALF)].transpose((1, 0))
        layout = plgpu.Layout.WG_STRIDED((COLUMNS, HALF), vec_size=1)
        return plgpu.load(part, layout=layout, optimized=False)

    return half(0), half(1)


def _by_column(values: Any) -> Float[Array, "64 8"]:
    """Load a vector [8] and repeat it along the tile's rows."""
    row = plgpu.load(values, layout=SUMS.reduce(0), optimized=False)
    return lax.broadcast_in_dim(row, (TILE, COLUMNS), (1,))


def _kernel(body: Any, *, grid: tuple[int, ...], stream: Stream, out: Any, name: str) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=stream.scratch,
        grid=grid,
        grid_names=("group", "tile", "split"),
        kernel_name=name,
        interpret=chips.gpu_interpreter(),
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, approx_math=False
        ),
    )


def _gate_up(
    layer: Int[Array, " 1"],
    bias_layer: Int[Array, " 1"],
    expert: Int[Array, " G"],
    x: Float[Array, "G R C"],
    factors: Float[Array, "G 8"],
    weight: Relaid,
    bias: Float[Array, "L E 2 F"],
    *,
    limit: float,
    shift: int | None,
    blocks: Blocks,
) -> Float[Array, "G 8 F"]:
    """Return swiglu of the group's rows; rows past R are undefined.

    The result is fp16 and scaled by 2**shift, or float32 if `shift` is None.
    """
    num_experts, width = weight.shape[1], bias.shape[-1]
    stream, _ = _stream(
        weight.codes.shape[-1], rows=blocks.rows, stages=blocks.gate_up_stages, splits=1
    )
    lead = weight.codes.shape[:2]
    emulate = chips.current().interpret
    dtype = jnp.float32 if shift is None else jnp.float16

    def body(
        layer: Any, bias_layer: Any, expert: Any, x: Any, factors: Any, codes: Any, scales: Any,
        bias: Any, out: Any, **scratch: Any,
    ) -> None:  # fmt: skip
        group, tile = lax.axis_index("group"), lax.axis_index("tile")
        e = expert[group]

        @pl.when(e < num_experts)
        def _() -> None:
            row = pl.ds(tile * HALF, HALF)
            total = _accumulate(
                stream,
                codes=codes.at[layer[0], e, :, row],
                scales=scales.at[layer[0], e, :, :, row],
                x=x.at[group],
                split=0,
                scratch=scratch,
                emulate=emulate,
            )
            added = plgpu.load(
                bias.at[bias_layer[0], e, :, row], layout=_halves_layout(), optimized=False
            )
            total = total * _by_column(factors.at[group])
            total = total + _per_row(added.astype(jnp.float32), emulate=emulate)
            gate, up = _transposed_halves(total, scratch["exchange"])
            act = clamped_swiglu(gate, up, limit=limit)
            if shift is not None:
                act = act * 2.0**shift
            out[group, :, row] = act.astype(dtype)

    return _kernel(
        body,
        grid=(expert.shape[0], width // HALF, 1),
        stream=stream,
        out=jax.ShapeDtypeStruct((expert.shape[0], COLUMNS, width), dtype),
        name="decode_gate_up",
    )(
        layer,
        bias_layer,
        expert,
        x,
        factors,
        weight.codes.reshape(*lead, 2, width, -1),
        weight.scales.reshape(*lead, -1, 2, width),
        bias,
    )


def _down(
    layer: Int[Array, " 1"],
    expert: Int[Array, " G"],
    x: Float[Array, "G r C"],
    factors: Float[Array, "G 8"] | float,
    weight: Relaid,
    *,
    blocks: Blocks,
) -> Float[Array, "S G 8 N"]:
    """Return the product of each split of the columns, with N padded to a tile.

    Rows past R are undefined. `factors` has one factor per row of x, or is one factor for all rows.
    If N is an odd number of half tiles, the last tile takes the last 64 rows of the matrix, so half
    of them are computed twice.
    """
    (num_experts, width), count = weight.shape[1:3], weight.scales.shape[-2]
    halves = width // HALF
    tiles = -(-halves // 2)
    lead = weight.codes.shape[:2]
    stream, splits = _stream(
        weight.codes.shape[-1], rows=blocks.rows, stages=blocks.down_stages, splits=blocks.splits
    )
    emulate = chips.current().interpret

    def body(
        layer: Any, expert: Any, x: Any, codes: Any, scales: Any, *rest: Any, **scratch: Any
    ) -> None:  # fmt: skip
        *given, out = rest  # `given` holds the factors if they are an array
        group, tile = lax.axis_index("group"), lax.axis_index("tile")
        split = lax.axis_index("split")
        e = expert[group]

        @pl.when(e < num_experts)
        def _() -> None:
            row = pl.ds(jnp.minimum(2 * tile, halves - 2), 2)
            total = _accumulate(
                stream,
                codes=codes.at[layer[0], e, row],
                scales=scales.at[layer[0], e, :, row],
                x=x.at[group],
                split=split,
                scratch=scratch,
                emulate=emulate,
            )
            total = total * (_by_column(given[0].at[group]) if given else factors)
            for half, part in enumerate(_transposed_halves(total, scratch["exchange"])):
                out[split, group, :, pl.ds(tile * TILE + half * HALF, HALF)] = part

    return _kernel(
        body,
        grid=(expert.shape[0], tiles, splits),
        stream=stream,
        out=jax.ShapeDtypeStruct((splits, expert.shape[0], COLUMNS, tiles * TILE), jnp.float32),
        name="decode_down",
    )(
        layer,
        expert,
        x,
        weight.codes.reshape(*lead, halves, HALF, -1),
        weight.scales.reshape(*lead, count, halves, HALF),
        *([factors] if isinstance(factors, jax.Array) else []),
    )
