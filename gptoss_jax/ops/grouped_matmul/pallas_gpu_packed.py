"""Hopper's grouped matmul of packed weights: codes are brought, decoded in registers, multiplied.

A step's tile of codes and scales comes by TMA; 128 threads turn it into the exact values in bf16 in
shared memory, one of two places in turn, while the tensor cores still multiply the tile before.
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
    """Return each item's rows times its matrix's transpose, [P, C] to [P, N], or times itself.

    `columns` is C; codes and scales are in the order of `mxfp4.hopper`.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    load: Any = plgpu.load  # its index was apart before jax 0.11
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
    """Return the values of the low and of the high nibbles in bfloat16, without scales: exact."""
    if not chips.current().interpret:
        return _e2m1_in_pairs(bytes_)
    wide = bytes_.astype(jnp.uint32)
    low, high = _e2m1_plain(wide & 15), _e2m1_plain(wide >> 4)
    return low.astype(jnp.bfloat16), high.astype(jnp.bfloat16)


def _e2m1_plain(nibbles: Any) -> Any:
    """Return the values in float32, in steps that any backend takes.

    The three low bits as an exponent's last two and a mantissa's first give t, the value itself
    from 1 on; below, where e2m1 is subnormal, it is 2t - 1, which is the smaller there and the
    larger elsewhere. So no subnormal of float32 occurs, which XLA on a CPU would flush.
    """
    bits = ((nibbles & 7) << 22) + np.uint32(126 << 23)
    magnitude = lax.bitcast_convert_type(bits, jnp.float32)
    magnitude = jnp.minimum(magnitude, magnitude * 2 - 1)
    bits = lax.bitcast_convert_type(magnitude, jnp.uint32) | ((nibbles & 8) << 28)
    return lax.bitcast_convert_type(bits, jnp.float32)


def _scaled(values: Any, scale: Any, dtype: Any) -> Any:
    """Return values [rows, 32] times a power of two a row, exactly in bfloat16."""
    if dtype == jnp.bfloat16:
        factor = lax.bitcast_convert_type(scale.astype(jnp.uint16) << 7, jnp.bfloat16)
    else:
        # Half precision has not the range of the scales: one rounding, of the product.
        values = values.astype(jnp.float32)
        factor = lax.bitcast_convert_type(scale.astype(jnp.uint32) << 23, jnp.float32)
    return (values * lax.broadcast_in_dim(factor, values.shape, (0,))).astype(dtype)


def place(word: Any, plane: int) -> Any:
    """Return two e2m1 codes as two bfloat16s 2**-126 times their values, in a word's halves.

    `word` has two bytes of codes at bits 0 and 16; `plane` 0 is their low nibbles, 1 the high ones.
    The sign goes to bit 15 and the rest to bits 8 to 6, the exponent's last two and the mantissa's
    first; code 1 is a subnormal number then as it is in e2m1.
    """
    sign, rest = (word << 8, word << 2) if plane else (word << 12, word << 6)
    return (sign & 0x80008000) | (rest & 0x01C001C0)


def _e2m1_in_pairs(bytes_: Any) -> tuple[Any, Any]:
    """Do the same on words that hold two bfloat16s: 2.5 instructions a value, and 0.5 to scale it.

    The factor 2**126 makes numbers of what `place` gives: products of bfloat16s keep subnormals on
    a GPU, as they do not everywhere else.
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
    """A 32-bit value of MLIR with the operators that `place` uses."""

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
