"""Every target's compiler is there and answers."""

import jax
import jax.numpy as jnp
import pytest


@pytest.mark.parametrize(
    "chip", ["v5e", "v5p", "v6e", "tpu7x", "h200", "gh200", "a100-40", "l40s", "rtx4090", "rtx5090"]
)
def test_a_matrix_product_compiles(compile_for, chip):
    shape = jax.ShapeDtypeStruct((512, 256), jnp.bfloat16)
    compiled = compile_for(chip, lambda a: a @ a.T, shape)
    assert compiled.memory_analysis().output_size_in_bytes == 512 * 512 * 2
