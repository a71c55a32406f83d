"""Compute a checksum for each array of a tree, on the device that holds the array."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, UInt, UInt32

from gptoss_jax.parallel import padding
from gptoss_jax.parameters.tree import path_name

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}
_BLOCK = 512  # the least number of elements that a CPU sums at once


def checksums(tree: Any, *, expert_padding: int = 0) -> dict[str, int]:
    """Return path -> 32-bit checksum for each array of a pytree; a path is like `layers/x/bias`.

    A checksum depends only on the bits of the array, not on its sharding, and not on the columns
    that a mesh added to experts (`parallel.padding`). It does not cover shape and dtype. A change
    of one element always changes the checksum; any other change (of several elements, or of their
    order) is missed with a probability of 2**-32. Each array is read once, and not copied.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    whole = jax.tree.leaves(padding.resize(shapes, by=-expert_padding))
    # One after the other: on CPUs, programs that run at the same time may deadlock. Two processes
    # may start the programs' all-reduces in different orders and then wait for each other for ever.
    return {
        path_name(path): int(_checksum(leaf, real.shape))
        for (path, leaf), real in zip(leaves, whole, strict=True)
    }


def differences(expected: dict[str, int], found: dict[str, int]) -> list[str]:
    """Return the paths whose checksums differ, or that only one of the two results has."""
    return sorted(name for name in expected | found if expected.get(name) != found.get(name))


def _checksum(x: jax.Array, shape: tuple[int, ...]) -> UInt32[Array, ""]:
    # An accelerator fuses the sum with the values it adds. A CPU would store those in full, so it
    # sums block by block. It reads the host's integer view of the array, because in a loop XLA
    # would first widen a whole bfloat16 array.
    if len(x.devices()) == 1 and {d.platform for d in x.devices()} == {"cpu"}:
        bits = np.ascontiguousarray(np.asarray(x)[tuple(map(slice, shape))]).reshape(shape)
        return _sum_by_blocks(bits.view(_UNSIGNED[bits.dtype.itemsize]))
    memory = next(iter(x.sharding.device_set)).default_memory().kind
    if x.sharding.memory_kind not in (None, memory):  # kept on the host (`embedding_on_host`)
        x = jax.device_put(x, x.sharding.with_memory_kind(memory))
    return _sum_at_once(x, shape)


@partial(jax.jit, static_argnums=1)
def _sum_at_once(x: Array, shape: tuple[int, ...]) -> UInt32[Array, ""]:
    if x.dtype == jnp.bool_:
        return _sum(x.astype(jnp.uint8), shape=shape)
    return _sum(lax.bitcast_convert_type(x, _UNSIGNED[x.dtype.itemsize]), shape=shape)


@jax.jit
def _sum_by_blocks(x: UInt[Array, "..."]) -> UInt32[Array, ""]:
    """Return `_sum(x)`, computed in a loop over blocks.

    A block is made of as few trailing axes as hold `_BLOCK` elements.
    """
    sizes = [math.prod(x.shape[axis:]) for axis in range(x.ndim + 1)]
    axis = max((i for i, size in enumerate(sizes) if size >= _BLOCK), default=0)
    if axis == 0:
        return _sum(x)
    blocks = x.reshape(-1, *x.shape[axis:])

    def add(total: UInt32[Array, ""], i: UInt32[Array, ""]) -> tuple[UInt32[Array, ""], None]:
        return total + _sum(blocks[i], start=i * jnp.uint32(sizes[axis] % 2**32)), None

    return lax.scan(add, jnp.uint32(0), jnp.arange(blocks.shape[0], dtype=jnp.uint32))[0]


def _sum(
    x: UInt[Array, "..."],
    *,
    start: UInt32[Array, ""] | int = 0,
    shape: tuple[int, ...] | None = None,
) -> UInt32[Array, ""]:
    """Sum the elements, each mixed with its row-major index; the first index is `start`.

    The sum is modulo 2**32, so the order in which devices add does not matter. Elements beyond
    `shape` on any axis are left out.
    """
    shape = x.shape if shape is None else shape
    place = jnp.full(x.shape, start, jnp.uint32)
    inside = jnp.bool_(True)
    for axis in range(x.ndim):  # a reshape would gather a sharded array
        stride = math.prod(shape[axis + 1 :]) % 2**32
        at = lax.broadcasted_iota(jnp.uint32, x.shape, axis)
        place += at * jnp.uint32(stride)
        if shape[axis] < x.shape[axis]:
            inside &= at < shape[axis]
    mixed = _mix(x.astype(jnp.uint32) ^ _mix(place))
    return jnp.sum(jnp.where(inside, mixed, 0), dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Mix the bits of 32-bit numbers, one to one: the last steps of MurmurHash3 (Appleby, 2011)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
