"""Compute the sums that make up a loss, from a model and a batch."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.lora import adapters
from gptoss_jax.model import host_embedding
from gptoss_jax.ops.cross_entropy import cross_entropy
from gptoss_jax.ops.lora import widen
from gptoss_jax.parallel import context, mesh, vocabulary
from gptoss_jax.types import Batch, Output, Params, RouterStats

# The unembedding runs over chunks of an eighth of the rows, but at least `_MIN_ROWS`.
_CHUNKS = 8
_MIN_ROWS = 128


@struct.dataclass
class SourceSums:
    """Sums over the rows of each source of a mixture, float32."""

    nll: Float[Array, " sources"]
    weight: Float[Array, " sources"]
    tokens: Float[Array, " sources"]


@struct.dataclass
class LossSums:
    """Sums over a batch, float32: add them over microbatches, hosts and shards, then divide.

    The loss is `nll / weight`. Training minimises `nll / weight + penalty / tokens`. Each sum is
    over the whole step, so that gradient accumulation equals one big batch.
    """

    nll: Float[Array, ""]  # sum of weight * negative log-likelihood, in nats
    weight: Float[Array, ""]  # sum of the targets' weights
    penalty: Float[Array, ""]  # the router losses times their coefficients and `tokens`; 0 if off
    tokens: Float[Array, ""]  # tokens that are not padding
    router: RouterStats
    by_source: SourceSums | None = None
    # What an objective logs beside its loss: sums too, which are divided by `weight`.
    extra: dict[str, Float[Array, ""]] = struct.field(default_factory=dict)


def trained_weight(batch: Batch) -> Float[Array, ""]:
    """Return the sum of a batch's weights: the divisor of a loss that is a mean over tokens."""
    return jnp.sum(batch.weights.astype(jnp.float32))


def loss_fn(
    model: Any,
    params: Params,
    batch: Batch,
    *,
    balance_loss: float = 0.0,
    z_loss: float = 0.0,
    num_sources: int = 0,
) -> LossSums:
    """Run the model on a batch and sum its loss over the trained tokens.

    Logits [tokens, V] never exist: the unembedding runs over chunks. On one CPU it leaves out the
    positions of weight 0, so that its cost follows the trained tokens, in steps of an eighth of the
    batch; elsewhere it takes all positions. The router losses are averaged over layers; with
    coefficients of 0 they add nothing to the gradient. `model` has the `forward` of
    `model.Transformer`. With `num_sources`, there are also sums for each source.
    """
    batch, out = forward(model, params, batch)
    weights = jnp.asarray(batch.weights, jnp.float32)
    nll, each = weighted_nll(model, params, out.hidden, batch.targets, weights)
    by_source = None
    if num_sources:
        by_source = _by_source(batch, each * weights, num_sources=num_sources)
    tokens, penalty = router_penalty(batch, out, balance_loss=balance_loss, z_loss=z_loss)
    return LossSums(nll, jnp.sum(weights), penalty, tokens, out.router, by_source)


def forward(model: Any, params: Params, batch: Batch) -> tuple[Batch, Output]:
    """Run the model on a batch; return the batch, its tokens in the output's order, and the output.

    A mesh that splits tokens over `context` reorders them, which changes no sum.
    """
    where: dict[str, Any] = {}
    if mesh.size("context") > 1:
        batch = _balance(batch)
        where["balanced"] = True
    if (rows := host_embedding.rows(batch)) is not None:
        where["embedded"] = rows
    out = model.forward(
        params, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions, **where
    )
    return batch, out


@jax.named_scope("loss")
def weighted_nll(
    model: Any,
    params: Params,
    hidden: Float[Array, "B T D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Unembed; return the sum of weights * nll, and each target's nll where its weight is not 0.

    Both are in nats, float32. Only the sum has a gradient, with respect to the parameters and
    hidden states. An objective that is another function of the nll gets its gradient from a second
    call, in which the weights are the objective's derivatives with respect to the nll.
    """
    table = params["unembedding"]["weight"]
    if (adapter := adapters.of_table(params, "unembedding", model)) is not None:
        hidden, table = widen(hidden, table, adapter)
    if mesh.current() is not None:
        nll, each = vocabulary.cross_entropy(hidden, table, targets, weights)
        return nll, each.reshape(weights.shape)
    rows = hidden.reshape(-1, hidden.shape[-1])
    of_rows = jnp.asarray(targets).reshape(-1), weights.reshape(-1)
    if chips.current().platform == "cpu":
        *trained, goes_to = trained_first(rows, *of_rows)
        rows, *of_rows = trained
        nll, each = _nll_sum(rows, table, *of_rows)
        each = each[goes_to]
    else:  # all rows at once: a loop over chunks would carry a float32 gradient of the table
        nll, each = cross_entropy(rows, table, *of_rows)
    return nll, each.reshape(weights.shape)


def router_penalty(
    batch: Batch, out: Output, *, balance_loss: float, z_loss: float
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the number of tokens without padding, and the router losses times that number."""
    tokens = jnp.sum(batch.segment_ids != 0).astype(jnp.float32)
    penalty = jnp.float32(0)
    if balance_loss:
        penalty += balance_loss * jnp.mean(out.router.balance_loss)
    if z_loss:
        penalty += z_loss * jnp.mean(out.router.z_loss)
    return tokens, penalty * tokens


def _balance(batch: Batch) -> Batch:
    """Put the tokens of each row into the order in which they are split over `context`."""
    order = partial(context.balance, shards=mesh.size("context"))
    shared, batch = batch.shared, batch.replace(shared=None)  # type: ignore[attr-defined]
    batch = jax.tree.map(lambda x: order(x) if jnp.ndim(x) > 1 else x, batch)
    return batch.replace(shared=shared)  # type: ignore[attr-defined]


def _by_source(batch: Batch, nll: Float[Array, "B T"], *, num_sources: int) -> SourceSums:
    if batch.sources is None:
        raise ValueError("num_sources is given, and the batch has no sources")
    sources = batch.sources

    def total(per_token: Array) -> Array:
        rows = jnp.sum(per_token, axis=1, dtype=jnp.float32)
        return jax.ops.segment_sum(rows, sources, num_sources)

    return SourceSums(total(nll), total(batch.weights), total(batch.segment_ids != 0))


def trained_first(
    hidden: Float[Array, "M D"], targets: Int[Array, " M"], weights: Float[Array, " M"]
) -> tuple[Float[Array, "M D"], Int[Array, " M"], Float[Array, " M"], Int[Array, " M"]]:
    """Move the rows whose weight is not 0 to the front, in order; return last where each went."""
    trained = weights != 0  # negative where an objective makes a target less likely
    # Find where each row goes by counting, without a sort.
    after = jnp.sum(trained) + jnp.cumsum(~trained) - 1
    goes_to = jnp.where(trained, jnp.cumsum(trained) - 1, after)
    rows = jnp.arange(weights.shape[0])
    order = jnp.zeros_like(goes_to).at[goes_to].set(rows, unique_indices=True)
    return _permute(hidden, order, goes_to), targets[order], weights[order], goes_to


@jax.custom_vjp
def _permute(
    x: Float[Array, "M D"], order: Int[Array, " M"], inverse: Int[Array, " M"]
) -> Float[Array, "M D"]:
    """Reorder rows. Its gradient is a gather too, where autodiff would scatter row by row."""
    return x[order]


def _permute_fwd(x, order, inverse):
    return x[order], inverse


def _permute_bwd(inverse, g):
    return g[inverse], None, None


_permute.defvjp(_permute_fwd, _permute_bwd)


@jax.custom_vjp
def _nll_sum(
    hidden: Float[Array, "M D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " M"],
    weights: Float[Array, " M"],
) -> tuple[Float[Array, ""], Float[Array, " M"]]:
    """Sum weights * nll over the rows with a weight, all of which must come first.

    The second result is the nll of each row, for reports: no gradient flows through it.

    The number of chunks is known only when it runs, and autodiff can't handle such a loop. So this
    has its own derivative rule, which computes the gradients in the loop that computes the loss.
    """
    return _over_chunks(hidden, weight, targets, weights, grads=(False, False))[0]


def _over_chunks(
    hidden: Array, weight: Array, targets: Array, weights: Array, *, grads: tuple[bool, bool]
) -> tuple[tuple[Array, Array], Array, Array]:
    """Return (sum of weights * nll, nll of each row), and the gradients in hidden and weight.

    `grads` says which of the two are wanted; for the others a scalar 0 is returned.
    """
    M = hidden.shape[0]
    rows = min(M, max(-(-M // _CHUNKS), _MIN_ROWS))
    # All chunks have one size: the last may reach beyond the end, into rows of weight 0.
    spare = -M % rows
    parts = [jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)) for x in (hidden, targets, weights)]
    put = jax.lax.dynamic_update_slice_in_dim

    def chunk(i: Array, sums: tuple[Array, ...]) -> tuple[Array, ...]:
        nll, each, d_hidden, d_weight = sums
        h, t, w = (jax.lax.dynamic_slice_in_dim(x, i * rows, rows) for x in parts)
        wanted = [i for i in range(2) if grads[i]]
        if not wanted:
            more, new = cross_entropy(h, weight, t, w)
            return nll + more, put(each, new, i * rows, 0), d_hidden, d_weight
        one = jax.value_and_grad(cross_entropy, argnums=wanted, has_aux=True)
        (more, new), found = one(h, weight, t, w)
        if grads[0]:
            d_hidden = put(d_hidden, found[0], i * rows, 0)
        if grads[1]:
            d_weight = d_weight + found[-1].astype(jnp.float32)
        return nll + more, put(each, new, i * rows, 0), d_hidden, d_weight

    used = -(-jnp.sum(weights != 0) // rows)
    start = (
        jnp.float32(0),
        jnp.zeros(M + spare, jnp.float32),
        jnp.zeros_like(parts[0]) if grads[0] else jnp.zeros(()),
        jnp.zeros(weight.shape, jnp.float32) if grads[1] else jnp.zeros(()),
    )
    nll, each, d_hidden, d_weight = jax.lax.fori_loop(0, used, chunk, start)
    d_hidden = d_hidden[:M] if grads[0] else d_hidden
    return (nll, each[:M]), d_hidden, d_weight.astype(weight.dtype)


def _nll_sum_fwd(hidden, weight, targets, weights):
    # `perturbed` says whether a gradient is wanted: a frozen table gets none.
    wanted = hidden.perturbed, weight.perturbed
    values = (x.value for x in (hidden, weight, targets, weights))
    sums, d_hidden, d_weight = _over_chunks(*values, grads=wanted)
    return sums, (d_hidden, d_weight)


def _nll_sum_bwd(saved, gs):
    (d_hidden, d_weight), (g, _) = saved, gs
    if isinstance(g, SymbolicZero):
        g = jnp.zeros(())

    def scaled(d: Array) -> Array | None:
        return (d * g).astype(d.dtype) if d.ndim else None

    # The weights of targets are data: they get no gradient.
    return scaled(d_hidden), scaled(d_weight), None, None


_nll_sum.defvjp(_nll_sum_fwd, _nll_sum_bwd, symbolic_zeros=True)
