"""Devices that are not here: what the data sheets say of them, and the compilers' descriptions.

TPUs need libtpu (`pip install "jax[tpu]"`), NVIDIA GPUs JAX's CUDA plug-in: `.[aot]` has both.
No program runs on such devices; `.lower(...).compile().memory_analysis()` is the compiler's own.
"""

from __future__ import annotations

import importlib.util
import math
import os
import platform
import sys
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from gptoss_jax.errors import UserError

GiB = 2**30
GPUS = ("t4", "l4", "h100", "h200", "b200")
GPUS_A_HOST = 8

# Without them libtpu looks for a metadata server, two processes at once abort over its lock file,
# and JAX's CUDA plug-in looks for a driver.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}


@dataclass(frozen=True)
class Facts:
    """What a device has; rates are a second's. One tpu7x chip is two devices, each half of it."""

    nominal: str  # memory as it is sold
    memory: int  # bytes that a program can take
    flops: float  # dense bfloat16 (float16 where there is none)
    bandwidth: float  # bytes between memory and chip
    links: float  # bytes out of a device to those beside it, over all its links, in one direction
    network: float  # the same to devices of another host or slice
    source: str


def _gpu(
    nominal: str,
    reported: float,
    flops: float,
    bandwidth: float,
    links: float,
    network: float,
    source: str,
) -> Facts:
    """Take what the driver reports, in GiB, without what CUDA and NCCL keep for themselves."""
    memory = int((reported - GPU_RESERVE) * GiB)
    return Facts(nominal, memory, flops, bandwidth, links, network, source)


# GiB of a GPU that no program of XLA gets: CUDA's context, its libraries' handles and workspaces.
# XLA_PYTHON_CLIENT_MEM_FRACTION has to be raised from its 0.75 for the rest to be there.
GPU_RESERVE = 0.4

# TPU memory is the limit that libtpu's compiler refuses beyond ("exceeds available HBM (15.75G)"):
# the system's own part is out of it already. Rates of TPUs: cloud.google.com/tpu/docs, the pages
# v5e, v5p, v6e and tpu7x; links are half of the "bidirectional" figure, the network of a chip is
# its share of its host's. GPU memory is what CUDA reports as total (deviceQuery; torch's "total
# capacity"), less GPU_RESERVE. Rates of GPUs: NVIDIA's data sheets, without sparsity; links are one
# direction of NVLink, or of PCIe (T4: 3.0, L4: 4.0, 16 lanes); the network is one 400 Gbit/s port a
# GPU as in DGX H100, H200 and B200, and 100 Gbit/s a GPU for the small ones.
FACTS = {
    "v5e": Facts("16 GB", int(15.75 * GiB), 197e12, 819e9, 200e9, 6.25e9, "Cloud TPU v5e page"),
    "v5p": Facts("95 GB", int(95.73 * GiB), 459e12, 2765e9, 600e9, 6.25e9, "Cloud TPU v5p page"),
    "v6e": Facts("32 GB", int(31.24 * GiB), 918e12, 1638e9, 400e9, 12.5e9, "Cloud TPU v6e page"),
    "tpu7x": Facts(
        "96 GB", int(94.74 * GiB), 1153.5e12, 3690e9, 300e9, 6.25e9,
        "Cloud TPU7x page, half a chip",
    ),
    "t4": _gpu("16 GB", 14.56, 65e12, 320e9, 16e9, 12.5e9, "T4 data sheet (float16)"),
    "l4": _gpu("24 GB", 22.05, 121e12, 300e9, 32e9, 12.5e9, "L4 data sheet"),
    "h100": _gpu("80 GB", 79.11, 989e12, 3350e9, 450e9, 50e9, "H100 SXM data sheet"),
    "h200": _gpu("141 GB", 139.8, 989e12, 4800e9, 450e9, 50e9, "H200 SXM data sheet"),
    "b200": _gpu("180 GB", 178.34, 2250e12, 8000e9, 900e9, 50e9, "HGX B200 data sheet"),
}  # fmt: skip


def split(target: str) -> tuple[str, str]:
    """Split "v5p:4x4x4" into chip and shape. Raises UserError for a chip that is not known."""
    kind, _, shape = target.partition(":")
    if kind not in FACTS:
        raise UserError(f"target {target!r}: the chips are {', '.join(FACTS)}")
    if shape and not all(size.isdigit() and int(size) for size in shape.split("x")):
        raise UserError(
            f"target {target!r}: after the colon comes a topology as in v5p:4x4x4, or a count of "
            "GPUs as in h200:8"
        )
    return kind, shape


def devices(target: str) -> list[Any]:
    """Return the devices of `target`: "v5e:4x8", "v5p:2x2x1", "h200:8"; the chip alone is one.

    A tpu7x chip shows as two devices. Raises UserError for an unknown chip, a shape that the
    compiler refuses, or a compiler that is not installed.
    """
    kind, shape = split(target)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    _check_compiler(target, "jax_cuda13_plugin" if kind in GPUS else "libtpu")
    try:
        return _gpus(kind, shape) if kind in GPUS else _tpus(kind, shape)
    except UserError:
        raise
    except Exception as error:  # the plug-ins raise what they like
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
    if len(sizes) != len(one_chip.split("x")):  # which ends the compiler's process
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
