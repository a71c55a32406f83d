"""Cross entropy over chunks of rows, which forms its gradients in the forward pass.

The gradient with respect to a chunk's logits is weight * (softmax - one_hot), which is known as
soon as the loss is. So a differentiated call forms and saves both gradients chunk by chunk, and the
backward pass only scales them. That takes three matrix products; recomputing the logits would take
four. A call that is not differentiated forms only the loss.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gptoss_jax import chips

LOGITS_BYTES = 32 << 20  # of one chunk in float32, small enough to stay near the cache
LEAST_ROWS = 256  # fewer rows would not pay for reading and writing all of d weight per chunk


def cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    chunk: int | None,
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Scan over chunks of `chunk` rows, the last one padded with rows of weight zero."""
    rows = hidden.shape[0]
    if chunk is None:
        chunk = default_chunk(rows, weight.shape[0])
    chunk = max(1, min(chunk, rows))
    out: Any = _summed(chunk, hidden, weight, targets, weights.astype(jnp.float32))
    return out[0], lax.stop_gradient(out[1])


def default_chunk(rows: int, vocabulary: int) -> int:
    """Return the rows per chunk: equal chunks near `LOGITS_BYTES`, or `LEAST_ROWS`."""
    most = max(LOGITS_BYTES // (4 * vocabulary), LEAST_ROWS)
    chunks = -(-rows // most)
    return -(-rows // chunks) if chunks else 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(
    chunk: int, hidden: Array, weight: Array, targets: Array, weights: Array
) -> tuple[Array, Array]:
    loss, nll, _, _ = _scan(chunk, hidden, weight, targets, weights, grads=False)
    return loss, nll


def _compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Return float32 on a CPU, which would widen a narrower `weight` again in every chunk."""
    return jnp.dtype(jnp.float32) if chips.current().platform == "cpu" else dtype


def _scan(
    chunk: int, hidden: Array, weight: Array, targets: Array, weights: Array, *, grads: bool
) -> tuple[Array, Array, Array | None, Array | None]:
    """Return loss and nll, and if `grads` d loss / d hidden and d loss / d weight (float32)."""
    rows, dim = hidden.shape
    chunks = -(-rows // chunk)
    dtype = _compute_dtype(hidden.dtype)
    matrix = weight.astype(dtype)

    def split(a: Array) -> Array:
        padding = [(0, chunks * chunk - rows)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, padding).reshape(chunks, chunk, *a.shape[1:])

    def step(d_weight: Any, part: tuple[Array, Array, Array]) -> tuple[Any, Any]:
        h, target, share = part
        h = h.astype(dtype)
        logits = _dot(h, matrix, (1, 1))
        top = jnp.max(logits, axis=1, keepdims=True)
        powers = jnp.exp(logits - top)
        total = jnp.sum(powers, axis=1, keepdims=True)
        picked = jnp.take_along_axis(logits, target[:, None], axis=1)
        nll = (jnp.log(total) + top - picked)[:, 0]
        if d_weight is None:
            return None, (nll, None)
        hit = jnp.arange(matrix.shape[0], dtype=target.dtype) == target[:, None]
        d_logits = (powers * (share[:, None] / total) - jnp.where(hit, share[:, None], 0)).astype(
            dtype
        )
        d_weight = d_weight + _dot(d_logits, h, (0, 0))
        return d_weight, (nll, _dot(d_logits, matrix, (1, 0)).astype(hidden.dtype))

    start = jnp.zeros(weight.shape, jnp.float32) if grads else None
    d_weight, (nll, d_hidden) = lax.scan(
        step, start, (split(hidden), split(targets), split(weights))
    )
    nll = nll.reshape(-1)[:rows]
    if d_hidden is not None:
        d_hidden = d_hidden.reshape(-1, dim)[:rows]
    return jnp.sum(weights * nll), nll, d_hidden, d_weight


def _dot(a: Array, b: Array, dims: tuple[int, int]) -> Array:
    axes = (((dims[0],), (dims[1],)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _summed_fwd(
    chunk: int, hidden: Array, weight: Array, targets: Array, weights: Array
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    loss, nll, d_hidden, d_weight = _scan(chunk, hidden, weight, targets, weights, grads=True)
    assert d_hidden is not None and d_weight is not None
    # Residuals have to be arrays, so an empty array carries the weight's dtype.
    return (loss, nll), (d_hidden, d_weight, jnp.zeros((0,), weight.dtype), nll)


def _summed_bwd(
    chunk: int, saved: tuple[Array, ...], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, Array]:
    d_hidden, d_weight, like, nll = saved
    scale = cotangents[0]
    return (
        (d_hidden * scale).astype(d_hidden.dtype),
        (d_weight * scale).astype(like.dtype),
        None,
        nll * scale,
    )


_summed.defvjp(_summed_fwd, _summed_bwd)
