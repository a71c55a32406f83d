"""Write into a key/value cache that is sharded over the mesh."""

from __future__ import annotations

import jax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.attention import cache as op
from gptoss_jax.parallel.mesh import ROWS, current
from gptoss_jax.parallel.sharding import cache_spec


def write(
    cache: Float[Array, "B S K H"], new: Float[Array, "B T K H"], slots: Int[Array, "B T"]
) -> Float[Array, "B S K H"]:
    """Return the cache with `new` written to it; each device runs `ops.attention.cache.write`."""
    mesh = current()
    if mesh is None:
        return op.write(cache, new, slots)
    where = cache_spec(cache, mesh)
    return jax.shard_map(
        op.write, in_specs=(where, where, P(ROWS, None)), out_specs=where, check_vma=False
    )(cache, new, slots)
