"""Descriptions of devices that this machine does not have, to compile programs for them.

TPUs need libtpu (`pip install "jax[tpu]"`), and NVIDIA GPUs need JAX's CUDA plug-in; `.[aot]` has
both. No program can run on such devices, but `.lower(...).compile().memory_analysis()` gives the
real compiler's figures.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import sys
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from gptoss_jax.chips.facts import GPUS, TARGETS
from gptoss_jax.errors import UserError

GPUS_A_HOST = 8

# Without these variables, libtpu looks for a metadata server, two processes at once abort because
# of its lock file, and JAX's CUDA plug-in looks for a driver.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}


# The slices that Google sells, by number of chips; the names of v5p and tpu7x count two cores for
# each chip (TPU_ACCELERATOR_TYPE in GKE: "tpu7x-16" is 2x2x2).
_FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
_CUBES = {
    4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
    512: "8x8x8", 1024: "8x8x16", 2048: "8x16x16",
}  # fmt: skip
_SOLD = {"v5e": ("v5e", 1, _FLAT), "v5litepod": ("v5e", 1, _FLAT), "v6e": ("v6e", 1, _FLAT)}
_SOLD |= {"v5p": ("v5p", 2, _CUBES), "tpu7x": ("tpu7x", 2, _CUBES)}
_MEMORY = {"40": "a100-40", "80": "a100"}  # what follows "a100:" is GB, and not a count of GPUs


def split(target: str) -> tuple[str, str]:
    """Split a target such as "v5p:4x4x4" into chip and shape.

    Names of Google's slices are targets, too: "v6e-8" is ("v6e", "2x4"), and "v5p-128", which has
    128 cores, is ("v5p", "4x4x4"). "a100:40" is one A100 of 40 GB, and "a100:80" one of 80 GB.
    Capitals mean the same as small letters.

    Raises UserError if the chip is not known or the shape is malformed.
    """
    target = target.lower()
    if target.startswith("a100:"):
        memory, _, count = target.removeprefix("a100:").partition(":")
        if memory in _MEMORY and count:
            raise UserError(
                f"target {target!r}: several A100 of {memory} GB are {_MEMORY[memory]}:{count}"
            )
        if memory in _MEMORY:
            return _MEMORY[memory], ""
    family, _, size = target.partition("-")
    if family in _SOLD and size:
        kind, cores, shapes = _SOLD[family]
        sold = {str(chips * cores): shape for chips, shape in shapes.items()}
        if size not in sold:
            known = ", ".join(f"{family}-{size}" for size in sold)
            raise UserError(f"target {target!r}: there are {known}; or give a topology, {kind}:...")
        return kind, sold[size]
    kind, _, shape = target.partition(":")
    if kind.startswith("mi"):
        raise UserError(
            f"target {target!r}: there are no plans for AMD's GPUs: JAX compiles for them only by "
            "ROCm's own plug-in and an installed ROCm; nothing here was tried on them"
        )
    if kind not in TARGETS:
        raise UserError(f"target {target!r}: the chips are {', '.join(TARGETS)}")
    if shape and not all(size.isdigit() and int(size) for size in shape.split("x")):
        raise UserError(
            f"target {target!r}: after the colon comes a topology as in v5p:4x4x4, or a count of "
            "GPUs as in h200:8"
        )
    return kind, shape


def devices(target: str) -> list[Any]:
    """Return the devices of `target`, such as "v5e:4x8", "v5p:2x2x1" or "h200:8".

    A chip's name without a shape means one device. A tpu7x chip shows as two devices.

    Raises:
        UserError: The chip is not known, the compiler refuses the shape, or the compiler is not
            installed.
    """
    kind, shape = split(target)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check_compiler(target, "jax_cuda13_plugin" if kind in GPUS else "libtpu")
    try:
        return _gpus(kind, shape) if kind in GPUS else _tpus(kind, shape)
    except UserError:
        raise
    except Exception as error:  # the plug-ins raise any type of exception
        raise UserError(f"target {target!r}: {str(error).splitlines()[0]}") from error


def mesh(target: str, axis: str = "x") -> jax.sharding.Mesh:
    """Return a mesh of one axis over the devices of `target`."""
    return jax.sharding.Mesh(np.array(devices(target)), (axis,))


def _check_compiler(target: str, module: str) -> None:
    if importlib.util.find_spec(module) is None:
        what = "TPUs (libtpu)" if module == "libtpu" else "NVIDIA GPUs (JAX's CUDA plug-in)"
        raise UserError(
            f"target {target!r}: the compiler for {what} is not installed for {sys.executable}: "
            "pip install -e '.[aot]' on Linux, Python 3.12, in an environment of its own "
            "(`make plan` makes .venv-aot and does so)"
            + ("" if platform.system() == "Linux" else f"; this is {platform.system()}")
        )


def _tpus(kind: str, shape: str) -> list[Any]:
    one_chip = "1x1" if kind in ("v5e", "v6e") else "1x1x1"
    shape = shape or one_chip
    sizes = [int(size) for size in shape.split("x")]
    if len(sizes) != len(one_chip.split("x")):  # the compiler would end the whole process
        like = "v5e:4x8" if one_chip == "1x1" else "v5p:4x4x4"
        raise UserError(f"target '{kind}:{shape}': {kind} has a topology like that of {like}")
    one = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **one
    ).devices
    # One tpu7x chip is two devices: "tpu7x" alone means one of them.
    return list(found)[:1] if math.prod(sizes) == 1 else list(found)


def _gpus(kind: str, shape: str) -> list[Any]:
    if shape and not shape.isdigit():
        raise UserError(f"target '{kind}:{shape}': give a count, as in {kind}:8")
    count = int(shape or 1)
    hosts, odd = divmod(count, GPUS_A_HOST)
    if count > GPUS_A_HOST and odd:
        raise UserError(f"target '{kind}:{shape}': more than a host's 8 come in multiples of 8")
    topology = f"1x{hosts}x{GPUS_A_HOST}" if hosts > 1 else f"1x1x{count}"
    text = (resources.files("gptoss_jax.chips") / "targets" / f"{kind}.txtpb").read_text()
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=text, topology=topology
    ).devices
    return list(found)
