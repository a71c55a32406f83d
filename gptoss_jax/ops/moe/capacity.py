"""Drop routed pairs that exceed an expert's capacity."""

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
    """Replace ids beyond an expert's capacity by E; return the ids and the share dropped.

    The R unmasked rows have R * A pairs (row, slot), of which an expert takes at most
    ceil(factor * R * A / E). It takes first choices (slot 0) before second ones, and within a slot
    in the order of rows. Pairs of masked rows get E too; they use no capacity and do not count as
    dropped.

    Sources: the order is that of GShard (Lepikhin et al. 2020, arXiv:2006.16668, algorithm 1). As
    in Switch Transformer (arXiv:2101.03961), a dropped pair adds nothing and the other weights of
    its row do not change.
    """
    M, A = expert_ids.shape
    ids = jnp.where(mask[:, None], expert_ids, num_experts).astype(jnp.int32)
    by_choice = ids.T.reshape(-1)
    iota = jnp.arange(M * A, dtype=jnp.int32)
    sorted_ids, order = lax.sort((by_choice, iota), num_keys=1, is_stable=True)
    experts = jnp.arange(num_experts + 1, dtype=jnp.int32)
    first = jnp.searchsorted(sorted_ids, experts, method="compare_all").astype(jnp.int32)
    # A pair's place in its expert's queue. Places are whole numbers, so no ceil is needed below.
    place = jnp.zeros_like(iota).at[order].set(iota - first[sorted_ids], unique_indices=True)
    routed = A * jnp.sum(mask)
    taken = place < factor * routed.astype(jnp.float32) / num_experts
    taken = taken.reshape(A, M).T
    dropped = jnp.sum(~taken & mask[:, None]) / jnp.maximum(routed, 1)
    return jnp.where(taken, ids, num_experts), dropped.astype(jnp.float32)
