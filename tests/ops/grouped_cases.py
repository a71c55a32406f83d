"""The cases that every implementation of grouped matmul meets, and the comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from covering import every, pairwise

from gptoss_jax.ops.grouped_matmul import grouped_matmul
from gptoss_jax.ops.grouped_matmul.weights import is_packed

AXES: dict[str, list[Any]] = {
    "rows": [1, 5, 130, 300],
    "groups": ["even", "skewed", "empty", "single", "short"],
    "E": [5, 32],
    "N": [128, 96, 2880],
    "C": [128, 160, 2880],
}
COVERING = pairwise(**AXES)
EVERY = every(**AXES)


def group_sizes(rows: int, num_groups: int, how: str) -> np.ndarray:
    """Return sizes that sum to `rows`, or with "short" to fewer."""
    rng = np.random.default_rng(rows + num_groups)
    share = np.ones(num_groups)
    if how == "skewed":
        share[1] = 40
    elif how == "empty":  # the first, the last and one between have no rows
        share[[0, 2, -1]] = 0
    elif how == "single":
        share = np.eye(num_groups)[num_groups - 2]
    used = rows - rows // 3 if how == "short" else rows
    return rng.multinomial(used, share / share.sum()).astype(np.int32)


def inputs(case: dict[str, Any], dtype: Any = jnp.float32) -> tuple:
    """Return rows [P, C], a dense weight [E, N, C] and group sizes. Unused rows hold NaN."""
    rng = np.random.default_rng(case["rows"] * 7 + case["C"])
    sizes = group_sizes(case["rows"], case["E"], case["groups"])
    rows = rng.normal(size=(case["rows"], case["C"]))
    rows[sizes.sum() :] = np.nan
    weight = rng.normal(size=(case["E"], case["N"], case["C"])) * case["C"] ** -0.5
    return jnp.asarray(rows, dtype), jnp.asarray(weight, dtype), jnp.asarray(sizes)


def results(args: tuple, implementation: str | None) -> dict[str, jax.Array]:
    """Return the output, and the gradients of a weighted sum of the rows that are in a group."""
    rows, weight, sizes = args
    inside = (jnp.arange(rows.shape[0]) < sizes.sum())[:, None]

    def loss(rows, weight):
        out = grouped_matmul(rows, weight, sizes, implementation=implementation)
        out = jnp.where(inside, out, 0).astype(jnp.float32)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size)).reshape(out.shape)), out

    if is_packed(weight):
        run = jax.jit(jax.grad(lambda rows: loss(rows, weight), has_aux=True))
        d_rows, out = run(rows)
        return {"out": out, "rows": d_rows}
    (d_rows, d_weight), out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(rows, weight)
    return {"out": out, "rows": d_rows, "weight": d_weight}


def assert_close(got: dict, want: dict, *, dtype: Any = jnp.float32) -> None:
    """Hold float32 to 1e-5 of the largest entry, and bfloat16 to 2e-2 in relative norm."""
    assert got.keys() == want.keys()
    for key, b in want.items():
        a, b = np.asarray(got[key], np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all(), key
        if dtype == jnp.float32:
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3), key
        else:
            assert np.linalg.norm(a - b) <= 2e-2 * max(np.linalg.norm(b), 1e-6), key
