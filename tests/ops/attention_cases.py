"""The cases that every implementation of self-attention meets, and the comparison."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from covering import every, pairwise

from gptoss_jax.ops.attention import attention

AXES: dict[str, list[Any]] = {
    "length": [1, 5, 127, 128, 129, 130, 300, 1000],
    "window": [None, 128, 7, 200],
    "heads": [(4, 4), (6, 3), (8, 1)],  # N, K
    "H": [64, 80, 128],
    "segments": ["one", "packed", "padded"],
    "sinks": [True, False],
}
COVERING = pairwise(**AXES)
EVERY = every(**AXES)


def inputs(case: dict[str, Any], dtype: Any = jnp.float32) -> tuple:
    """Return q, k, v, sinks (float32), segment ids and positions of two rows."""
    length, (N, K), H = case["length"], case["heads"], case["H"]
    rng = np.random.default_rng(length * 31 + H)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k, v = (normal(2, length, n, H).astype(dtype) for n in (N, K, K))
    ids = np.ones((2, length), np.int32)
    if case["segments"] != "one" and length > 2:
        ids[0, length // 3 :] = 2
        ids[1, length // 2 :] = 3
    if case["segments"] == "padded":
        ids[:, -max(1, length // 5) :] = 0
    starts = np.r_["1", np.ones((2, 1), bool), ids[:, 1:] != ids[:, :-1]]
    index = np.broadcast_to(np.arange(length), ids.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    sinks = normal(N) if case["sinks"] else None
    arrays = q * q.dtype.type(2), k, v, sinks, ids, positions.astype(np.int32)
    return jax.tree.map(jnp.asarray, arrays)


def results(args: tuple, window: int | None, implementation: str | None) -> dict[str, jax.Array]:
    """Return the output and all gradients of a weighted sum of it, by name."""
    q, k, v, sinks, segments, positions = args
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(q, k, v, sinks):
        out = attention(
            q, k, v, sinks=sinks, window=window, segment_ids=segments, positions=positions,
            implementation=implementation,
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32) * weight), out

    names = ("q", "k", "v", "sinks")[: 3 + (sinks is not None)]
    grad = jax.jit(jax.grad(loss, argnums=tuple(range(len(names))), has_aux=True))
    gradients, out = grad(q, k, v, sinks)
    return {"out": out, **dict(zip(names, gradients, strict=True))}


def expected(args: tuple, window: int | None) -> dict[str, jax.Array]:
    """Return the reference's results on float32 copies of the arguments."""
    wide = [None if a is None else jnp.asarray(np.asarray(a, np.float32)) for a in args[:4]]
    return results((*wide, *args[4:]), window, "reference")


def assert_close(got: dict, want: dict, *, dtype: Any = jnp.float32) -> None:
    """Hold float32 to 1e-5 of the largest entry, and bfloat16 to 2e-2 in relative norm.

    The gradients in q and k are sums of p * (do . v - do . o). Where all of it cancels (one key to
    see, and no sink) what is left is the rounding of terms as large as the gradient in v.
    """
    assert got.keys() == want.keys()
    for key, b in want.items():
        a, b = np.asarray(got[key], np.float32), np.asarray(b)
        assert np.isfinite(a).all(), key
        if dtype == jnp.float32:
            largest = max(np.abs(b).max(), 1e-3)
            if key in ("q", "k") and not b.any():
                largest = np.abs(want["v"]).max()
            assert np.abs(a - b).max() <= 1e-5 * largest, key
        else:
            norm = max(np.linalg.norm(b), 1e-3 * b.size**0.5)
            assert np.linalg.norm(a - b) <= 2e-2 * norm, key
