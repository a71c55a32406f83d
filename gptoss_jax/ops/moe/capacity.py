"""Which routed pairs an expert of limited capacity takes."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int


def drop_beyond_capacity(
    expert_ids: Int[Array, "M A"],
    mask: Bool[Array, " M"],
    *,
    num_experts: int,
    factor: float,
) -> tuple[Int[Array, "M A"], Float[Array, ""]]:
    """Return the ids with E in place of those beyond an expert's capacity, and the share dropped.

    An expert takes at most ceil(factor * R * A / E) of the R * A pairs of the unmasked rows: first
    choices (slot 0) before second ones, within a slot in the rows' order. Pairs of masked rows get
    E too; they take no room and are not among the dropped. Source: the order is that of GShard
    (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1); that a dropped pair adds nothing, with
    the other weights of its row as they were, is Switch Transformer's (arXiv:2101.03961).
    """
    M, A = expert_ids.shape
    ids = jnp.where(mask[:, None], expert_ids, num_experts).astype(jnp.int32)
    by_choice = ids.T.reshape(-1)
    iota = jnp.arange(M * A, dtype=jnp.int32)
    sorted_ids, order = lax.sort((by_choice, iota), num_keys=1, is_stable=True)
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    first = jnp.searchsorted(sorted_ids, experts, method="compare_all").astype(jnp.int32)
    # A pair's place in its expert's queue; places are whole numbers, so that no ceil is needed.
    place = jnp.zeros_like(iota).at[order].set(iota - first[sorted_ids], unique_indices=True)
    routed = A * jnp.sum(mask)
    taken = place < factor * routed.astype(jnp.float32) / num_experts
    taken = taken.reshape(A, M).T
    dropped = jnp.sum(~taken & mask[:, None]) / jnp.maximum(routed, 1)
    return jnp.where(taken, ids, num_experts), dropped.astype(jnp.float32)
