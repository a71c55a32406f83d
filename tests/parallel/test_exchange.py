"""Which rows go where, counted by a loop; and how many, whatever the routing."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import MeshConfig
from gptoss_jax.parallel import exchange
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel.exchange import destinations, receive_rows, rows_moved


def routing(kind: str, rows: int, *, num_experts: int, active: int) -> np.ndarray:
    """Return ids [rows, active], distinct in a row but for "one"."""
    rng = np.random.default_rng(rows)
    if kind == "one":
        return np.full((rows, active), num_experts - 2, np.int32)
    score = rng.random((rows, num_experts))
    if kind == "first":  # all rows to one expert, which is not all that they go to
        score[:, 3] = 2
    if kind == "half":  # no tokens for half of the experts, which are those of half of the shards
        score[:, num_experts // 2 :] = -1
    return np.argsort(-score, axis=1)[:, :active].astype(np.int32)


def count(ids: np.ndarray, mask: np.ndarray, *, num_experts: int, shards: int) -> np.ndarray:
    """Count rows from shard to shard, one by one."""
    counts = np.zeros((shards, shards), int)
    for row, chosen in enumerate(ids):
        goes = {int(i) * shards // num_experts for i in chosen if i < num_experts and mask[row]}
        for there in goes:
            counts[row * shards // len(ids), there] += 1
    return counts


@pytest.mark.parametrize(("rows", "shards"), [(24, 8), (36, 4), (14, 2)])
def test_a_row_goes_once_to_a_shard(rows: int, shards: int) -> None:
    E, A = 16, 5
    ids = routing("even", rows, num_experts=E, active=A)
    rng = np.random.default_rng(1)
    ids = np.where(rng.random(ids.shape) < 0.3, E, ids)  # dropped
    mask = rng.random(rows) < 0.7
    want = count(ids, mask, num_experts=E, shards=shards)
    moved = rows_moved(ids, jnp.array(mask), num_experts=E, shards=shards, exchange="all_to_all")
    np.testing.assert_array_equal(moved, want * (1 - np.eye(shards, dtype=int)))

    def planned(ids: jax.Array) -> jax.Array:
        return exchange.route(ids, num_experts=E, axis="expert").counts

    mesh = meshes.make(MeshConfig(data=-1, expert=shards))
    spread = jax.shard_map(
        planned, mesh=mesh, in_specs=P("expert"), out_specs=P(), check_vma=False
    )  # fmt: skip
    counts = jax.jit(spread)(jnp.where(mask[:, None], ids, E))
    np.testing.assert_array_equal(counts, want)


def test_destinations_name_a_shard_once() -> None:
    ids = jnp.array([[0, 5, 2, 8], [7, 7, 3, 0], [8, 8, 8, 8]])  # of 8 experts, two a shard
    got = destinations(ids, num_experts=8, shards=4)
    np.testing.assert_array_equal(got, [[0, 2, 1, 4], [3, 4, 1, 0], [4, 4, 4, 4]])


@pytest.mark.parametrize("kind", ["even", "first", "one", "half", "few"])
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_no_routing_moves_much_more_than_an_even_one(kind: str, shards: int) -> None:
    rows, E, A = 1024, 32, 4
    if kind == "few":  # more experts than tokens
        rows, E = 64, 128
    ids = routing(kind, rows, num_experts=E, active=A)
    moved = rows_moved(ids, num_experts=E, shards=shards, exchange="all_to_all")
    held = E // shards
    even = rows * (shards - 1) * (1 - math.comb(E - held, A) / math.comb(E, A))
    assert 0 < int(moved.sum()) < 1.3 * even
    # What a shard may have to receive besides its own rows always fits, and is never more.
    into = np.asarray(moved).sum(axis=0)
    assert into.max() <= receive_rows(rows // shards, shards) - rows // shards
    gathered = rows_moved(ids, num_experts=E, shards=shards, exchange="all_gather")
    assert int(gathered.sum()) == rows * (shards - 1)
    assert (np.asarray(moved) <= gathered).all()
