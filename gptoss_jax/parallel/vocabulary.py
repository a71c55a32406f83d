"""Embedding and loss with tables that are sharded over the mesh and never gathered.

The embedding is split over D (FSDP) and over the vocabulary (`tensor`). A device looks up its part
of D for the tokens of all devices in its group, and an all-to-all brings the parts of each token
together. The unembedding is split over the vocabulary. The hidden states of a group are gathered,
one chunk at a time, and each device forms the logits of its part of the vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from gptoss_jax.ops.cross_entropy import sharded
from gptoss_jax.ops.divergence import Mix, chunk_rows, chunk_sums
from gptoss_jax.parallel.collectives import sum_once
from gptoss_jax.parallel.mesh import ROWS
from gptoss_jax.parameters.table import DENSE, row

GATHERED_ROWS = 16_384  # most hidden states that a group gathers at a time


def embed(
    table: Float[Array, "V D"], tokens: Int[Array, "B T"], *, whole_rows: bool = False
) -> Float[Array, "B T D"]:
    """Look tokens up in the sharded embedding; the result has the table's dtype.

    With `whole_rows` tokens are not split over `context`, as in decoding.
    """
    where = P(ROWS, None if whole_rows else "context")
    # The all-to-all goes along axes that split the tokens; D is gathered along the other axis.
    others = tuple(axis for axis in DENSE if not (whole_rows and axis == "context"))

    def local(table: Array, tokens: Array) -> Array:
        if whole_rows:
            table = lax.all_gather(table, "context", axis=1, tiled=True)
        all_tokens = lax.all_gather(tokens, others)  # [X, B, T]
        rows = table.shape[0]
        mine = all_tokens - lax.axis_index("tensor") * rows
        inside = (mine >= 0) & (mine < rows)
        found = jnp.where(inside[..., None], table[jnp.where(inside, mine, 0)], 0)
        found = lax.all_to_all(found, others, split_axis=0, concat_axis=3, tiled=True)
        return sum_once(found[0], "tensor")

    if whole_rows:  # D is split over context innermost, so that gathering it keeps the order
        assert DENSE[-1] == "context"
    return jax.shard_map(
        local,
        in_specs=(P(*row("embedding/weight").mesh_axes), where),
        out_specs=P(*where, None),
        check_vma=False,
    )(table, tokens)


def cross_entropy(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
) -> tuple[Float[Array, ""], Float[Array, "B T"]]:
    """Return (sum of weights * nll, nll) as `ops.cross_entropy` does, with a sharded vocabulary.

    Chunks of tokens are gathered over the group of devices that shares one copy of the table. The
    backward pass gathers them again, and sums over chunks in float32.
    """
    tokens = P(ROWS, "context")
    shards = ("tensor", *DENSE)

    def local(hidden: Array, table: Array, targets: Array, weights: Array):
        rows = targets.size
        chunks = _chunks(rows, math.prod(lax.axis_size(axis) for axis in DENSE))
        parts: Any = (
            hidden.reshape(chunks, rows // chunks, -1),
            *(x.reshape(chunks, rows // chunks) for x in (targets, weights.astype(jnp.float32))),
        )
        table = table if chunks == 1 else table.astype(jnp.float32)
        first = lax.axis_index(DENSE) * (rows // chunks)

        @jax.checkpoint
        def one(part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            gathered = [lax.all_gather(x, DENSE, tiled=True) for x in part]
            total, nll = sharded(gathered[0], table, *gathered[1:], axis=shards)
            return total, lax.dynamic_slice_in_dim(nll, first, rows // chunks)

        def step(total: Array, part: tuple[Array, Array, Array]) -> tuple[Array, Array]:
            more, nll = one(part)
            return total + more, nll

        total, nll = lax.scan(step, jnp.float32(0), parts)
        return sum_once(total, "data"), nll.reshape(targets.shape)

    return jax.shard_map(
        local,
        in_specs=(P(*tokens, None), P(*row("unembedding/weight").mesh_axes), tokens, tokens),
        out_specs=(P(), tokens),
        check_vma=False,
    )(hidden, table, targets, weights)


def divergence(
    hidden: Float[Array, "B T D"],
    table: Float[Array, "V D"],
    given_hidden: Float[Array, "B T C"],
    given_table: Float[Array, "V C"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    mix: Mix,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Return the sums of `ops.divergence`, with both vocabularies sharded."""
    tokens, shards = P(ROWS, "context"), ("tensor", *DENSE)
    tables = P(*row("unembedding/weight").mesh_axes)

    def local(hidden: Array, table: Array, taught: Array, taught_table: Array, *rest: Array):
        rows, group = rest[0].size, math.prod(lax.axis_size(axis) for axis in DENSE)
        chunks = _chunks(rows, group, most=chunk_rows(rows * group, table.shape[0]))
        parts = [x.reshape(chunks, rows // chunks, *x.shape[2:]) for x in (hidden, taught, *rest)]
        table = table if chunks == 1 else table.astype(jnp.float32)

        @jax.checkpoint
        def one(part: list[Array]) -> tuple[Array, tuple[Array, Array]]:
            h, g, t, w = (lax.all_gather(x, DENSE, tiled=True) for x in part)
            return chunk_sums(h, table, (g, taught_table, t, w), mix=mix, axis=shards)

        def step(sums: Any, part: list[Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, one(part)), None

        zero = jnp.float32(0)
        (total, others), _ = lax.scan(step, (zero, (zero, zero)), parts)
        return sum_once(total, "data"), *lax.psum(lax.stop_gradient(others), "data")

    return jax.shard_map(
        local,
        in_specs=(P(*tokens, None), tables, P(*tokens, None), tables, tokens, tokens),
        out_specs=(P(), P(), P()),
        check_vma=False,
    )(hidden, table, given_hidden, given_table, targets, jnp.asarray(weights, jnp.float32))


def _chunks(rows: int, group: int, most: int = GATHERED_ROWS) -> int:
    """Return the fewest equal chunks of a device's rows of which a group gathers at most `most`."""
    fits = (n for n in range(1, rows) if rows % n == 0 and rows // n * group <= most)
    return next(fits, rows)
