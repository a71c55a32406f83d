"""Grouped matmul compiled for TPUs at the shapes of 20b and 120b: no weight is copied."""

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.grouped_matmul import grouped_matmul
from gptoss_jax.types import LayerOf, Relaid

LAYERS, C = 3, 2880
GATE_UP, DOWN = (2, 2880), (2880,)
S = jax.ShapeDtypeStruct
MB = 1_000_000


def relaid(layout, experts, rows):
    width = 2 * 2880 if rows == GATE_UP else 2944
    codes = {
        "columns": S((LAYERS, experts, C // 2, width), jnp.uint8),
        "int8": S((LAYERS, experts, C, width), jnp.int8),
        "fp4": S((LAYERS, experts, C, width), jnp.float4_e2m1fn),
    }[layout]
    return Relaid(codes, S((LAYERS, experts, 96, width), jnp.uint8), layout, rows, C)


def product(rows, weight, sizes):
    return grouped_matmul(rows, weight, sizes, implementation="pallas_tpu")


def forward_and_d_rows(rows, stack, layer, sizes):
    out, pull = jax.vjp(lambda rows: product(rows, LayerOf(stack, layer), sizes), rows)
    return out, pull(out)[0]


def calls(compiled) -> list[str]:
    """Return the names of the kernels that are called."""
    text = compiled.as_text()
    return re.findall(r"custom-call\(.*?custom_call_target=\"tpu_custom_call\"", text)


def assert_no_copy(compiled, shape, bound):
    """Hold temporary memory under `bound` bytes, and find no copy of an array of this shape."""
    assert compiled.memory_analysis().temp_size_in_bytes < bound
    size = ",".join(map(str, shape))
    made = re.findall(rf"= \w+\[{size}\]\S* (\w[\w-]*)\(", compiled.as_text())
    assert made, f"no array of shape [{size}]"
    assert set(made) <= {"parameter", "bitcast", "custom-call", "get-tuple-element"}, made


def turned(count, rows) -> int:
    """Return a bound: arguments and results [count, 2880] are by default stored by columns.

    That is rows, d_rows, and down's result; in a model none of them is an argument.
    """
    return count * 2944 * 2 * (1 if rows == GATE_UP else 2) + 2 * MB


PACKED = [
    *((chip, "columns", 32, GATE_UP, 4 * 4096) for chip in ("v5e", "v5p", "v6e", "tpu7x")),
    ("v5p", "int8", 32, GATE_UP, 4 * 4096),
    ("v6e", "int8", 32, DOWN, 4 * 4096),
    ("tpu7x", "fp4", 32, GATE_UP, 4 * 4096),
    ("tpu7x", "fp4", 32, DOWN, 64),
    ("v5e", "columns", 32, DOWN, 4 * 4096),
    ("v5e", "columns", 32, GATE_UP, 64),
    ("v5e", "columns", 32, DOWN, 64),
    ("v6e", "columns", 128, GATE_UP, 64),
    ("v5p", "columns", 128, DOWN, 4 * 4096),
]


@pytest.mark.parametrize("chip,layout,experts,rows,count", PACKED)
def test_packed_forward_and_d_rows(compile_for, chip, layout, experts, rows, count):
    weight = relaid(layout, experts, rows)
    index = S((), jnp.int32), S((experts,), jnp.int32)
    x = S((count, C), jnp.bfloat16)
    compiled = compile_for(chip, forward_and_d_rows, x, weight, *index)
    assert len(calls(compiled)) == 2
    assert_no_copy(compiled, weight.codes.shape, turned(count, rows))


@pytest.mark.parametrize("rows", [GATE_UP, DOWN], ids=["gate_up", "down"])
def test_dense_with_all_gradients(compile_for, rows):
    def everything(x, weight, sizes):
        out, pull = jax.vjp(lambda x, weight: product(x, weight, sizes), x, weight)
        return out, *pull(out)

    count, weight = 4 * 4096, S((32, *rows, C), jnp.bfloat16)
    x = S((count, C), jnp.bfloat16)
    compiled = compile_for("v5e", everything, x, weight, S((32,), jnp.int32))
    assert len(calls(compiled)) == 3
    assert_no_copy(compiled, weight.shape, turned(count, rows))


def test_dense_layer_of_a_stack(compile_for):
    stack = S((LAYERS, 32, *GATE_UP, C), jnp.bfloat16)
    index = S((), jnp.int32), S((32,), jnp.int32)
    x = S((4096, C), jnp.bfloat16)
    compiled = compile_for("v6e", forward_and_d_rows, x, stack, *index)
    assert_no_copy(compiled, stack.shape, turned(4096, GATE_UP))
