"""Cross entropy over chunks of the vocabulary, also with the vocabulary sharded over devices.

The forward pass reads the weight once. For each row it keeps a running maximum, a running sum and
the logit of the target. The backward pass forms the logits of each chunk again. From them it forms
that chunk of the weight's gradient, which is then complete, and the chunk's part of the gradient of
`hidden`. This takes four matrix products of M x V x D in all, and the only array of the weight's
size is its gradient.

If the weight is frozen, the logits are not formed again. As flash attention does, the forward pass
also keeps the mean of the weight's rows, weighted by their probabilities. The gradient of `hidden`
is this mean minus the target's row, so there are two products. (If D is not a multiple of 128, a
TPU transposes the weight once to gather rows: a copy as large as the gradient that is saved.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from gptoss_jax import chips

LOGITS_BYTES = 256 << 20  # of one chunk in float32
LEAST = 2048  # entries per chunk: fewer would not pay for reading and writing all of d hidden
MOST = 16384  # entries per chunk: a chunk of the weight is copied first, 94 MB at D = 2880
LANES = 128  # chunks are a multiple of this, so that they are whole tiles on every chip


def cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    chunk: int | None,
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Loop over chunks of `chunk` entries of the vocabulary; the last may be shorter."""
    chunk = _chunk(hidden, weight, chunk)
    top, picked = _both(chunk, hidden, weight, targets)
    return _weighted(top - picked, weights)


def sharded(
    hidden: Float[Array, "M D"],
    weight_shard: Float[Array, "V/n D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    axis: str | tuple[str, ...],
    chunk: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Return what `cross_entropy` does, if device i of mesh axis `axis` holds the i-th V/n rows.

    If `axis` names several axes, the last one varies fastest.

    Call this inside `jax.shard_map`. All arguments but `weight_shard` must be the same along
    `axis`, and the results are too. Devices exchange two sums and a maximum of shape [M], never
    logits or weights. In the backward pass each device has a part of d hidden [M, D], and JAX sums
    the parts over `axis` once, as for any value that all devices read: in here if `shard_map`
    checks (`check_vma`), otherwise in `shard_map` itself.
    """
    rows = weight_shard.shape[0]
    mine = targets - lax.axis_index(axis) * rows  # in [0, V/n) on exactly one device
    chunk = _chunk(hidden, weight_shard, chunk)
    top, picked = _both(chunk, hidden, weight_shard, mine)
    largest = lax.pmax(lax.stop_gradient(top), axis)
    total = jnp.log(lax.psum(jnp.exp(top - largest), axis)) + largest
    return _weighted(total - lax.psum(picked, axis), weights)


def default_chunk(rows: int, vocabulary: int) -> int:
    """Return the entries per chunk: about equal, near `LOGITS_BYTES`, from `LEAST` to `MOST`."""
    most = min(max(LOGITS_BYTES // (4 * max(rows, 1)), LEAST), MOST)
    even = -(-vocabulary // -(-vocabulary // most))
    return -(-even // LANES) * LANES


def _chunk(hidden: Array, weight: Array, chunk: int | None) -> int:
    chunk = default_chunk(hidden.shape[0], weight.shape[0]) if chunk is None else chunk
    return max(1, min(chunk, weight.shape[0]))


def _weighted(nll: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(weights.astype(jnp.float32) * nll), lax.stop_gradient(nll)


def _both(chunk: int, hidden: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    # In `shard_map`, JAX here sums the gradient of an argument that is the same along a mesh axis.
    args = (hidden, weight, targets)
    out: Any = _top_and_picked(chunk, *(_varying_like(a, *args) for a in args))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _top_and_picked(
    chunk: int, hidden: Array, weight: Array, targets: Array
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Return logsumexp(logits) and logits[target], or 0 for a target outside [0, V)."""
    top, picked, _ = _forward(chunk, hidden, weight, targets, mean=False)
    return top, picked


class _Running(NamedTuple):
    """The forward pass's state of each row after some chunks; all float32."""

    largest: Float[Array, "M 1"]
    total: Float[Array, "M 1"]  # of exp(logit - largest)
    picked: Float[Array, "M 1"]
    # Sum of exp(logit - largest) * weight over all entries but the target. With the target, the
    # gradient of a nearly certain row would be the difference of two large vectors, one rounded.
    others: Float[Array, "M D"] | None


def _forward(
    chunk: int, hidden: Array, weight: Array, targets: Array, *, mean: bool
) -> tuple[Array, Array, Array | None]:
    """Return logsumexp, the target's logit, and if `mean` the mean weight row of the others."""
    rows, dtype = hidden.shape[0], _compute_dtype(hidden.dtype)
    h = hidden.astype(dtype)

    def step(start: Array | int, size: int, so_far: _Running) -> _Running:
        matrix = lax.dynamic_slice_in_dim(weight, start, size).astype(dtype)
        logits = _dot(h, matrix, (1, 1))
        hit = _hit(targets, start, size)
        largest = jnp.maximum(so_far.largest, jnp.max(logits, axis=1, keepdims=True))
        powers = jnp.exp(logits - largest)
        shrink = jnp.exp(so_far.largest - largest)
        others = so_far.others
        if others is not None:
            others = others * shrink + _dot(jnp.where(hit, 0, powers).astype(dtype), matrix, (1, 0))
        return _Running(
            largest,
            so_far.total * shrink + jnp.sum(powers, axis=1, keepdims=True),
            so_far.picked + jnp.sum(jnp.where(hit, logits, 0), axis=1, keepdims=True),
            others,
        )

    zeros = _varying_like(jnp.zeros((rows, 1), jnp.float32), hidden, weight, targets)
    others = _varying_like(jnp.zeros(hidden.shape, jnp.float32), zeros) if mean else None
    start = _Running(zeros - jnp.inf, zeros, zeros, others)
    last = _over_chunks(weight.shape[0], chunk, step, start)
    if last.others is not None:
        others = last.others / last.total
    return (jnp.log(last.total) + last.largest)[:, 0], last.picked[:, 0], others


def _gradients(
    chunk: int, hidden: Array, weight: Array, targets: Array, top: Array, gs: tuple[Array, Array],
    *, d_hidden: bool,
) -> tuple[Float[Array, "M D"] | None, Float[Array, "V D"]]:  # fmt: skip
    """Form each chunk's logits again; from them, its part of d hidden and its rows of d weight."""
    dtype = _compute_dtype(hidden.dtype)
    h = hidden.astype(dtype)
    g_top, g_picked = gs

    def step(start: Array | int, size: int, state: tuple[Any, Array]) -> tuple[Any, Array]:
        total, d_weight = state
        matrix = lax.dynamic_slice_in_dim(weight, start, size).astype(dtype)
        powers = jnp.exp(_dot(h, matrix, (1, 1)) - top[:, None])
        hit = _hit(targets, start, size)
        d_logits = g_top[:, None] * powers + jnp.where(hit, g_picked[:, None], 0)
        d_logits = d_logits.astype(dtype)
        if total is not None:
            total = total + _dot(d_logits, matrix, (1, 0))
        part = _dot(d_logits, h, (0, 0)).astype(weight.dtype)
        return total, lax.dynamic_update_slice_in_dim(d_weight, part, start, 0)

    wide = (jnp.zeros(hidden.shape, jnp.float32) if d_hidden else None, jnp.zeros_like(weight))
    start = jax.tree.map(lambda x: _varying_like(x, hidden, weight, targets), wide)
    total, d_weight = _over_chunks(weight.shape[0], chunk, step, start)
    return None if total is None else total.astype(hidden.dtype), d_weight


def _from_mean(
    weight: Array, targets: Array, top: Array, picked: Array, mean: Array, gs: tuple[Array, Array]
) -> Float[Array, "M D"]:
    """Return d hidden in float32, from the mean of all weight rows but the target's."""
    g_top, g_picked = gs
    inside = (targets >= 0) & (targets < weight.shape[0])
    g_target = jnp.where(inside, g_top * jnp.exp(picked - top) + g_picked, 0)
    rows = weight[jnp.clip(targets, 0, weight.shape[0] - 1)].astype(jnp.float32)
    return g_top[:, None] * mean + g_target[:, None] * rows


def _over_chunks(total: int, chunk: int, step: Callable[[Any, int, Any], Any], start: Any) -> Any:
    whole = total // chunk
    state = lax.fori_loop(0, whole, lambda i, state: step(i * chunk, chunk, state), start)
    rest = total - whole * chunk
    return step(whole * chunk, rest, state) if rest else state


def _hit(targets: Array, start: Array | int, size: int) -> Array:
    return jnp.arange(size, dtype=targets.dtype) == (targets - start)[:, None]


def _dot(a: Array, b: Array, dims: tuple[int, int]) -> Array:
    axes = (((dims[0],), (dims[1],)), ((), ()))
    return lax.dot_general(a, b, axes, preferred_element_type=jnp.float32)


def _compute_dtype(dtype: Any) -> Any:
    """Return float32 on a CPU, which has no narrow products, and else `dtype`."""
    return jnp.float32 if chips.current().platform == "cpu" else dtype


def _varying_like(x: Array, *like: Array) -> Array:
    """Mark `x` as varying along the mesh axes along which any of `like` varies."""
    axes = frozenset[str]().union(*(_axes(a) for a in like)) - _axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _axes(x: Array) -> frozenset[str]:
    aval: Any = jax.typeof(x)
    return aval.manual_axis_type.varying


def _fwd(chunk: int, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
    # `perturbed` says whether a gradient is wanted; an unwanted one is neither formed nor kept.
    wanted = hidden.perturbed, weight.perturbed
    top, picked, mean = _forward(
        chunk, hidden.value, weight.value, targets.value, mean=wanted == (True, False)
    )
    # Residuals have to be arrays, so None stands for False.
    flags = tuple(jnp.zeros(()) if flag else None for flag in wanted)
    return (top, picked), (hidden.value, weight.value, targets.value, top, picked, mean, flags)


def _bwd(chunk: int, saved: Any, gs: tuple[Any, Any]) -> tuple[Array | None, Array | None, None]:
    hidden, weight, targets, top, picked, mean, flags = saved
    g_top, g_picked = (jnp.zeros_like(top) if isinstance(g, SymbolicZero) else g for g in gs)
    both = g_top, g_picked
    if mean is not None:
        d_hidden = _from_mean(weight, targets, top, picked, mean, both)
        return d_hidden.astype(hidden.dtype), None, None
    if flags[1] is None:
        return None, None, None
    wanted = flags[0] is not None
    return *_gradients(chunk, hidden, weight, targets, top, both, d_hidden=wanted), None


_top_and_picked.defvjp(_fwd, _bwd, symbolic_zeros=True)
