"""Attention of 131,072 tokens over 8 shards of `context`, compiled for what is not here."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax import chips
from gptoss_jax.chips import topologies
from gptoss_jax.config import MeshConfig
from gptoss_jax.parallel import context, mesh

N, K, H = 64, 8, 64  # of 20b and 120b
MB = 10**6


def compiled(target: str, window: int | None, T: int = 131072):
    """Compile one row there and back, its tokens over all devices of the target."""
    over = mesh.make(MeshConfig(context=-1), topologies.devices(target))

    def shape(*sizes, spec, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=NamedSharding(over, spec))

    rows = P(mesh.ROWS, "context")
    q, k = (shape(1, T, n, H, spec=P(*rows, "tensor", None)) for n in (N, K))
    sinks = shape(N, spec=P("tensor"), dtype=jnp.float32)
    ids = shape(1, T, spec=rows, dtype=jnp.int32)

    def run(q, k, v, sinks, segment_ids, positions, d_out):
        def attend(q, k, v, sinks):
            return context.attention(
                q, k, v, sinks=sinks, window=window, segment_ids=segment_ids, positions=positions
            )

        out, back = jax.vjp(attend, q, k, v, sinks)
        return out, back(d_out)

    with chips.assume(target.partition(":")[0]), jax.set_mesh(over):
        return jax.jit(run).lower(q, k, k, sinks, ids, ids, q).compile()


def gathered(text: str) -> list[str]:
    return re.findall(r"(?:all-gather|all-to-all|reduce-scatter)(?:-start)?\(", text)


# q and the output of a device take 134 MB each, k and v 17.
@pytest.mark.parametrize(
    ("target", "window", "most"),
    [
        ("v5p:2x2x2", 128, 2600 * MB),
        ("v5p:2x2x2", None, 3600 * MB),
        ("h200:8", 128, 500 * MB),
        ("h200:8", None, 1300 * MB),
    ],
)
def test_memory_is_linear_in_length(target, window, most):
    """What a device needs beside arguments and results, in four times a quarter row's at most."""
    whole, quarter = (compiled(target, window, T) for T in (131072, 32768))
    temporary = whole.memory_analysis().temp_size_in_bytes
    assert temporary < most
    assert temporary <= 4.1 * quarter.memory_analysis().temp_size_in_bytes
    assert not gathered(whole.as_text())
    assert "collective-permute" in whole.as_text()
