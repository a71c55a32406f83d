"""Grouped matmul of packed weights on Hopper: codes are loaded, decoded in registers, multiplied.

In each step TMA loads a tile of codes and scales. 128 threads decode it to exact bf16 values and
store them in one of two alternating buffers in shared memory. Meanwhile the tensor cores still
multiply the tile before.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, UInt8

from gptoss_jax import chips
from gptoss_jax.ops.grouped_matmul.pallas_gpu_kernels import Tile, Work, multiply, swizzled
from gptoss_jax.ops.mxfp4.hopper import GROUP
from gptoss_jax.types import MXFP4_BLOCK


def packed(
    rows: Float[Array, "P K"],
    codes: UInt8[Array, "matrices N c"],
    scales: UInt8[Array, "matrices b n"],
    work: Work,
    *,
    columns: int,
    transposed: bool,
    tile: Tile,
) -> Float[Array, "P Q"]:
    """Return the product of each work item's rows and its matrix, or the matrix's transpose.

    With `transposed` the result is [P, N] from rows [P, C]; otherwise it is [P, C] from [P, N].
    `columns` is C. Codes and scales are in the layout of `mxfp4.hopper`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load  # before jax 0.11 the index was a separate argument
    wide, high = (tile.depth, tile.columns) if transposed else (tile.columns, tile.depth)

    def code_spec(j):
        block = (high, wide // 2)
        return plgpu.BlockSpec(block, lambda k: (j, k) if transposed else (k, j))

    def scale_spec(j):
        block = (wide // MXFP4_BLOCK, high)
        return plgpu.BlockSpec(block, lambda k: (k, j) if transposed else (j, k))

    def product(step, accumulator, rows_smem, code_smem, scale_smem, values):
        here = values.at[lax.rem(step, 2)]
        for group in range(wide // GROUP):
            bytes_ = load(
                code_smem.at[:, pl.ds(group * MXFP4_BLOCK, MXFP4_BLOCK)],
                layout=plgpu.Layout.WGMMA,
                optimized=False,
            )
            for plane, unscaled in enumerate(_e2m1(bytes_)):
                block = 2 * group + plane
                scale = load(
                    scale_smem.at[block], layout=plgpu.Layout.WGMMA.reduce(1), optimized=False
                )
                here[:, pl.ds(block * MXFP4_BLOCK, MXFP4_BLOCK)] = _scaled(
                    unscaled, scale, rows.dtype
                )
        plgpu.commit_smem()
        plgpu.wgmma(accumulator, rows_smem, here.transpose((1, 0)) if transposed else here)
        plgpu.wgmma_wait(1)

    return multiply(
        rows,
        (codes, scales),
        work,
        columns=codes.shape[1] if transposed else columns,
        tile=tile,
        width=MXFP4_BLOCK,
        specs=[code_spec, scale_spec],
        scratch=[
            plgpu.SMEM((2, high, wide), rows.dtype, transforms=swizzled(MXFP4_BLOCK, rows.dtype))
        ],
        product=product,
    )


def _e2m1(bytes_: Any) -> tuple[Any, Any]:
    """Return the exact values of the low and the high nibbles in bfloat16, without scales."""
    if not chips.current().interpret:
        return _e2m1_in_pairs(bytes_)
    wide = bytes_.astype(jnp.uint32)
    low, high = _e2m1_plain(wide & 15), _e2m1_plain(wide >> 4)
    return low.astype(jnp.bfloat16), high.astype(jnp.bfloat16)


def _e2m1_plain(nibbles: Any) -> Any:
    """Return the values in float32, by operations that every backend has.

    The three low bits, as the last two of the exponent and the first of the mantissa, give t. From
    1 on t is the value. Below 1, where e2m1 is subnormal, the value is 2t - 1; there 2t - 1 is the
    smaller of the two, and above 1 it is the larger, so the minimum of both is the value. No
    float32 subnormal occurs, which XLA on a CPU would flush to zero.
    """
    bits = ((nibbles & 7) << 22) + np.uint32(126 << 23)
    magnitude = lax.bitcast_convert_type(bits, jnp.float32)
    magnitude = jnp.minimum(magnitude, magnitude * 2 - 1)
    bits = lax.bitcast_convert_type(magnitude, jnp.uint32) | ((nibbles & 8) << 28)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _scaled(values: Any, scale: Any, dtype: Any) -> Any:
    """Return values [rows, 32] times one power of two per row; exact in bfloat16."""
    if dtype == jnp.bfloat16:
        factor = lax.bitcast_convert_type(scale.astype(jnp.uint16) << 7, jnp.bfloat16)
    else:
        # float16 lacks the range of the scales, so only the product is rounded, once.
        values = values.astype(jnp.float32)
        factor = lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return (values * lax.broadcast_in_dim(factor, values.shape, (0,))).astype(dtype)


def place(word: Any, plane: int) -> Any:
    """Return two e2m1 codes as two bfloat16s in the halves of a word, times 2**-126.

    `word` has two bytes of codes, at bits 0 and 16. `plane` 0 takes their low nibbles, 1 their high
    nibbles. The sign goes to bit 15 and the rest to bits 8 to 6: the last two of the exponent and
    the first of the mantissa. Code 1 is then a subnormal number, as in e2m1.
    """
    sign, rest = (word << 8, word << 2) if plane else (word << 12, word << 6)
    return (sign & 0x80008000) | (rest & 0x01C001C0)


def _e2m1_in_pairs(bytes_: Any) -> tuple[Any, Any]:
    """Do the same on words of two bfloat16s: 2.5 instructions per value, and 0.5 to scale it.

    The factor 2**126 turns the results of `place` into the values. On a GPU, unlike elsewhere,
    products of bfloat16s keep subnormals.
    """
    from jax.experimental.mosaic import gpu as mgpu
    from jax.experimental.pallas import mosaic_gpu as plgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, vector

    result = plgpu.ShapeDtypeStruct(bytes_.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)

    inline: Any = plgpu.inline_mgpu

    @inline(arg_types=(plgpu.Layout.WGMMA,), return_type=(result, result))
    def decode(context, codes):
        del context
        i32, pair = ir.IntegerType.get_signless(32), ir.VectorType.get((2,), ir.BF16Type.get())
        word = ir.VectorType.get((1,), i32)
        factor = ir.DenseElementsAttr.get_splat(pair, ir.FloatAttr.get(ir.BF16Type.get(), 2.0**126))
        planes = tuple(np.empty_like(codes.registers) for _ in range(2))
        for at, register in np.ndenumerate(codes.registers):
            low, high = (
                arith.extui(i32, vector.extract(register, (), (byte,))) for byte in range(2)
            )
            spread = _Word(low) | (_Word(high) << 16)
            for plane, registers in enumerate(planes):
                bits = vector.bitcast(pair, vector.broadcast(word, place(spread, plane).value))
                registers[at] = arith.mulf(bits, arith.constant(pair, factor))
        return tuple(
            mgpu.FragmentedArray(_registers=registers, _layout=codes.layout, _is_signed=None)
            for registers in planes
        )

    return decode(bytes_)


class _Word(NamedTuple):
    """A 32-bit MLIR value with the operators that `place` uses."""

    value: Any

    def __lshift__(self, count: int) -> _Word:
        return self._with("shli", count)

    def __and__(self, mask: int) -> _Word:
        return self._with("andi", mask)

    def __or__(self, other: _Word) -> _Word:
        from jaxlib.mlir.dialects import arith

        return _Word(arith.ori(self.value, other.value))

    def _with(self, name: str, number: int) -> _Word:
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        i32 = ir.IntegerType.get_signless(32)
        signed = number - (1 << 32) if number >> 31 else number
        constant = arith.constant(i32, ir.IntegerAttr.get(i32, signed))
        return _Word(getattr(arith, name)(self.value, constant))
