"""Which kv heads a shard's query heads belong to."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import MeshConfig
from gptoss_jax.parallel import heads, mesh


@pytest.mark.parametrize(("N", "K"), [(8, 2), (8, 1), (8, 4), (8, 8), (16, 8), (24, 2)])
@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_a_shard_has_the_kv_heads_of_its_query_heads(N, K, shards):
    """Query head n uses kv head n // (N / K), whatever shard it is on."""
    heads.check(N, K, shards)
    over = mesh.make(MeshConfig(tensor=shards, data=8 // shards))
    marked = np.arange(K, dtype=np.float32).reshape(1, 1, K, 1)
    island = jax.shard_map(
        lambda x: heads.own(x, K, shards).reshape(1, -1),
        mesh=over,
        in_specs=P(None, None, heads.kv_axis(K, shards), None),
        out_specs=P("tensor", None),
        check_vma=False,
    )
    there = np.asarray(jax.jit(island)(marked))  # [shards, kv heads of one]
    n, k = N // shards, there.shape[1]
    uses = [int(there[s, i // (n // k)]) for s in range(shards) for i in range(n)]
    assert uses == [head // (N // K) for head in range(N)]


@pytest.mark.parametrize(
    ("N", "K", "shards", "message"),
    [
        (6, 2, 4, "mesh.tensor=4 does not divide the 6 query heads"),
        (24, 6, 4, "mesh.tensor=4 and 6 kv heads: neither is a multiple of the other"),
    ],
)
def test_heads_that_do_not_divide_are_refused(N, K, shards, message):
    with pytest.raises(ValueError, match=message):
        heads.check(N, K, shards)
