"""Cross entropy over chunks of the vocabulary, and with the vocabulary spread over devices.

The forward pass reads the weight once, keeping for each row a running maximum, sum and target's
logit. The backward pass forms the logits of a chunk again, from them that chunk of the weight's
gradient, to which nothing else adds, and its part of that of `hidden`: four matrix products of
M x V x D in all, and no array of the weight's size but its gradient.

Where the weight is frozen, nothing is formed again: the forward pass also keeps, as flash attention
does, the sum of the weight's rows in proportion to their probabilities. The gradient of `hidden` is
that less the target's row: two products. (Taking rows out has a TPU turn the weight once if D is no
multiple of 128, a copy as large as the gradient that is not there.)
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
LEAST = 2048  # entries a chunk: each reads and writes all of d hidden, so fewer would not pay
MOST = 16384  # a chunk of the weight is cut out before it is multiplied: a copy, 94 MB at D = 2880
LANES = 128  # chunks are a multiple of it: whole tiles on every chip


def cross_entropy(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    chunk: int | None,
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Loop over chunks of `chunk` entries of the vocabulary; the last may be a shorter one."""
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
    """Return what `cross_entropy` does where device i of mesh axis `axis` has the i-th V/n rows.

    Of several axes the last counts fastest.

    To be called inside `jax.shard_map`, with all but `weight_shard` the same along `axis`; so are
    the results. Two sums and a maximum of [M] are exchanged, never logits or weights. Backward,
    d hidden [M, D], of which each device has a part, is summed over `axis` once: by what JAX forms
    for a value that all devices read, in here if `shard_map` checks (`check_vma`), else by it.
    """
    rows = weight_shard.shape[0]
    mine = targets - lax.axis_index(axis) * rows  # in [0, V/n) on one device alone
    chunk = _chunk(hidden, weight_shard, chunk)
    top, picked = _both(chunk, hidden, weight_shard, mine)
    largest = lax.pmax(lax.stop_gradient(top), axis)
    total = jnp.log(lax.psum(jnp.exp(top - largest), axis)) + largest
    return _weighted(total - lax.psum(picked, axis), weights)


def default_chunk(rows: int, vocabulary: int) -> int:
    """Choose a chunk's entries: about equal chunks near `LOGITS_BYTES`, from `LEAST` to `MOST`."""
    most = min(max(LOGITS_BYTES // (4 * max(rows, 1)), LEAST), MOST)
    even = -(-vocabulary // -(-vocabulary // most))
    return -(-even // LANES) * LANES


def _chunk(hidden: Array, weight: Array, chunk: int | None) -> int:
    chunk = default_chunk(hidden.shape[0], weight.shape[0]) if chunk is None else chunk
    return max(1, min(chunk, weight.shape[0]))


def _weighted(nll: Array, weights: Array) -> tuple[Array, Array]:
    return jnp.sum(weights.astype(jnp.float32) * nll), lax.stop_gradient(nll)


def _both(chunk: int, hidden: Array, weight: Array, targets: Array) -> tuple[Array, Array]:
    # In `shard_map`: the gradient of what is alike along a mesh axis is summed over that axis here.
    args = (hidden, weight, targets)
    out: Any = _top_and_picked(chunk, *(_alike(a, *args) for a in args))
    return out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _top_and_picked(
    chunk: int, hidden: Array, weight: Array, targets: Array
) -> tuple[Float[Array, " M"], Float[Array, " M"]]:
    """Return logsumexp(logits) and logits[target], or 0 for a target outside [0, V)."""
    top, picked, _ = _forward(chunk, hidden, weight, targets, mean=False)
    return top, picked


class _Running(NamedTuple):
    """What the forward pass knows of each row after some chunks; all float32."""

    largest: Float[Array, "M 1"]
    total: Float[Array, "M 1"]  # of exp(logit - largest)
    picked: Float[Array, "M 1"]
    # Sum of exp(logit - largest) * weight, over all but the target: without it a row that is nearly
    # certain would be the difference of two large vectors, one of them rounded.
    others: Float[Array, "M D"] | None


def _forward(
    chunk: int, hidden: Array, weight: Array, targets: Array, *, mean: bool
) -> tuple[Array, Array, Array | None]:
    """Return logsumexp, the target's logit, and if `mean` the others' mean row of the weight."""
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

    zeros = _alike(jnp.zeros((rows, 1), jnp.float32), hidden, weight, targets)
    others = _alike(jnp.zeros(hidden.shape, jnp.float32), zeros) if mean else None
    start = _Running(zeros - jnp.inf, zeros, zeros, others)
    last = _over_chunks(weight.shape[0], chunk, step, start)
    if last.others is not None:
        others = last.others / last.total
    return (jnp.log(last.total) + last.largest)[:, 0], last.picked[:, 0], others


def _gradients(
    chunk: int, hidden: Array, weight: Array, targets: Array, top: Array, gs: tuple[Array, Array],
    *, d_hidden: bool,
) -> tuple[Float[Array, "M D"] | None, Float[Array, "V D"]]:  # fmt: skip
    """Form the logits again; of each chunk its part of d hidden, and its rows of d weight."""
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
    start = jax.tree.map(lambda x: _alike(x, hidden, weight, targets), wide)
    total, d_weight = _over_chunks(weight.shape[0], chunk, step, start)
    return None if total is None else total.astype(hidden.dtype), d_weight


def _from_mean(
    weight: Array, targets: Array, top: Array, picked: Array, mean: Array, gs: tuple[Array, Array]
) -> Float[Array, "M D"]:
    """Return d hidden, float32, from the mean of the weight's rows other than the target's."""
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
    """On a CPU multiply in float32: it has no narrow products."""
    return jnp.float32 if chips.current().platform == "cpu" else dtype


def _alike(x: Array, *like: Array) -> Array:
    """Mark `x` as differing along the mesh axes along which any of `like` does."""
    axes = frozenset[str]().union(*(_axes(a) for a in like)) - _axes(x)
    return lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def _axes(x: Array) -> frozenset[str]:
    aval: Any = jax.typeof(x)
    return aval.manual_axis_type.varying


def _fwd(chunk: int, hidden: Any, weight: Any, targets: Any) -> tuple[Any, Any]:
    # `perturbed` says whether a gradient is wanted: what none is wanted for is not formed or kept.
    wanted = hidden.perturbed, weight.perturbed
    top, picked, mean = _forward(
        chunk, hidden.value, weight.value, targets.value, mean=wanted == (True, False)
    )
    # None where it is False: residuals are arrays
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
