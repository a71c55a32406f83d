"""Turn the rows that each process reads into a batch of global arrays, sharded over the mesh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax.parallel import sharding
from gptoss_jax.parallel.mesh import ROWS
from gptoss_jax.types import Batch


def rows_here(mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """Return the rows of a global batch that this process's devices need, as (first, last + 1).

    It is the smallest range that contains them all. Processes may share rows: processes whose
    devices differ only along the mesh axes `context` and `tensor` need the same rows.
    """
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    return rows_of(mine, mesh, batch_size)


def rows_of(devices: Sequence[Any], mesh: jax.sharding.Mesh, batch_size: int) -> tuple[int, int]:
    """Return the smallest range of rows that contains the rows of the given devices."""
    parts = NamedSharding(mesh, PartitionSpec(ROWS)).devices_indices_map((batch_size,))
    ranges = [parts[device][0].indices(batch_size) for device in devices]
    return min(r[0] for r in ranges), max(r[1] for r in ranges)


def spread(batch: Batch, mesh: jax.sharding.Mesh, *, rows: tuple[int, int], size: int) -> Batch:
    """Make global arrays of `size` rows from a batch that has this process's `rows`.

    The batch's `shared` arrays stay as they are.
    """
    first = rows[0]

    def globally(x: np.ndarray, where: Any) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback((size, *x.shape[1:]), where, part)

    shared, batch = batch.shared, batch.replace(shared=None)  # type: ignore[attr-defined]
    batch = jax.tree.map(globally, batch, sharding.batch_shardings(batch, mesh))
    return batch.replace(shared=shared)  # type: ignore[attr-defined]
