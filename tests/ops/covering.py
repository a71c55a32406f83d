"""Case lists: every combination of some axes, or few cases in which every pair of values occurs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest


def every(**axes: list[Any]) -> list[dict[str, Any]]:
    """Return all combinations."""
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def pairwise(**axes: list[Any]) -> list[dict[str, Any]]:
    """Return cases in which each pair of values of two axes occurs; the same ones each time."""
    draw = random.Random(0)
    names = list(axes)

    def pairs(case: dict[str, Any]) -> set[Any]:
        return {(a, repr(case[a]), b, repr(case[b])) for a, b in itertools.combinations(names, 2)}

    missing = set().union(*(pairs(case) for case in every(**axes)))
    cases = []
    while missing:
        candidates = []
        for _ in range(60):
            seed = draw.choice(sorted(missing))
            case = {name: draw.choice(values) for name, values in axes.items()}
            for name, text in (seed[:2], seed[2:]):
                case[name] = next(v for v in axes[name] if repr(v) == text)
            candidates.append(case)
        best = max(candidates, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(best)
    return cases


def part_slow(cases: list[dict[str, Any]], *, every: int) -> list[Any]:
    """Return parameters for pytest: each `every`-th case as it is, the others marked slow."""
    return [
        pytest.param(case, id=name(case), marks=[] if i % every == 0 else [pytest.mark.slow])
        for i, case in enumerate(cases)
    ]


def on_host(function: Callable[..., Any], tree: Any, *args: Any, **options: Any) -> Any:
    """Call what takes NumPy arrays as well with them: JAX would compile each of its operations."""
    return jax.tree.map(jnp.asarray, function(jax.tree.map(np.asarray, tree), *args, **options))


def name(case: dict[str, Any]) -> str:
    """Name a case, for pytest's `ids=`."""
    return "-".join(f"{key}={value}" for key, value in case.items())
