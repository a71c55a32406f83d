"""The chip that a program is traced for, by which ops choose: the chip here, or an assumed one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import jax

from gptoss_jax.chips.facts import FACTS, TARGETS, TPUS, name_of, programs_of

Platform = Literal["cpu", "gpu", "tpu"]

HOPPER = ("h100", "h200")
MOSAIC_GPU = (0, 11, 2)  # least version of jax: earlier ones have other names in the backend


@dataclass(frozen=True)
class Chip:
    """A kind of device. `kind` is a name of `facts.TARGETS`, "cpu", or "other"."""

    platform: Platform
    kind: str
    interpret: bool = False  # whether Pallas kernels run in the interpreter, on this machine's CPU


_assumed: ContextVar[Chip | None] = ContextVar("chip", default=None)


def current() -> Chip:
    """Return the assumed chip, or else the chip of JAX's default backend."""
    return _assumed.get() or _of(jax.devices()[0])


def named(kind: str, *, interpret: bool = False) -> Chip:
    """Return the chip with a name such as "cpu", "v5e" or "h200". Raises ValueError."""
    if kind == "cpu":
        return Chip("cpu", "cpu", interpret)
    if kind not in TARGETS:
        raise ValueError(f"chip {kind!r}: use one of cpu, {', '.join(TARGETS)}")
    return Chip("tpu" if kind in TPUS else "gpu", programs_of(kind), interpret)


@contextlib.contextmanager
def assume(kind: str, *, interpret: bool = False) -> Iterator[Chip]:
    """Trace as if for chip `kind`: to compile for an absent chip, or to interpret its kernels.

    JAX's caches are cleared on entry and on exit, because the chip is not part of jit's cache key.
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
    """Return the peak FLOP/s of `devices` devices like the first one here; None if not known.

    The peak of a CPU is not known. `peak_tflops` (per device, in TFLOP/s) overrides the table; 0
    means not given.
    """
    row = FACTS.get(name_of(jax.devices()[0].device_kind) or "")
    peak = peak_tflops * 1e12 or (row.flops if row else 0.0)
    return peak * devices if peak else None


def tpu_interpreter() -> Any:
    """Return `interpret=` for a TPU `pallas_call`: False, or an interpreter that finds races.

    In the interpreter, uninitialised memory reads as NaN.
    """
    if not current().interpret:
        return False
    from jax.experimental.pallas import tpu as pltpu

    return pltpu.InterpretParams(
        detect_races=True, dma_execution_mode="on_wait", uninitialized_memory="nan"
    )


def gpu_interpreter() -> Any:
    """Return `interpret=` for a Mosaic GPU kernel: False, or an interpreter that finds races."""
    if not current().interpret:
        return False
    from jax.experimental.pallas import mosaic_gpu

    plgpu: Any = mosaic_gpu  # Any, because the type checker may see an earlier jax
    return plgpu.InterpretGPUParams(detect_races=True)


def refuse_tpu_kernel() -> str | None:
    """Return why no TPU kernel can run here, or None."""
    chip = current()
    return None if chip.platform == "tpu" else f"it is a TPU kernel, and this is a {chip.kind}"


def refuse_hopper_kernel() -> str | None:
    """Return why no Hopper kernel of Mosaic GPU can run here, or None."""
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
    kind = programs_of(name_of(device.device_kind) or "other")
    return Chip("tpu" if platform == "tpu" else "gpu", kind if kind in TARGETS else "other")
