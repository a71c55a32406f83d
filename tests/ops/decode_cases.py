"""The cases that every implementation of attention to a cache meets."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from covering import every, pairwise

from gptoss_jax.ops.attention import attention

AXES: dict[str, list[Any]] = {
    "T": [1, 4],
    # Slots, window. 132: a ring of 128 with a call's own tokens behind it, as the model has it.
    "cache": [
        (128, 128),
        (132, 128),
        (136, 128),
        (300, None),
        (1000, None),
        (1000, 200),
        (512, None),
    ],
    "heads": [(4, 4), (6, 3), (8, 1)],  # N, K
    "H": [64, 80, 128],
    "sinks": [True, False],
}
COVERING = pairwise(**AXES)
EVERY = every(**AXES)


def inputs(case: dict[str, Any], dtype: Any = jnp.float32) -> tuple:
    """Return q, k, v, sinks (float32), (q, kv) segment ids and (q, kv) positions of four rows.

    Position p lies in slot p % S. Row 0 has gone round its ring (if it is one) several times, row 1
    fills a third of its slots, row 2 has one token and none before its queries, row 3 nothing but
    padding. Slots that were never written have position -1, segment 0 and noise.
    """
    T, (S, window), (N, K), H = case["T"], case["cache"], case["heads"], case["H"]
    rng = np.random.default_rng(S * 31 + H + T)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    q, k, v = (normal(4, length, n, H).astype(dtype) for length, n in ((T, N), (S, K), (S, K)))
    ends = (3 * S + 17 if window is not None else S, S // 3, 1, 0)  # of what was written
    k_positions = np.full((4, S), -1, np.int32)
    for row, end in enumerate(ends):
        written = np.arange(max(0, end - S), end)
        k_positions[row, written % S] = written
    q_positions = np.array(ends)[:, None] - T + np.arange(T)
    q_segments = (q_positions >= 0).astype(np.int32)
    k_segments = (k_positions >= 0).astype(np.int32)
    sinks = normal(N) if case["sinks"] else None
    segments = q_segments, k_segments
    positions = np.maximum(q_positions, 0).astype(np.int32), k_positions
    return jax.tree.map(jnp.asarray, (q * q.dtype.type(2), k, v, sinks, segments, positions))


def result(args: tuple, window: int | None, implementation: str | None) -> jax.Array:
    """Return what an implementation makes of the arguments."""
    q, k, v, sinks, segments, positions = args

    def attend(q, k, v, sinks, segments, positions):
        return attention(
            q, k, v, sinks=sinks, window=window, segment_ids=segments[0], positions=positions[0],
            kv_segment_ids=segments[1], kv_positions=positions[1], implementation=implementation,
        )  # fmt: skip

    return jax.jit(attend)(q, k, v, sinks, segments, positions)


def expected(args: tuple, window: int | None) -> jax.Array:
    """Return the reference's result on float32 copies of the arguments."""
    wide = [None if a is None else a.astype(jnp.float32) for a in args[:4]]
    return result((*wide, *args[4:]), window, "reference")


def assert_close(got: jax.Array, want: jax.Array, *, dtype: Any = jnp.float32) -> None:
    """Hold float32 to 1e-5 of the largest entry, bfloat16 to 2e-2 in relative norm, zeros to 0."""
    got, want = np.asarray(got, np.float32), np.asarray(want)
    assert np.isfinite(got).all()
    assert not got[want == 0].any()
    if dtype == jnp.float32:
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    else:
        assert np.linalg.norm(got - want) <= 2e-2 * np.linalg.norm(want)
