"""The device mesh of a run: five axes, each of size 1 by default, over all devices."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils

from gptoss_jax.config import MeshConfig
from gptoss_jax.errors import UserError

# Outermost first: axes that communicate most are innermost, where devices are nearest.
AXES = ("data", "fsdp", "expert", "context", "tensor")
# The axes that shard the rows of a batch. The tokens of a row are sharded over "context".
ROWS = ("data", "fsdp", "expert")


def make(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Make the mesh over `devices`, by default all devices of the run.

    One size may be -1: it gets the devices that the other sizes leave. If all sizes are 1, the
    default, the mesh has only the first device. Neighbours on the mesh are neighbours on a TPU's
    torus (`mesh_utils`). The outermost axes go across slices, or across hosts of GPUs.

    Raises:
        UserError: The product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve(config, len(devices))
    if math.prod(shape) == 1:
        devices = devices[:1]
    return jax.sharding.Mesh(
        _arrange(shape, devices), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES)
    )


def resolve(config: MeshConfig, count: int) -> tuple[int, ...]:
    """Return the sizes of `AXES` on `count` devices, -1 resolved. Raises UserError as `make`."""
    sizes = {axis: getattr(config, axis) for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    given = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != 1)
    if -1 in sizes.values():
        if count % known:
            raise UserError(
                f"mesh: {given} on {count} devices: the sizes that are given make {known}, which "
                f"does not divide {count}"
            )
        sizes = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    elif known not in (1, count):
        raise UserError(
            f"mesh: {given} is for {known} devices, and there are {count}: make one size -1, or "
            "give sizes whose product is that"
        )
    return tuple(sizes.values())


def _arrange(shape: tuple[int, ...], devices: list[Any]) -> np.ndarray:
    """Order devices so that inner axes stay within a slice, and there within the torus."""
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    outer, left = [], slices
    for size in shape:  # the outermost axes go across slices
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    if left > 1:
        raise UserError(
            f"mesh: {slices} slices can't be spread over axes of sizes "
            f"{', '.join(map(str, shape))}: make data or fsdp a multiple of {slices}"
        )
    inner = [size // across for size, across in zip(shape, outer, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(
        inner, outer, devices, allow_split_physical_axes=True
    )


_alone: ContextVar[bool] = ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Ignore the current mesh and trace as on one device: for shapes, and to make parameters."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def current() -> Any:
    """Return the current mesh (`jax.set_mesh`) if it has several devices; else None.

    It is None inside a `shard_map` too: arrays are local there, and there is nothing to shard.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or tuple(mesh.axis_names) != AXES or _alone.get():
        return None
    if any(kind == jax.sharding.AxisType.Manual for kind in mesh.axis_types):
        return None
    return mesh


def size(*axes: str) -> int:
    """Return the product of the sizes of these axes of the current mesh; 1 without one."""
    mesh = current()
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in axes)


def describe(mesh: jax.sharding.Mesh) -> str:
    """Describe the mesh in one line, as in "fsdp 4 x expert 2 on 8 devices, 2 hosts"."""
    there = jax.device_count()
    if mesh.size == 1:
        return "one device" if there == 1 else f"device 1 of {there}: --mesh.fsdp -1 uses all"
    sizes = " x ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
    hosts = len({device.process_index for device in mesh.devices.flat})
    return f"{sizes} on {mesh.size} devices" + (f", {hosts} hosts" if hosts > 1 else "")


def sizes(mesh: Any) -> MeshConfig:
    """Return the sizes of a mesh as a config."""
    return dataclasses.replace(MeshConfig(), **dict(mesh.shape))
