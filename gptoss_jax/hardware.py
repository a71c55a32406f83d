"""Devices that are not here: the compilers' descriptions of chips, to compile for.

TPUs need libtpu (`pip install "jax[tpu]"`), NVIDIA GPUs JAX's CUDA plug-in: `.[aot]` has both.
No program runs on such devices; `.lower(...).compile().memory_analysis()` is the compiler's own.
"""

from __future__ import annotations

import math
import os
from importlib import resources
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from gptoss_jax.errors import UserError
from gptoss_jax.ops.chips import TPUS

GPUS = ("h200",)

# Without them libtpu looks for a metadata server, two processes at once abort over its lock file,
# and JAX's CUDA plug-in looks for a driver.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}


def devices(target: str) -> list[Any]:
    """Return the devices of `target`: "v5e:4x8", "v5p:2x2x1", "h200:8"; the chip alone is one.

    A tpu7x chip shows as two devices. Raises UserError for an unknown chip, a shape that the
    compiler refuses, or a compiler that is not installed.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    kind, _, shape = target.partition(":")
    if kind not in (*TPUS, *GPUS):
        raise UserError(f"target {target!r}: the chips are {', '.join((*TPUS, *GPUS))}")
    try:
        return _gpus(kind, shape) if kind in GPUS else _tpus(kind, shape)
    except UserError:
        raise
    except Exception as error:  # the plug-ins raise what they like
        raise UserError(f"target {target!r}: {str(error).splitlines()[0]}") from error


def mesh(target: str, axis: str = "x") -> jax.sharding.Mesh:
    """Return a mesh of one axis over the devices of `target`."""
    return jax.sharding.Mesh(np.array(devices(target)), (axis,))


def _tpus(kind: str, shape: str) -> list[Any]:
    shape = shape or ("1x1" if kind in ("v5e", "v6e") else "1x1x1")
    sizes = [int(size) for size in shape.split("x")]
    one = {"chips_per_host_bounds": (1, 1, 1)} if math.prod(sizes) == 1 else {}
    found = topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **one
    ).devices
    # One tpu7x chip is two devices: "tpu7x" alone means one of them.
    return list(found)[:1] if math.prod(sizes) == 1 else list(found)


def _gpus(kind: str, shape: str) -> list[Any]:
    if shape and not shape.isdigit():
        raise UserError(f"target '{kind}:{shape}': give a count, as in {kind}:8")
    text = (resources.files("gptoss_jax") / "targets" / f"{kind}.txtpb").read_text()
    found = topologies.get_topology_desc(
        platform="cuda", topology_name=kind, target_config=text, topology=f"1x1x{shape or 1}"
    ).devices
    return list(found)
