"""What a case of benchmarks/kernels.py is, its sizes, and the arguments that cases are made of."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.ops import mxfp4
from gptoss_jax.types import MXFP4

# The order that each kernel reads packed weights in; the others take them as the checkpoint does.
LAYOUTS = {
    "planes": ("planes",),
    "pallas_gpu": ("hopper",),
    "pallas_tpu": ("columns", "int8", "fp4"),
}
MOST_SETS = 64


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The shapes of a run, in the letters of `gptoss_jax.types`."""

    dtype: str = "bfloat16"
    T: int = 8192
    S: int = 8192
    W: int = 128
    N: int = 64
    K: int = 8
    H: int = 64
    batches: tuple[int, ...] = (1, 8, 64)
    D: int = 2880
    F: int = 2880
    E: int = 32
    A: int = 4
    prefill: int = 4096  # rows; times A is the P of the grouped matmul
    decode: tuple[int, ...] = (1, 4, 16)  # rows
    matrices: tuple[str, ...] = ("gate_up", "down")
    M: int = 8192
    V: int = 201_088


FULL = Sizes()
FULL_CHECK = Sizes(T=1024, S=1024, prefill=256, M=256, V=20_000)
SMALL = Sizes(
    dtype="float32", T=1024, S=1024, N=8, K=2, batches=(1,), D=256, F=256, E=8, prefill=256,
    decode=(1,), matrices=("gate_up",), M=256, V=16_000,
)  # fmt: skip
SMALL_CHECK = dataclasses.replace(SMALL, T=300, S=300, prefill=64, M=40, V=1000)
QUICK = dataclasses.replace(
    SMALL, T=160, S=160, W=64, N=2, K=1, batches=(2,), D=64, F=64, prefill=16, decode=(2,), M=32,
    V=500,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape, called one way ("forward" and so on)."""

    op: str
    name: str
    way: str
    names: tuple[str, ...]  # of the implementations
    make: Callable[[int, str | None], Sequence[tuple]]  # (calls, layout) -> arguments of each
    run: Callable[[str], Callable[..., Any]]
    flops: float  # that the result takes, whatever an implementation does
    read: float  # bytes of arguments that a call must read, and
    written: float  # of results
    dtype: str
    layouts: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.op} {self.name}, {self.way}"

    def variants(self) -> list[tuple[str, str | None]]:
        """Return each implementation with each layout that its weights may have; reference last."""
        names = sorted(self.names, key=lambda name: (name == "reference", name == "xla"))
        every: list[tuple[str, str | None]] = []
        for name in names:
            every += [(name, layout) for layout in self.layouts.get(name, (None,))]
        return every

    def sets(self, rotation: float) -> int:
        """Return of how many calls the arguments together exceed `rotation` bytes."""
        return int(min(max(-(-rotation // self.read), 1), MOST_SETS))


def names(order: Mapping[str, Iterable[str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for names in order.values() for name in names))


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def normal(key: jax.Array, shape: tuple[int, ...], dtype: Any, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


@functools.partial(jax.jit, static_argnums=1)
def packed_weight(key: jax.Array, shape: tuple[int, ...]) -> MXFP4:
    """Return a weight whose values are near 0.02, as those of a model are."""
    codes, scales = jax.random.split(key)
    blocks = jax.random.bits(codes, (*shape[:-1], shape[-1] // 32, 16), jnp.uint8)
    exponents = jax.random.randint(scales, (*shape[:-1], shape[-1] // 32), 118, 121)
    return MXFP4(blocks, exponents.astype(jnp.uint8))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _relaid(weight: MXFP4, layout: str, row_axes: int) -> Any:
    return mxfp4.relayout(weight, layout, row_axes=row_axes)


def in_layout(weight: MXFP4, layout: str | None, row_axes: int) -> Any:
    return weight if layout is None else _relaid(weight, layout, row_axes)


def backward(function: Callable[..., Any], wanted: int) -> Callable[..., Any]:
    """Return the gradients in the first `wanted` arguments alone; the last argument is d out."""

    def run(*args):
        rest = args[wanted:-1]
        return jax.vjp(lambda *a: function(*a, *rest), *args[:wanted])[1](args[-1])

    return run


def both(function: Callable[..., Any], wanted: int) -> Callable[..., Any]:
    """Return the result and the gradients."""

    def run(*args):
        out, back = jax.vjp(lambda *a: function(*a, *args[wanted:-1]), *args[:wanted])
        return out, back(args[-1])

    return run


def weight_bytes(shape: tuple[int, ...], dtype: Any, *, packed: bool) -> float:
    return math.prod(shape) * (17 / 32 if packed else jnp.dtype(dtype).itemsize)
