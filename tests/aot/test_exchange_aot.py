"""The ragged exchange of rows, forward and backward, compiled for machines that have it."""

from __future__ import annotations

import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax import chips
from gptoss_jax.chips import topologies
from gptoss_jax.config import MeshConfig
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parallel.experts import experts
from gptoss_jax.parallel.mesh import ROWS
from gptoss_jax.parameters import table

B, T, A, E, D, F = 8, 64, 4, 16, 384, 256
SHAPES = {
    "gate_up_weight": (E, 2, F, D),
    "gate_up_bias": (E, 2, F),
    "down_weight": (E, D, F),
    "down_bias": (E, D),
}


def compiled(target: str, exchange: str, **sizes: int) -> str:
    """Return the HLO of values and gradients."""
    mesh = meshes.make(MeshConfig(**sizes), topologies.devices(target))

    def shape(dims: tuple, dtype: type, *spec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=NamedSharding(mesh, P(*spec)))

    rows = ROWS, "context"
    args = (
        shape((B, T, D), jnp.bfloat16, *rows, None),
        shape((B, T, A), jnp.float32, *rows, None),
        {
            name: shape(dims, jnp.bfloat16, *table.row(f"layers/experts/{name}").mesh_axes)
            for name, dims in SHAPES.items()
        },
    )
    rest = shape((B, T, A), jnp.int32, *rows, None), shape((B, T), jnp.bool_, *rows)

    def loss(x, shares, weights, ids, mask):
        options = {"mask": mask, "limit": 7.0, "chunk": 128, "exchange": exchange}

        @jax.checkpoint
        def layer(x, _):
            return x + experts(x, ids, shares, weights=weights, **options), None

        out, _ = jax.lax.scan(layer, x, length=2)
        return jnp.sum(out.astype(jnp.float32) ** 2)

    with chips.assume(target.partition(":")[0]), jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
        return grad.lower(*args, *rest).compile().as_text()


def count(hlo: str, op: str) -> int:
    return len(re.findall(rf" {op}(?:-start)?\(", hlo))


@pytest.mark.parametrize(
    ("target", "sizes"),
    [
        ("v5e:2x4", {"expert": 8}),
        ("v5e:2x4", {"expert": 4, "tensor": 2}),
        ("h200:8", {"expert": 8}),
    ],
)
def test_ragged_exchange(target: str, sizes: dict) -> None:
    hlo = compiled(target, "all_to_all", **sizes)
    # Rows and their tags go out and sums come back; then rows and tags again, and three gradients.
    assert count(hlo, "ragged-all-to-all") == 8
    # No matrix of an expert travels: nothing that is gathered is as large as one.
    gathered = re.findall(r" = (.*) all-gather(?:-start)?\(", hlo)
    shapes_of = [dims for shapes in gathered for dims in re.findall(r"\w+\[([\d,]+)\]", shapes)]
    assert all(math.prod(map(int, dims.split(","))) < D * F for dims in shapes_of)
