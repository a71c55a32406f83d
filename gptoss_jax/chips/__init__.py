"""Which chip a program is traced for, so that ops can choose: the one here, or one assumed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gptoss_jax.chips.facts import FACTS, TARGETS, TPUS, name_of

Platform = Literal["cpu", "gpu", "tpu"]

HOPPER = ("h100", "h200")
MOSAIC_GPU = (0, 11, 2)  # of jax: before it the names of the backend were others


@dataclass(frozen=True)
class Chip:
    """A kind of device. `kind` is a name of `facts.TARGETS`, "cpu", or "other"."""

    platform: Platform
    kind: str
    interpret: bool = False  # Pallas kernels run in the interpreter on this machine's CPU


_assumed: ContextVar[Chip | None] = ContextVar("chip", default=None)


def current() -> Chip:
    """Return the chip that is assumed, or else that of JAX's default backend."""
    return _assumed.get() or _of(jax.devices()[0])


def named(kind: str, *, interpret: bool = False) -> Chip:
    """Return the chip of a name ("cpu", "v5e", "h200" and the like). Raises ValueError."""
    if kind == "cpu":
        return Chip("cpu", "cpu", interpret)
    if kind not in TARGETS:
        raise ValueError(f"chip {kind!r}: use one of cpu, {', '.join(TARGETS)}")
    return Chip("tpu" if kind in TPUS else "gpu", kind, interpret)


@contextlib.contextmanager
def assume(kind: str, *, interpret: bool = False) -> Iterator[Chip]:
    """Trace as if for chip `kind`: to compile for what is not here, or to interpret its kernels.

    What was traced before is forgotten, and on leaving too: the choice is no part of jit's key.
    """
    chip = named(kind, interpret=interpret)
    jax.clear_caches()
    token = _assumed.set(chip)
    try:
        yield chip
    finally:
        _assumed.reset(token)
        jax.clear_caches()


def peak_flops(peak_tflops: float = 0.0, *, devices: int = 1) -> float | None:
    """Return the peak of so many of the devices here in FLOP/s; None if it is not known (a CPU's).

    `peak_tflops`, of one device, goes before the table.
    """
    row = FACTS.get(name_of(jax.devices()[0].device_kind) or "")
    peak = peak_tflops * 1e12 or (row.flops if row else 0.0)
    return peak * devices if peak else None


def tpu_interpreter() -> Any:
    """Return `interpret=` of a TPU `pallas_call`: False, or an interpreter that finds races.

    Memory that nothing was written to reads as NaN in it.
    """
    if not current().interpret:
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    )


def gpu_interpreter() -> Any:
    """Return `interpret=` of a Mosaic GPU kernel: False, or an interpreter that finds races."""
    if not current().interpret:
        return False
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # of a later jax than the types here may be of
    return plgpu.InterpretGPUParams(detect_races=True)


def refuse_tpu_kernel() -> str | None:
    """Say why no TPU kernel can run here, or None."""
    chip = current()
    return None if chip.platform == "tpu" else f"it is a TPU kernel, and this is a {chip.kind}"


def refuse_hopper_kernel() -> str | None:
    """Say why no Hopper kernel of Mosaic GPU can run here, or None."""
    chip = current()
    if chip.kind not in HOPPER:
        return f"it is a kernel for Hopper (H100, H200), and this is a {chip.kind}"
    if jax.__version_info__ < MOSAIC_GPU:
        return f"it needs jax 0.11.2 or later, and this is {jax.__version__}"
    return None


def _of(device: Any) -> Chip:
    platform: Any = device.platform
    if platform == "cpu":
        return Chip("cpu", "cpu")
    kind = (name_of(device.device_kind) or "other").partition("-")[0]
    return Chip("tpu" if platform == "tpu" else "gpu", kind if kind in TARGETS else "other")
