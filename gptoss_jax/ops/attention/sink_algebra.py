"""Add sinks, exactly, to attention without sinks, from its output and logsumexp alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A logsumexp at or below -BLIND means that a query sees nothing. The backward pass gets +BLIND for
# it, so that every exp(logit - lse) is 0.
BLIND = 1e5


def apply_sinks(
    out: Float[Array, "B T N H"], lse: Float[Array, "B T N"], sinks: Float[Array, " N"] | None
) -> Float[Array, "B T N H"]:
    """Give the sinks their share of the softmax: out * sigmoid(lse - sink), in the dtype of `lse`.

    For a query that sees nothing, `lse` has to be -inf and `out` 0. Differentiable.
    """
    out = out.astype(lse.dtype)
    return out if sinks is None else out * jax.nn.sigmoid(lse - sinks.astype(lse.dtype))[..., None]


def with_sink(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """Return attention with sinks, (q, k, v, sinks, where) -> out, from two functions without.

    `forward(q, k, v, where)` returns `out` [B, T, N, H] and its logsumexp [B, T, N] in float32. For
    a query that sees nothing, the logsumexp may be any value at or below -1e5 and `out` any finite
    value.

    `backward(q, k, v, where, out, lse, d_out)` returns dq, dk and dv. As in FlashAttention, it must
    form the softmax as exp(logit - lse) and the rest from rowsum(out * d_out). It gets `out` and
    `lse` with the sink included, and then its results are the gradients of attention with the
    sink. For a query that sees nothing, it gets an lse of 1e5 (so exp gives 0) and zeros in `out`
    and `d_out`.

    `where` (a pytree or None) has no gradient. The gradient of the sinks is summed in float32.
    """

    @jax.custom_vjp
    def attend(q: Array, k: Array, v: Array, sinks: Any, where: Any) -> Array:
        return run(q, k, v, sinks, where)[0]

    def run(q, k, v, sinks, where):
        out, lse = forward(q, k, v, where)
        blind = lse <= -BLIND
        out = jnp.where(blind[..., None], 0, out)
        if sinks is not None:
            out = apply_sinks(out, lse, sinks)
            lse = jnp.logaddexp(lse, sinks.astype(lse.dtype))
        return out.astype(q.dtype), jnp.where(blind, BLIND, lse)

    def attend_fwd(q, k, v, sinks, where):
        out, lse = run(q, k, v, sinks, where)
        return out, (q, k, v, sinks, where, out, lse)

    def attend_bwd(saved, d_out):
        q, k, v, sinks, where, out, lse = saved
        d_out = jnp.where((lse >= BLIND)[..., None], 0, d_out).astype(q.dtype)
        dq, dk, dv = backward(q, k, v, where, out, lse, d_out)
        d_sinks = None
        if sinks is not None:
            delta = jnp.sum(out.astype(lse.dtype) * d_out.astype(lse.dtype), axis=-1)
            share = jnp.exp(sinks.astype(lse.dtype) - lse) * delta
            d_sinks = -jnp.sum(share, axis=(0, 1)).astype(sinks.dtype)
        return dq, dk, dv, d_sinks, None

    attend.defvjp(attend_fwd, attend_bwd)
    return attend
