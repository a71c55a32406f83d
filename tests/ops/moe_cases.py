"""Inputs of the experts, and the comparison of values and every gradient."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.moe import experts

D, F, LIMIT = 64, 96, 1.5  # a limit that many activations meet
NAMES = ("gate_up_weight", "gate_up_bias", "down_weight", "down_bias")


def inputs(rows: int, num_experts: int, active: int, *, routing: str = "even") -> tuple:
    """Return (x, ids, shares, weights) in float32; `routing` is even, skewed or single."""
    rng = np.random.default_rng(rows)  # NumPy makes them: JAX would compile each operation
    logits = rng.normal(size=(rows, num_experts))
    if routing == "skewed":  # most rows to expert 1, none to the last two
        logits[:, 1] += 7
        logits[:, -2:] = -np.inf
    ids = np.argsort(-logits, axis=1)[:, :active]
    shares = np.exp(np.take_along_axis(logits, ids, axis=1))
    shares /= shares.sum(axis=1, keepdims=True)
    if routing == "single":
        ids = np.full_like(ids, num_experts - 1)
    shapes = ((num_experts, 2, F, D), (num_experts, 2, F), (num_experts, D, F), (num_experts, D))
    weights = {
        name: jnp.asarray(rng.normal(size=shape) * 0.2, jnp.float32)
        for name, shape in zip(NAMES, shapes, strict=True)
    }
    x = jnp.asarray(rng.normal(size=(rows, D)), jnp.float32)
    return x, jnp.asarray(ids, jnp.int32), jnp.asarray(shares, jnp.float32), weights


encode = jax.jit(mxfp4.encode)


def cast(args: tuple, dtype: jnp.dtype) -> tuple:
    x, ids, shares, weights = args
    return x.astype(dtype), ids, shares, {k: w.astype(dtype) for k, w in weights.items()}


def pack(args: tuple) -> tuple[tuple, dict]:
    """Split off the packed matrices: they are not to be differentiated."""
    x, ids, shares, weights = args
    packed = {k: encode(weights[k]) for k in ("gate_up_weight", "down_weight")}
    return (x, ids, shares, {k: weights[k] for k in weights if k not in packed}), packed


@functools.partial(jax.jit, static_argnames=("implementation", "chunk", "limit"))
def everything(
    args: tuple,
    packed: dict,
    mask=None,
    *,
    implementation: str | None = None,
    chunk: int | None = None,
    limit: float = LIMIT,
) -> dict:
    """Return the output and the gradients of a weighted sum of it, by name."""
    x, ids, shares, weights = args

    def run(x, shares, weights):
        all_weights = {**weights, **packed}
        out = experts(
            x, ids, shares, **all_weights, limit=limit, mask=mask,
            implementation=implementation, chunk=chunk,
        )  # fmt: skip
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), (dx, d_shares, d_weights) = jax.value_and_grad(run, (0, 1, 2), has_aux=True)(
        x, shares, weights
    )
    return {"out": out, "x": dx, "shares": d_shares, **d_weights}


def check(got: dict, want: dict, tolerance: float = 1e-5) -> None:
    assert got.keys() == want.keys()
    for name, a in got.items():
        b = want[name]
        assert a.dtype == b.dtype and a.shape == b.shape, name
        np.testing.assert_allclose(
            a, b, atol=tolerance * max(np.abs(b).max(), 1e-3), rtol=0, err_msg=name
        )
