"""Experts for a few rows on TPU: one Pallas kernel that reads each chosen expert once.

The grid goes over the experts that any row chose, and for each expert over chunks of the contracted
axis: first those of gate_up, then those of down. A chunk of codes has all output columns. It is
read from the stack by the indices of expert and layer, and decoded in VMEM strip by strip. All rows
are multiplied by it on the matrix unit, where 16 rows cost as much as one; then a select drops the
rows that did not choose the expert. A chunk has all columns because gate and up are 2,880 columns
apart, so they can't both start on a tile of 128 columns.

| memory | contents |
|---|---|
| HBM | codes and scales of all layers; read once for each expert in use |
| VMEM blocks | a chunk of gate_up's codes, one of down's, all their scales; biases, rows, sum |
| VMEM scratch | scales in float32, a decoded strip, inputs and outputs of swiglu, y [M, D] |
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.grouped_matmul.weights import Weight, as_stack, layer_of
from gptoss_jax.ops.moe.reference import clamped_swiglu
from gptoss_jax.types import MXFP4_BLOCK, LayerOf, Relaid

ROWS = 16  # most rows: the matrix unit takes these in one pass
STEP = {"columns": 64, "int8": 32, "fp4": 64}  # values of C that are decoded at a time
LANES = 128  # columns of a tile
HALVES = 0x00010001  # this times a 16-bit number has the number in both halves of a word
MIB = 1 << 20


class Blocks(NamedTuple):
    """Sizes that differ by chip. None has been timed on a device."""

    chunk: int  # most elements of the contracted axis in one step
    strip: int  # columns decoded at a time: a multiple of 128
    cores: int  # cores that share the experts: two if a device has two
    vmem: int  # bytes of fast memory that the kernel may take


BLOCKS = {
    "v5e": Blocks(960, 512, 1, 96 * MIB),
    "v5p": Blocks(960, 512, 2, 60 * MIB),
    "v6e": Blocks(960, 512, 1, 96 * MIB),
    "tpu7x": Blocks(960, 512, 1, 48 * MIB),
}


class Plan(NamedTuple):
    """The static parameters of a call."""

    layout: str
    rows: int  # M, padded to a tile
    hidden: int  # F
    width: int  # D
    chunk: tuple[int, int]  # sizes of the chunks of D and of F
    chunks: tuple[int, int]  # numbers of these chunks
    strip: int
    limit: float
    dtype: Any  # dtype of the products' operands


def refuse(
    x: Any,
    expert_ids: Any,
    expert_weights: Any,
    *,
    gate_up_weight: Weight,
    gate_up_bias: Any,
    down_weight: Weight,
    down_bias: Any,
) -> str | None:
    """Return why the kernel can't take these arguments, or None."""
    del expert_ids, expert_weights, gate_up_bias, down_bias
    reason = chips.refuse_tpu_kernel()
    if reason is not None:
        return reason
    kind = chips.current().kind
    if kind not in BLOCKS:
        return f"its tile sizes are for {', '.join(BLOCKS)}, and this is a {kind}"
    if x.shape[0] > ROWS:
        return f"it is for up to {ROWS} rows, and these are {x.shape[0]}"
    layouts = []
    for weight in (gate_up_weight, down_weight):
        stack = weight.stack if isinstance(weight, LayerOf) else weight
        layouts.append(stack.layout if isinstance(stack, Relaid) else type(stack).__name__)
    if layouts[0] != layouts[1] or layouts[0] not in STEP:
        return (
            f"both weights are to be in one layout of {', '.join(map(repr, STEP))} (see "
            f"ops.mxfp4.layouts.relayout), and these are {' and '.join(layouts)}"
        )
    if layouts[0] == "fp4":
        if kind != "tpu7x":
            return f'the layout "fp4" is for tpu7x, and this is a {kind}'
        if any(weight.shape[-1] % STEP["fp4"] for weight in (gate_up_weight, down_weight)):
            return 'the layout "fp4" needs D and F to be multiples of 64'
    return None


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
    mask: Bool[Array, " M"] | None,
) -> Float[Array, "M D"]:
    """Find the experts in use, run the kernel over them, and remove the padding."""
    stacks: Any = [as_stack(weight)[0] for weight in (gate_up_weight, down_weight)]
    layers = jnp.stack([as_stack(weight)[1] for weight in (gate_up_weight, down_weight)])
    blocks = BLOCKS[chips.current().kind]
    num_experts, _, hidden = gate_up_bias.shape
    pad = -x.shape[0] % (32 // x.dtype.itemsize)
    chunk, chunks = zip(*(_chunk(s, blocks.chunk) for s in stacks), strict=True)
    plan = Plan(
        layout=stacks[0].layout,
        rows=x.shape[0] + pad,
        hidden=hidden,
        width=x.shape[1],
        chunk=chunk,
        chunks=chunks,
        strip=blocks.strip,
        limit=limit,
        dtype=x.dtype,
    )
    routed = expert_ids < num_experts
    if mask is not None:
        routed &= mask[:, None]
    used, num_used, shares = _in_use(
        jnp.where(routed, expert_ids, num_experts),
        expert_weights.astype(jnp.float32),
        num_experts=num_experts,
        cores=blocks.cores,
    )
    shares = jnp.pad(shares, ((0, 0), (0, pad), (0, 0)))
    padded = jnp.pad(x, ((0, pad), (0, chunk[0] * chunks[0] - x.shape[1])))
    if plan.layout == "columns":
        padded = _even_first(padded)
    by_chunk = padded.reshape(plan.rows, chunks[0], chunk[0]).swapaxes(0, 1)
    biases = [_biases(gate_up_bias, used), _biases(down_bias, used)[:, None]]
    out = _run(plan, blocks, (used, num_used, layers), (by_chunk, shares, *biases), stacks)
    return jnp.sum(out, axis=0)[: x.shape[0]].astype(x.dtype)


def _biases(bias: Array | LayerOf, used: Int[Array, " U"]) -> Float[Array, "U *N"]:
    """Return the biases of the used experts, by a product with ones and zeros.

    XLA may store 128 experts as the last axis of the stack. It would then copy the stack for a
    kernel or a gather.
    """
    layer: Any = layer_of(bias)
    one_hot = jax.nn.one_hot(used, layer.shape[0], dtype=layer.dtype)
    return jnp.tensordot(one_hot, layer, 1, precision="highest", preferred_element_type=jnp.float32)


def _chunk(stack: Relaid, limit: int) -> tuple[int, int]:
    """Return the size of a chunk of the padded contracted axis, and the number of chunks."""
    columns = stack.codes.shape[-2] * (2 if stack.layout == "columns" else 1)
    steps = columns // STEP[stack.layout]
    most = max(limit // STEP[stack.layout], 1)
    count = next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n <= most)
    return columns // count, count


def _in_use(
    ids: Int[Array, "M A"], weights: Float[Array, "M A"], *, num_experts: int, cores: int
) -> tuple[Int[Array, " U"], Int[Array, " 1"], Float[Array, "U M 2"]]:
    """Return the experts in use, their number, and the rows' weights and choices (1) for each.

    U is the greatest possible number. Entries past those in use repeat the last expert, so that
    nothing is fetched for them, and no row has chosen them.
    """
    most = pl.cdiv(min(num_experts, ids.size), cores) * cores
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    chosen = ids[:, :, None] == experts
    has = jnp.any(chosen, axis=(0, 1))
    place = jnp.cumsum(has) - 1
    num_used = jnp.sum(has, dtype=jnp.int32)
    slots = jnp.arange(most, dtype=jnp.int32)
    # Cores take experts in turn; past the end, each core repeats its own last expert.
    last = num_used - 1 - (num_used - 1 - slots) % cores
    at = jnp.clip(jnp.minimum(slots, last), 0)
    used = jnp.sum(jnp.where(has & (place == at[:, None]), experts, 0), axis=1, dtype=jnp.int32)
    here = (ids == used[:, None, None]) & (slots < num_used)[:, None, None]
    share = jnp.sum(jnp.where(here, weights, 0), axis=2)
    shares = jnp.stack([share, jnp.any(here, axis=2).astype(jnp.float32)], axis=-1)
    return used, num_used[None], shares


def _run(
    plan: Plan, blocks: Blocks, scalars: tuple, rows: tuple[Array, ...], stacks: Any
) -> Float[Array, "cores M D"]:
    gate_up, down = stacks
    x, shares, gate_up_bias, down_bias = rows
    first, second = plan.chunks
    steps = first + second
    cores = blocks.cores
    turns = shares.shape[0] // cores

    def expert(c: Any, i: Any) -> Any:
        return i * cores + c

    def weight_spec(leaf: Array, chunk: int | None, which: int) -> pl.BlockSpec:
        """Return the BlockSpec of a chunk (all rows if None) of a stack [L, E, C, N]."""
        rows = leaf.shape[2] if chunk is None else chunk

        def index(c: Any, i: Any, k: Any, used: Any, num_used: Any, layers: Any) -> tuple:
            u = expert(c, i)
            # Past the experts in use no block changes. During the steps of gate_up, down's block is
            # the last one of the expert before, so that fetches are spread over the steps.
            k = jnp.where(u < num_used[0], k, steps - 1)
            early = (which == 1) & (k < first) & (i > 0)
            u = jnp.where(early, u - cores, u)
            if which == 0:
                k = jnp.minimum(k, first - 1)
            else:
                k = jnp.where(early, second - 1, jnp.maximum(k - first, 0))
            return layers[which], used[u], 0 if chunk is None else k, 0

        return pl.BlockSpec((None, None, rows, leaf.shape[3]), index)

    if plan.layout == "columns":  # pairs of bfloat16 in a word
        factors = jnp.int32
        decoded = pltpu.VMEM((max(plan.chunk) // 2, plan.strip), jnp.int32)
    else:
        factors = jnp.float32
        decoded = pltpu.VMEM((max(plan.chunk), plan.strip), plan.dtype)
    packing = 2 if plan.layout == "columns" else 1
    M, D, F = plan.rows, plan.width, plan.hidden
    gate_up_width, down_width = gate_up.codes.shape[3], down.codes.shape[3]  # may be padded
    weights = M * turns * cores * 3 * D * F
    return pl.pallas_call(
        functools.partial(_kernel, plan, cores),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cores, turns, steps),
            in_specs=[
                pl.BlockSpec(x.shape, lambda c, i, k, *_: (0, 0, 0)),
                pl.BlockSpec((None, M, 2), lambda c, i, k, *_: (expert(c, i), 0, 0)),
                weight_spec(gate_up.codes, plan.chunk[0] // packing, 0),
                weight_spec(gate_up.scales, None, 0),
                pl.BlockSpec((None, 2, F), lambda c, i, k, *_: (expert(c, i), 0, 0)),
                weight_spec(down.codes, plan.chunk[1] // packing, 1),
                weight_spec(down.scales, None, 1),
                pl.BlockSpec((None, 1, D), lambda c, i, k, *_: (expert(c, i), 0, 0)),
            ],
            out_specs=pl.BlockSpec((None, M, D), lambda c, i, k, *_: (c, 0, 0)),
            scratch_shapes=[
                pltpu.VMEM((first, plan.chunk[0] // MXFP4_BLOCK, gate_up_width), factors),
                pltpu.VMEM((second, plan.chunk[1] // MXFP4_BLOCK, down_width), factors),
                decoded,
                pltpu.VMEM((M, gate_up_width), jnp.float32),
                pltpu.VMEM((second, M, plan.chunk[1]), plan.dtype),
                pltpu.VMEM((M, down_width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((cores, M, D), jnp.float32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=blocks.vmem,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * weights,
            transcendentals=M * turns * cores * F,
            bytes_accessed=sum(
                turns * cores * leaf.dtype.itemsize * leaf.shape[2] * leaf.shape[3]
                for leaf in (gate_up.codes, gate_up.scales, down.codes, down.scales)
            ),
        ),
        interpret=chips.tpu_interpreter(),
        name="experts_decode",
    )(
        *scalars,
        x,
        shares,
        gate_up.codes,
        gate_up.scales,
        gate_up_bias,
        down.codes,
        down.scales,
        down_bias,
    )


def _kernel(plan: Plan, cores: int, used: Any, num_used: Any, layers: Any, *refs: Any) -> None:
    x, shares, gate_up, gate_up_scales, gate_up_bias, down, down_scales, down_bias, out = refs[:9]
    gate_up_factors, down_factors, decoded, h, act, y = refs[9:]
    del layers
    i, k = pl.program_id(1), pl.program_id(2)
    u = i * cores + pl.program_id(0)
    first, second = plan.chunks

    @pl.when((i == 0) & (k == 0))
    def _():
        out[...] = jnp.zeros_like(out)

    @pl.when(u < num_used[0])
    def _():
        @pl.when(k == 0)
        def _():
            _store_factors(plan.layout, gate_up_scales, gate_up_factors)
            h[...] = jnp.zeros_like(h)

        @pl.when(k < first)
        def _():
            _multiply(plan, x[k], gate_up, gate_up_factors, decoded, h, k)

        @pl.when(k == first - 1)
        def _():
            _activate(plan, h, gate_up_bias, act)

        @pl.when(k == first)
        def _():
            _store_factors(plan.layout, down_scales, down_factors)
            y[...] = jnp.zeros_like(y)

        @pl.when(k >= first)
        def _():
            _multiply(plan, act[k - first], down, down_factors, decoded, y, k - first)

        @pl.when(k == first + second - 1)
        def _():
            share, rows = shares[...], y[:, : plan.width] + down_bias[...]
            # A select, not a product with 0: rows that did not choose the expert may hold NaN.
            out[...] += jnp.where(share[:, 1:] > 0, share[:, :1] * rows, 0)


def _activate(plan: Plan, h: Any, bias: Any, act: Any) -> None:
    """Add the bias and activate; store in down's chunks, with zeros where F is padded."""
    gate = h[:, : plan.hidden] + bias[:1]
    up = h[:, plan.hidden : 2 * plan.hidden] + bias[1:]
    values = clamped_swiglu(gate, up, limit=plan.limit)
    values = values.astype(act.dtype)
    chunk, count = plan.chunk[1], plan.chunks[1]
    width = pl.cdiv(chunk * count, LANES) * LANES
    if width > plan.hidden:
        padding = jnp.zeros((plan.rows, width - plan.hidden), act.dtype)
        values = jnp.concatenate([values, padding], axis=1)
    if plan.layout == "columns":
        values = _even_first_on_matrix_unit(values)
    for j in range(count):
        act[j] = values[:, j * chunk : (j + 1) * chunk]


def _store_factors(layout: str, scales: Any, factors: Any) -> None:
    """Store the scales in `_values`' form, by chunk, so that row indices are static."""
    exponents = scales[...].astype(jnp.int32)
    if layout == "columns":
        # Blocks with scale bytes 0 and 1 hold only zeros.
        values: Array = ((jnp.maximum(exponents - 1, 1) << 7) - 64) * HALVES
    else:
        # int8 codes are twice the value, so the scale is halved.
        exponents = jnp.maximum(exponents - (layout == "int8"), 0)
        values = lax.bitcast_convert_type(exponents << 23, jnp.float32)
    rows = factors.shape[1]
    for j in range(factors.shape[0]):
        factors[j] = values[j * rows : (j + 1) * rows]


def _multiply(
    plan: Plan, rows: Array, codes: Any, factors: Any, decoded: Any, total: Any, k: Any
) -> None:
    """Add to `total` [M, N] the product of `rows` [M, chunk] with chunk `k`, strip by strip."""
    depth, width = rows.shape[1], total.shape[1]
    words = plan.layout == "columns"

    def strip(start: Any, size: int) -> None:
        lanes = pl.ds(start, size)
        for at in range(0, depth, STEP[plan.layout]):
            row, place = at // MXFP4_BLOCK, at // 2 if words else at
            factor = factors[k, row : row + STEP[plan.layout] // MXFP4_BLOCK, lanes]
            for values in _values(plan.layout, codes, at, lanes, factor):
                decoded[place : place + len(values), :size] = values.astype(decoded.dtype)
                place += len(values)
        if words:
            matrix = pltpu.bitcast(decoded[: depth // 2, :size], jnp.bfloat16)
        else:
            matrix = decoded[:depth, :size]
        total[:, lanes] += jnp.dot(
            rows,
            matrix.astype(plan.dtype),
            precision=_precision(plan.dtype),
            preferred_element_type=jnp.float32,
        )

    whole, rest = divmod(width, plan.strip)
    if whole:
        aligned = functools.partial(pl.multiple_of, values=plan.strip)
        lax.fori_loop(0, whole, lambda j, _: strip(aligned(j * plan.strip), plan.strip), None)
    if rest:
        strip(whole * plan.strip, rest)


def _values(layout: str, codes: Any, at: int, lanes: Any, factor: Array) -> list[Array]:
    """Decode from row `at` of the chunk on; return consecutive pieces of rows."""
    if layout == "columns":
        words = pltpu.bitcast(codes[at // 2 : at // 2 + MXFP4_BLOCK, lanes], jnp.int32)
        low, high = factor[:1], factor[1:]
        return [
            _pairs(words, place, exponent)
            for place, exponent in ((0, low), (8, low), (4, high), (12, high))
        ]
    values = codes[at : at + STEP[layout], lanes]
    if layout == "fp4":
        values = values.astype(jnp.float32)
        return [values[:MXFP4_BLOCK] * factor[:1], values[MXFP4_BLOCK:] * factor[1:]]
    # The five low bits hold -12 to 12, and 0 for -128, which stands for minus zero.
    return [((values.astype(jnp.int32) << 27) >> 27).astype(jnp.float32) * factor]


def _pairs(words: Int[Array, "8 n"], place: int, exponent: Array) -> Array:
    """Decode the nibbles at bits `place` and `place` + 16 of each word to bfloat16 [16, n].

    Both halves are decoded at once by integer arithmetic, the best way on a vector unit without
    bfloat16. In both halves, `exponent` is 64 less than the bits of the value of code 1. The three
    bits of a code are moved to bits 8 to 6, the border of exponent and mantissa. There a code of 2
    or more adds its bits to those of the value of code 1. Code 0 is masked to zero.
    """
    code = (words << (6 - place) if place < 6 else words >> (place - 6)) & (0x1C0 * HALVES)
    sign_bits = jnp.int32(-0x7FFF8000)  # 0x8000 in both halves
    sign = (words << (12 - place)) & sign_bits
    # The top bit of a half says that its code is not 0; `normal` has bit 6 if it is not 0 or 1.
    some = (code + 0x7FC0 * HALVES) & sign_bits
    mask = some - lax.shift_right_logical(some, 15)
    normal = lax.shift_right_logical(code + 0x7F80 * HALVES, 9) & (0x40 * HALVES)
    return ((code + normal + exponent) & mask) | sign


def _even_first(x: Float[Array, "M C"]) -> Float[Array, "M C"]:
    """Order each block's columns like the rows of `_pairs`: first the even, then the odd ones."""
    blocks = x.reshape(x.shape[0], -1, MXFP4_BLOCK // 2, 2)
    return blocks.swapaxes(-1, -2).reshape(x.shape)


def _even_first_on_matrix_unit(x: Float[Array, "M C"]) -> Float[Array, "M C"]:
    """Do the same in a kernel, which can't permute lanes; C is a multiple of 128."""
    source, target = (lax.broadcasted_iota(jnp.int32, (LANES, LANES), axis) for axis in (0, 1))
    half, within = MXFP4_BLOCK // 2, target % MXFP4_BLOCK
    moved = target - within + jnp.where(within < half, 2 * within, 2 * (within - half) + 1)
    order = (source == moved).astype(x.dtype)
    parts = [
        jnp.dot(
            x[:, i : i + LANES],
            order,
            precision=_precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        for i in range(0, x.shape[1], LANES)
    ]
    return jnp.concatenate(parts, axis=1).astype(x.dtype)


def _precision(dtype: Any) -> lax.Precision:
    return lax.Precision.HIGHEST if dtype == jnp.float32 else lax.Precision.DEFAULT
