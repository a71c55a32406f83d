"""How benchmarks/kernels.py checks a case against the reference, and times it."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from kernel_case import Case

from gptoss_jax import chips

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # relative norm
CALLS = 16  # in one program, where a call is so short that starting it would be measured
SHORT = 2e-3  # seconds
LEAST, MOST = 3, 200  # samples


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds a call, and how they were taken."""

    seconds: float
    samples: int
    calls: int  # a sample
    sets: int  # of arguments, in rotation


def reason(error: BaseException) -> str:
    """Return the first line of what went wrong."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"


WRONG_CHIP = {"pallas_tpu": chips.refuse_tpu_kernel, "pallas_gpu": chips.refuse_hopper_kernel}


def refusal(case: Case, implementation: str, layout: str | None) -> str | None:
    """Say why the dispatcher refuses the case, or None. Nothing is run, no array made."""
    if (why := WRONG_CHIP.get(implementation, lambda: None)()) is not None:
        return why  # without tracing
    args = jax.eval_shape(lambda: case.make(1, layout)[0])
    try:
        jax.eval_shape(case.run(implementation), *args)
    except ValueError as error:
        if "can't run" in str(error):
            return str(error).split("can't run: ")[-1]
        raise
    return None


def expected(case: Case) -> Any:
    """Return the reference's results on float32 copies of the arguments."""
    wide = jax.tree.map(_wide, case.make(1, None)[0])
    with jax.default_matmul_precision("highest"):
        return jax.jit(case.run("reference"))(*wide)


def check(case: Case, implementation: str, layout: str | None, want: Any) -> dict[str, Any]:
    """Return how far off `want` it is, in relative norm, and how far it may be."""
    got = jax.jit(case.run(implementation))(*case.make(1, layout)[0])
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
    apart = [
        float(jnp.linalg.norm((a.astype(jnp.float32) - b).ravel()) / jnp.linalg.norm(b.ravel()))
        for a, b in pairs
    ]
    bound = TOLERANCE[case.dtype]
    # NaN is no number that is in bounds
    return {"apart": max(apart), "bound": bound, "right": all(a <= bound for a in apart)}


def _wide(x: Any) -> Any:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x


def measure(
    case: Case, implementation: str, layout: str | None, *, rotation: float, seconds: float
) -> Timing:
    """Time calls with other arguments each, for about `seconds` after compiling.

    Calls shorter than `SHORT` run `CALLS` at a time in one program, one after the other.
    """
    sets = case.make(case.sets(rotation), layout)
    run = case.run(implementation)
    one = jax.jit(lambda *args: run(*args))
    jax.block_until_ready(one(*sets[0]))
    single = _time(lambda: one(*sets[-1]))
    on_cpu = chips.current().platform == "cpu"  # where starting a call costs next to nothing
    if single > SHORT or len(sets) == 1 or on_cpu:
        programs: list[Callable[[], Any]] = [lambda args=args: one(*args) for args in sets]
        calls = 1
    else:
        chained = jax.jit(lambda every: _chain(run, every))
        calls = min(CALLS, len(sets))
        groups = [sets[i : i + calls] for i in range(0, len(sets) - calls + 1, calls)]
        programs = [lambda group=group: chained(group) for group in groups]
    for program in programs:
        jax.block_until_ready(program())
    samples: list[float] = []
    end = time.perf_counter() + seconds
    while len(samples) < LEAST or (time.perf_counter() < end and len(samples) < MOST):
        if calls == 1 and single > SHORT:
            samples += [_time(program) for program in programs]
        else:  # started one after the other, waited for once
            samples.append(_time(lambda: [program() for program in programs]) / len(programs))
    return Timing(statistics.median(samples) / calls, len(samples), calls, len(sets))


def _chain(run: Callable[..., Any], every: Sequence[tuple]) -> list[Any]:
    """Run all calls, each after the one before it. All results are results: none is left out."""
    outs: list[Any] = []
    for first, *rest in every:
        if outs:
            first, outs[-1] = lax.optimization_barrier((first, outs[-1]))
        outs.append(run(first, *rest))
    return outs


def _time(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - start


def roofline(*, full: bool) -> dict[str, float]:
    """Measure what a copy (bytes read and written) and a matrix product reach here, a second."""
    cells = (1 << 29) if full else (1 << 25)
    copy = jax.jit(lambda x: x + 1)
    a = jnp.zeros(cells, jnp.uint32)
    n, dtype = (8192, jnp.bfloat16) if full else (1024, jnp.float32)
    b = jnp.ones((n, n), dtype)
    product = jax.jit(lambda b: b @ b)

    def best(function: Callable[[], Any]) -> float:
        jax.block_until_ready(function())
        return min(_time(function) for _ in range(10))

    return {
        "bytes": 2 * a.nbytes / best(lambda: copy(a)),
        "flops": 2 * n**3 / best(lambda: product(b)),
    }
