"""What the TPUs' compilers make of the experts' decode kernel: it fits, and no codes are copied."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.moe import experts
from gptoss_jax.ops.mxfp4 import layouts
from gptoss_jax.types import MXFP4, LayerOf, Relaid

D = F = 2880
MODELS = {"20b": (24, 32), "120b": (36, 128)}
ACTIVE = 4
TEMPORARY = 4 << 20  # bytes: the biases of 64 pairs in float32; one expert's codes are 12 MB
STACKS = ("gate_up_weight", "gate_up_bias", "down_weight", "down_bias")


def arguments(rows: int, layers: int, num_experts: int, layout: str) -> dict:
    """Return the shapes of one layer's arguments, its weights and biases in stacks."""
    lead = (layers, num_experts)

    def shape(*axes: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(axes, dtype)

    def relaid(*axes: int) -> Relaid:
        columns = axes[-1]
        blocks = shape(*lead, *axes[:-1], columns // 32, 16, dtype=jnp.uint8)
        packed = MXFP4(blocks, shape(*lead, *axes[:-1], columns // 32, dtype=jnp.uint8))
        change = functools.partial(layouts.relayout, layout=layout, row_axes=len(axes) - 1)
        return jax.eval_shape(change, packed)

    return {
        "x": shape(rows, D),
        "expert_ids": shape(rows, ACTIVE, dtype=jnp.int32),
        "expert_weights": shape(rows, ACTIVE, dtype=jnp.float32),
        "gate_up_weight": relaid(2, F, D),
        "gate_up_bias": shape(*lead, 2, F),
        "down_weight": relaid(D, F),
        "down_bias": shape(*lead, D),
        "layer": shape(dtype=jnp.int32),
    }


def run(arguments: dict) -> jax.Array:
    layer = arguments.pop("layer")
    stacks = {key: LayerOf(arguments.pop(key), layer) for key in STACKS}
    rows = [arguments[key] for key in ("x", "expert_ids", "expert_weights")]
    return experts(*rows, **stacks, limit=7.0, implementation="pallas_tpu")


def check(compiled) -> None:
    program = compiled.as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 1
    assert compiled.memory_analysis().temp_size_in_bytes <= TEMPORARY
    entry = program[program.index("ENTRY") :]
    copies = re.findall(r"= (?:u8|s8|f4e2m1fn)\[.*", re.sub(r".* parameter\(.*", "", entry))
    assert not copies, copies


# 16 rows take the most memory, and so on every chip; one row, once in each layout.
@pytest.mark.parametrize(
    ("chip", "layout", "rows"),
    [
        ("v5e", "columns", 1),
        ("v5e", "columns", 16),
        ("v5p", "columns", 16),
        ("v6e", "columns", 16),
        ("tpu7x", "columns", 16),
        ("v5p", "int8", 1),
        ("v5p", "int8", 16),
        ("v6e", "int8", 16),
        ("tpu7x", "fp4", 1),
        ("tpu7x", "fp4", 16),
    ],
)
def test_one_kernel_reads_the_experts_where_they_are(compile_for, chip, layout, rows):
    layers, num_experts = MODELS["20b"]
    check(compile_for(chip, lambda a: run(dict(a)), arguments(rows, layers, num_experts, layout)))


@pytest.mark.parametrize("rows", [4, 16])
def test_the_large_model_too(compile_for, rows):
    shapes = arguments(rows, *MODELS["120b"], "columns")
    check(compile_for("v5p", lambda a: run(dict(a)), shapes))
