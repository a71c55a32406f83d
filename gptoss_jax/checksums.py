"""A checksum for each array of a tree, computed where the array lies."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt, UInt32

from gptoss_jax.types import path_name

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_BLOCK = 512  # elements at least that a CPU sums at once


def checksums(tree: Any) -> dict[str, int]:
    """Return path -> 32-bit checksum for each array of a pytree, paths such as `layers/x/bias`.

    Depends on the bits alone, and not on how the array is spread over devices. Any change within
    one element changes it for sure; any other change (of several elements, of their order) but for
    one chance in 2**32. It does not cover shape and dtype. An array is read once, and not copied.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    sums = {path_name(path): _checksum(leaf) for path, leaf in leaves}
    return {name: int(value) for name, value in jax.device_get(sums).items()}


def differences(expected: dict[str, int], found: dict[str, int]) -> list[str]:
    """Name what is not alike in two results of `checksums`, or is in one alone."""
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def _checksum(x: jax.Array) -> UInt32[Array, ""]:
    # An accelerator fuses the sum with what is summed. A CPU would write that out in full, so there
    # it goes by blocks, over a view by the host: in a loop XLA widens a whole bfloat16 array.
    if len(x.devices()) == 1 and {d.platform for d in x.devices()} == {"cpu"}:
        bits = np.asarray(x)
        return _sum_by_blocks(bits.view(_UNSIGNED[bits.dtype.itemsize]))
    return _sum_at_once(x)


@jax.jit
def _sum_at_once(x: Array) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        return _sum(x.astype(jnp.uint8))
    return _sum(lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]))


@jax.jit
def _sum_by_blocks(x: UInt[Array, "..."]) -> UInt32[Array, ""]:
    """Do as `_sum`, in turn over blocks of trailing axes that are large enough for a loop."""
    sizes = [math.prod(x.shape[axis:]) for axis in range(x.ndim + 1)]
    axis = max((i for i, size in enumerate(sizes) if size >= _BLOCK), default=0)
    if axis == 0:
        return _sum(x)
    blocks = x.reshape(-1, *x.shape[axis:])

    def add(total: UInt32[Array, ""], i: UInt32[Array, ""]) -> tuple[UInt32[Array, ""], None]:
        return total + _sum(blocks[i], start=i * jnp.uint32(sizes[axis] % 2**32)), None

    return lax.scan(add, jnp.uint32(0), jnp.arange(blocks.shape[0], dtype=jnp.uint32))[0]


def _sum(x: UInt[Array, "..."], *, start: UInt32[Array, ""] | int = 0) -> UInt32[Array, ""]:
    """Sum the elements, each mixed with its place in row-major order, which begins at `start`.

    Modulo 2**32, so it comes out the same in whatever order devices add up.
    """
    place = jnp.full(x.shape, start, jnp.uint32)
    for axis in range(x.ndim):  # a reshape would gather an array that is spread over devices
        stride = math.prod(x.shape[axis + 1 :]) % 2**32
        place += lax.broadcasted_iota(jnp.uint32, x.shape, axis) * jnp.uint32(stride)
    return jnp.sum(_mix(x.astype(jnp.uint32) ^ _mix(place)), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix the bits of 32-bit numbers, one to one: the last steps of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
