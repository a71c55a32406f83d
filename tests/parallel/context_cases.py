"""Rows for attention over the mesh, and their results on it and by the reference on one device."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import MeshConfig
from gptoss_jax.ops.attention import attention
from gptoss_jax.parallel import context, mesh

N, K, H = 8, 2, 5


def places(rows: int, T: int, kind: str) -> tuple[jax.Array, jax.Array]:
    """Return segment ids and positions, positions rising by one in each segment."""
    ids = np.ones((rows, T), np.int32)
    if kind == "many":
        ids = np.broadcast_to(1 + np.arange(T, dtype=np.int32) // 7, ids.shape).copy()
    elif kind != "one":
        ids[0, T // 3 :] = 2
        ids[-1, T // 2 + 3 :] = 5
        ids[-1, T // 2 + 5 :] = 6
    if kind == "padded":
        ids[:, -(T // 7) :] = 0
    if kind == "empty":
        ids[0] = 0
    starts = np.r_["1", np.ones((rows, 1), bool), ids[:, 1:] != ids[:, :-1]]
    index = np.broadcast_to(np.arange(T), ids.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return jnp.asarray(ids), jnp.asarray(positions, jnp.int32)


def inputs(
    rows: int, T: int, kind: str, *, sinks: bool = True, K: int = K, dtype: Any = jnp.float32
) -> tuple:
    """Return q, k, v, sinks, segment ids and positions, in the row's order."""
    rng = np.random.default_rng(T + rows)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32).astype(dtype))

    q, k, v = (normal(rows, T, heads, H) for heads in (N, K, K))
    return q * 2, k, v, normal(N) if sinks else None, *places(rows, T, kind)


def results(run: Any, args: tuple) -> dict[str, jax.Array]:
    """Return what `run` makes of (q, k, v, sinks), and all gradients of a weighted sum of it."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=args[0].shape), jnp.float32)

    def loss(*args):
        out = run(*args)
        return jnp.sum(out.astype(jnp.float32) * weight), out

    names = ("q", "k", "v", "sinks")[: 4 if args[3] is not None else 3]
    grad = jax.jit(jax.grad(loss, argnums=tuple(range(len(names))), has_aux=True))
    gradients, out = grad(*args[:4])
    return {"out": out, **dict(zip(names, gradients, strict=True))}


def expected(args: tuple, window: int | None) -> dict[str, jax.Array]:
    """Return the reference's results, on one device, in the row's order, in float32."""
    wide = tuple(x if x is None else x.astype(jnp.float32) for x in args[:4])
    where: dict[str, Any] = {"segment_ids": args[4], "positions": args[5], "window": window}

    def run(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, implementation="reference", **where)

    return results(run, wide)


def over_mesh(args: tuple, window: int | None, shards: int) -> Any:
    """Return attention, (q, k, v, sinks) -> out in the row's order, over a mesh yet to be set."""
    balance = jax.jit(context.balance, static_argnames="shards")
    ids, positions = (balance(x, shards=shards) for x in args[4:])

    def run(q, k, v, sinks):
        q, k, v = (context.balance(x, shards=shards) for x in (q, k, v))
        out = context.attention(
            q, k, v, sinks=sinks, window=window, segment_ids=ids, positions=positions
        )
        return context.unbalance(out, shards=shards)

    return run


def on(sizes: dict[str, int]) -> Any:
    """Set a mesh of these sizes over as many devices, in a `with`."""
    used = int(np.prod([*sizes.values()], dtype=int))
    return jax.set_mesh(mesh.make(MeshConfig(**sizes), jax.devices()[:used]))


def spread(args: tuple, window: int | None, sizes: dict[str, int]) -> dict[str, jax.Array]:
    """Return the results over a mesh, in the row's order."""
    with on(sizes):
        return results(over_mesh(args, window, sizes.get("context", 1)), args)


def assert_close(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for key in want:
        a, b = np.asarray(got[key]), np.asarray(want[key])
        assert np.isfinite(a).all(), key
        largest = max(np.abs(b).max(), 1e-3)
        if key in ("q", "k") and not b.any():  # all of it cancels: terms as large as v's
            largest = np.abs(want["v"]).max()
        assert np.abs(a - b).max() <= 1e-5 * largest, key
