"""KL divergence between the distributions of two unembeddings, without the logits of all rows.

The op takes one chunk of rows at a time. It forms the logits of both sides and from them the
gradient of the first side; it keeps only that gradient. The second side, named `given`, is fixed
and has no gradient.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

LOGITS_BYTES = 64 << 20  # limit for the float32 logits of one side in one chunk
# There are `_CHUNKS` chunks, or fewer of `_LEAST` rows; LOGITS_BYTES may make chunks smaller.
_LEAST, _CHUNKS = 128, 8


class Mix(NamedTuple):
    """The loss of a row: kl * T^2 * KL + nll * negative log-likelihood; T is `temperature`."""

    temperature: float
    kl: float
    nll: float


_Given = tuple[Array, Array, Array, Array]  # given_hidden, given_table, targets, weights


def divergence(
    hidden: Float[Array, "M D"],
    table: Float[Array, "V D"],
    given_hidden: Float[Array, "M C"],
    given_table: Float[Array, "V C"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
    *,
    mix: Mix,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return three sums over rows: weights * mixed loss, weights * T^2 * KL, and weights * nll.

    The mixed loss is that of `Mix`. KL is sum(p * log(p / q)) in nats, with
    p = softmax(given logits / T) and q = softmax(logits / T). Logits are products of hidden states
    and table, in float32. Only the first sum has a gradient, in `hidden` and `table`; the gradient
    of `table` is summed over rows in float32. Rows after the last nonzero weight cost nothing,
    except those in its chunk.
    """
    given = given_hidden, given_table, targets, weights.astype(jnp.float32)
    sums: Any = _total(mix, hidden, table, given)
    total, kl, nll = sums
    return total, lax.stop_gradient(kl), lax.stop_gradient(nll)


def chunk_sums(
    hidden: Float[Array, "M D"],
    table: Float[Array, "V/n D"],
    given: _Given,
    *,
    mix: Mix,
    axis: tuple[str, ...] = (),
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], Float[Array, ""]]]:
    """Return the results of `divergence` for one chunk, as (total, (kl, nll)), for autodiff.

    In a `shard_map` whose mesh axes `axis` split the rows of both tables, device i has the i-th
    part of each table. All other arguments and the results are the same on all devices.
    """
    given_hidden, given_table, targets, weights = given

    def across(x: Array) -> Array:
        return lax.psum(x, axis) if axis else x

    def log_sum(logits: Array) -> Array:
        largest = lax.stop_gradient(jnp.max(logits, axis=1))
        largest = lax.pmax(largest, axis) if axis else largest
        powers = jnp.sum(jnp.exp(logits - largest[:, None]), axis=1)
        return largest + jnp.log(across(powers))

    T = mix.temperature
    logits = _logits(hidden, table)
    other = lax.stop_gradient(_logits(given_hidden, given_table))
    log_q = logits / T - log_sum(logits / T)[:, None]
    log_p = other / T - log_sum(other / T)[:, None]
    kl = across(jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=1))
    mine = targets - (lax.axis_index(axis) * table.shape[0] if axis else 0)
    hit = jnp.arange(table.shape[0], dtype=targets.dtype) == mine[:, None]
    nll = log_sum(logits) - across(jnp.sum(jnp.where(hit, logits, 0), axis=1))
    sums = T**2 * jnp.sum(weights * kl), jnp.sum(weights * nll)
    return mix.kl * sums[0] + mix.nll * sums[1], sums


def chunk_rows(rows: int, vocabulary: int) -> int:
    """Return the rows per chunk, for `rows` rows with `vocabulary` logits each."""
    fit = max(1, LOGITS_BYTES // (4 * vocabulary))
    return min(rows, fit, max(_LEAST, -(-rows // _CHUNKS)))


def _logits(hidden: Array, table: Array) -> Array:
    table = table.astype(hidden.dtype)
    return jnp.einsum("MD,VD->MV", hidden, table, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _total(mix: Mix, hidden: Array, table: Array, given: _Given) -> tuple[Array, Array, Array]:
    return _over_chunks(mix, hidden, table, given, grads=(False, False))[0]


def _over_chunks(
    mix: Mix, hidden: Array, table: Array, given: _Given, *, grads: tuple[bool, bool]
) -> tuple[tuple[Array, Array, Array], Array | None, Array | None]:
    """Return the sums, and the gradients in `hidden` and `table` where `grads` asks for them."""
    M = hidden.shape[0]
    rows = chunk_rows(M, table.shape[0])
    given_hidden, given_table, *rest = given
    # All chunks have the same size; the last is padded with rows of weight 0.
    spare = -M % rows
    parts = [
        jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, given_hidden, *rest)
    ]
    wanted = [i for i in range(2) if grads[i]]

    def chunk(i: Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        h, g, t, w = (lax.dynamic_slice_in_dim(x, i * rows, rows) for x in parts)
        one = partial(chunk_sums, mix=mix)
        sums, d_hidden, d_table = state
        found: Any = ()
        if wanted:
            one = jax.value_and_grad(one, argnums=wanted, has_aux=True)
            (total, more), found = one(h, table, (g, given_table, t, w))
        else:
            total, more = one(h, table, (g, given_table, t, w))
        if grads[0]:
            d_hidden = lax.dynamic_update_slice_in_dim(d_hidden, found[0], i * rows, 0)
        if grads[1]:
            d_table = d_table + found[-1].astype(jnp.float32)
        sums = jax.tree.map(jnp.add, sums, (total, *more))
        return sums, d_hidden, d_table

    last = jnp.max(jnp.where(rest[-1] != 0, 1 + jnp.arange(M), 0))
    zero = jnp.float32(0)
    start = (
        (zero, zero, zero),
        jnp.zeros_like(parts[0]) if grads[0] else None,
        jnp.zeros(table.shape, jnp.float32) if grads[1] else None,
    )
    sums, d_hidden, d_table = lax.fori_loop(0, -(-last // rows), chunk, start)
    if d_hidden is not None:
        d_hidden = d_hidden[:M]
    return sums, d_hidden, None if d_table is None else d_table.astype(table.dtype)


def _fwd(mix: Mix, hidden: Any, table: Any, given: Any) -> tuple[Any, Any]:
    # `perturbed` says whether a gradient is wanted: a frozen table gets none.
    wanted = hidden.perturbed, table.perturbed
    values = jax.tree.map(lambda x: x.value, (hidden, table, given), is_leaf=_has_value)
    sums, d_hidden, d_table = _over_chunks(mix, *values, grads=wanted)
    return sums, (d_hidden, d_table)


def _has_value(x: Any) -> bool:
    return hasattr(x, "perturbed")


def _bwd(mix: Mix, saved: tuple[Any, Any], gs: Any) -> tuple[Any, Any, None]:
    del mix
    g = jnp.zeros(()) if isinstance(gs[0], SymbolicZero) else gs[0]
    d_hidden, d_table = (None if d is None else (d * g).astype(d.dtype) for d in saved)
    return d_hidden, d_table, None


_total.defvjp(_fwd, _bwd, symbolic_zeros=True)
