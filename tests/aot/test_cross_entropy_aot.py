"""Cross entropy at the real size, in the compilers' own figures: memory, copies, exchanges."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gptoss_jax import chips
from gptoss_jax.chips import topologies
from gptoss_jax.ops.cross_entropy import cross_entropy, sharded

M, V, D = 8192, 201_088, 2880
SHAPES = (
    jax.ShapeDtypeStruct((M, D), jnp.bfloat16),
    jax.ShapeDtypeStruct((V, D), jnp.bfloat16),
    jax.ShapeDtypeStruct((M,), jnp.int32),
    jax.ShapeDtypeStruct((M,), jnp.float32),
)
GB = 10**9


def copies(text: str, shape: str) -> list[str]:
    """Return the instructions that make an array of `shape` out of another, but for the loops'."""
    moved = r"(copy|copy-start|transpose|convert|concatenate|pad|all-gather)\("
    return re.findall(rf"^.*= [a-z0-9]+\[{shape}\]\S* {moved}.*$", text, re.MULTILINE)


@pytest.mark.parametrize(("chip", "most"), [("h200", 1.7), ("v6e", 1.0)])
def test_memory_of_the_loss_and_its_gradients(compile_for, chip, most):
    run = jax.value_and_grad(cross_entropy, argnums=(0, 1), has_aux=True)
    compiled = compile_for(chip, run, *SHAPES)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(f"{chip}: temporary {memory.temp_size_in_bytes / GB:.2f} GB")
    assert memory.output_size_in_bytes < 2 * (V + M) * D + 4 * M + 4096
    assert memory.temp_size_in_bytes < most * GB
    assert not copies(text, f"{V},{D}") and not copies(text, f"{D},{V}")
    assert f"f32[{V},{D}]" not in text and f"f32[{D},{V}]" not in text


# On v6e it turns the weight to take rows from it: no more than the gradient would have taken.
@pytest.mark.parametrize(("chip", "most"), [("h200", 0.6), ("v6e", 1.7)])
def test_memory_of_a_frozen_weight(compile_for, chip, most):
    run = jax.value_and_grad(cross_entropy, argnums=0, has_aux=True)
    compiled = compile_for(chip, run, *SHAPES)
    memory = compiled.memory_analysis()
    print(f"{chip}: temporary {memory.temp_size_in_bytes / GB:.2f} GB, weight frozen")
    assert bool(copies(compiled.as_text(), f"{V},{D}")) == (chip == "v6e")
    assert memory.output_size_in_bytes < 2 * M * D + 4 * M + 4096
    assert memory.temp_size_in_bytes < most * GB


@pytest.mark.parametrize("target", ["v6e:2x2", "h200:4"])
def test_a_spread_vocabulary_is_never_gathered(target):
    mesh = topologies.mesh(target)
    all_of_it, part = PartitionSpec(), PartitionSpec("x")
    specs = (all_of_it, part, all_of_it, all_of_it)

    def run(*args):
        return sharded(*args, axis="x")

    over_devices = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=(all_of_it, all_of_it))
    shapes = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))
        for s, spec in zip(SHAPES, specs, strict=True)
    ]
    with chips.assume(target.partition(":")[0]), jax.set_mesh(mesh):
        fn = jax.value_and_grad(over_devices, argnums=(0, 1), has_aux=True)
        compiled = jax.jit(fn).lower(*shapes).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    print(f"{target}: temporary {memory.temp_size_in_bytes / GB:.2f} GB a device")
    assert "all-gather" not in text and "all-to-all" not in text and "all-reduce" in text
    assert memory.temp_size_in_bytes < GB
    assert not copies(text, f"{V // 4},{D}") and not copies(text, f"{D},{V // 4}")
