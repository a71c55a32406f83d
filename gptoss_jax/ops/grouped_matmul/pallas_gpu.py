"""Grouped matmul on Hopper: dense with all gradients, packed with the gradient of the rows.

The kernels read packed weights in the layout of `mxfp4.hopper`. A weight in the checkpoint's layout
is converted on every call, which reads and writes the layer's bytes once more.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.grouped_matmul import pallas_gpu_kernels as kernels
from gptoss_jax.ops.grouped_matmul.pallas_gpu_packed import packed
from gptoss_jax.ops.grouped_matmul.weights import Weight, as_it_lies, as_stack, layer_of, wait_for
from gptoss_jax.ops.mxfp4 import hopper
from gptoss_jax.types import MXFP4, LayerOf, Relaid

LAYOUT = "hopper"


def refuse(rows: Any, weight: Any, group_sizes: Any) -> str | None:
    """Return why the kernels can't take these arguments, or None."""
    del group_sizes
    if reason := chips.refuse_hopper_kernel():
        return reason
    if rows.dtype not in (jnp.bfloat16, jnp.float16):
        return f"its products are of bfloat16 or float16, and rows are {rows.dtype}"
    stack = weight.stack if isinstance(weight, LayerOf) else weight
    if isinstance(stack, Relaid) and stack.layout != LAYOUT:
        return f"a packed weight has to be in layout {LAYOUT!r}, and this one is {stack.layout!r}"
    if not isinstance(stack, MXFP4 | Relaid) and stack.dtype != rows.dtype:
        return f"rows are {rows.dtype} and weights {stack.dtype}: they have to be the same"
    n, c = math.prod(weight.shape[1:-1]), weight.shape[-1]
    if n % kernels.NARROW or c % kernels.NARROW:
        return f"N={n} and C={c} have to be multiples of {kernels.NARROW}"
    if rows.shape[0] == 0:
        return "there are no rows"
    return None


def grouped_matmul(
    rows: Float[Array, "P C"], weight: Weight, group_sizes: Int[Array, " E"]
) -> Float[Array, "P N"]:
    """Return rows[p] @ weight[e].T for the group e of row p, as `ops.grouped_matmul` does.

    If the number of rows is not a multiple of 8, the rows are copied and padded.
    """
    num_rows = rows.shape[0]
    rows = jnp.pad(rows, ((0, -num_rows % kernels.ALIGN), (0, 0)))
    return _grouped(rows, weight, group_sizes)[:num_rows]


def _grouped(rows: Array, weight: Weight, group_sizes: Array) -> Array:
    if isinstance(weight, LayerOf | MXFP4 | Relaid):
        stack, layer = as_stack(weight)
        first = layer * weight.shape[0]
        if isinstance(stack, MXFP4):
            stack, first = _relaid(layer_of(wait_for(rows, weight)))[None], jnp.int32(0)
        if isinstance(stack, Relaid):
            codes, scales = (a.reshape(-1, *a.shape[-2:]) for a in (stack.codes, stack.scales))
            return _packed(stack.columns, rows, codes, scales, group_sizes, first)
        matrices = stack.reshape(-1, math.prod(weight.shape[1:-1]), weight.shape[-1])
        return _stacked(rows, matrices, group_sizes, first)
    return _dense(rows, weight.reshape(weight.shape[0], -1, weight.shape[-1]), group_sizes)


def _relaid(layer: Any) -> Relaid:
    layer = layer.replace(scales=as_it_lies(layer.scales, *range(layer.scales.ndim)))
    rows = layer.shape[1:-1]
    wide = (layer.shape[0], math.prod(rows), layer.scales.shape[-1])
    codes, scales = hopper.pack(layer.blocks.reshape(*wide, -1), layer.scales.reshape(wide))
    return Relaid(codes, scales, LAYOUT, rows, layer.shape[-1])


def _blocks() -> kernels.Blocks:
    return kernels.BLOCKS[chips.current().kind]


def _times(rows: Array, weight: Array, sizes: Array, first: Array, *, transposed: bool) -> Array:
    tile = _blocks().dense
    work = kernels.work_items(sizes, first, rows.shape[0], tile.rows)
    return kernels.dense(rows, weight, work, transposed=transposed, tile=tile)


def _in_groups(d_rows: Array, sizes: Array) -> Array:
    """Set the gradient of rows of no group to zero."""
    inside = jnp.arange(d_rows.shape[0]) < jnp.sum(sizes)
    return jnp.where(inside[:, None], d_rows, 0)


def _no_gradient(x: Array) -> np.ndarray:
    return np.zeros(x.shape, jax.dtypes.float0)


@jax.custom_vjp
def _dense(rows: Array, weight: Array, sizes: Array) -> Array:
    return _times(rows, weight, sizes, jnp.int32(0), transposed=True)


def _dense_forward(rows: Array, weight: Array, sizes: Array) -> tuple:
    return _dense(rows, weight, sizes), (rows, weight, sizes)


def _dense_backward(saved: tuple, d_out: Array) -> tuple:
    rows, weight, sizes = saved
    d_rows = _times(d_out, weight, sizes, jnp.int32(0), transposed=False)
    d_weight = kernels.weight_gradient(d_out, rows, sizes, tile=_blocks().weight)
    return _in_groups(d_rows, sizes), d_weight, _no_gradient(sizes)


_dense.defvjp(_dense_forward, _dense_backward)


@jax.custom_vjp
def _stacked(rows: Array, weight: Array, sizes: Array, first: Array) -> Array:
    return _times(rows, weight, sizes, first, transposed=True)


def _stacked_forward(rows: Array, weight: Array, sizes: Array, first: Array) -> tuple:
    return _stacked(rows, weight, sizes, first), (weight, sizes, first)


def _stacked_backward(saved: tuple, d_out: Array) -> tuple:
    weight, sizes, first = saved
    d_rows = _times(d_out, weight, sizes, first, transposed=False)
    return _in_groups(d_rows, sizes), None, _no_gradient(sizes), _no_gradient(first)


_stacked.defvjp(_stacked_forward, _stacked_backward)


def _packed_times(
    columns: int,
    rows: Array,
    codes: Array,
    scales: Array,
    sizes: Array,
    first: Array,
    *,
    transposed: bool,
) -> Array:
    tile = _blocks().packed if transposed else _blocks().packed_rows
    work = kernels.work_items(sizes, first, rows.shape[0], tile.rows)
    return packed(rows, codes, scales, work, columns=columns, transposed=transposed, tile=tile)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _packed(
    columns: int, rows: Array, codes: Array, scales: Array, sizes: Array, first: Array
) -> Array:
    return _packed_times(columns, rows, codes, scales, sizes, first, transposed=True)


def _packed_forward(columns: int, rows: Array, *rest: Array) -> tuple:
    return _packed(columns, rows, *rest), rest


def _packed_backward(columns: int, saved: tuple, d_out: Array) -> tuple:
    codes, scales, sizes, first = saved
    d_rows = _packed_times(columns, d_out, codes, scales, sizes, first, transposed=False)
    return _in_groups(d_rows, sizes), *map(_no_gradient, saved)


_packed.defvjp(_packed_forward, _packed_backward)
