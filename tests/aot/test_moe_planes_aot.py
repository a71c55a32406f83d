"""What an H200's compiler makes of the experts in planes: no copy of the codes, little memory."""

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
# What a row takes, in bytes: the hidden units and their activations, in float32, and change.
BYTES_A_ROW = 4 * ACTIVE * (2 * F + F) + 4096


def arguments(rows: int, layers: int, num_experts: int, stacked: bool) -> dict:
    """Return the shapes of one layer's arguments; `stacked` takes the layer of all of them."""
    lead = (layers, num_experts) if stacked else (num_experts,)

    def shape(*axes: int, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(axes, dtype)

    def planes(*axes: int) -> Relaid:
        columns = axes[-1]
        blocks = shape(*lead, *axes[:-1], columns // 32, 16, dtype=jnp.uint8)
        packed = MXFP4(blocks, shape(*lead, *axes[:-1], columns // 32, dtype=jnp.uint8))
        change = functools.partial(layouts.relayout, layout="planes", row_axes=len(axes) - 1)
        return jax.eval_shape(change, packed)

    return {
        "x": shape(rows, D),
        "expert_ids": shape(rows, ACTIVE, dtype=jnp.int32),
        "expert_weights": shape(rows, ACTIVE, dtype=jnp.float32),
        "gate_up_weight": planes(2, F, D),
        "gate_up_bias": shape(*lead, 2, F),
        "down_weight": planes(D, F),
        "down_bias": shape(*lead, D),
        "layer": shape(dtype=jnp.int32),
    }


def run(arguments: dict, stacked: bool) -> jax.Array:
    layer = arguments.pop("layer")
    if stacked:
        for key in ("gate_up_weight", "gate_up_bias", "down_weight", "down_bias"):
            arguments[key] = LayerOf(arguments[key], layer)
    rows = [arguments.pop(key) for key in ("x", "expert_ids", "expert_weights")]
    return experts(*rows, **arguments, limit=7.0, implementation="planes")


# Each two of a model, a number of rows and a form occur together.
@pytest.mark.parametrize(
    ("model", "rows", "stacked"),
    [
        ("20b", 1, False),
        ("20b", 4, True),
        ("20b", 16, False),
        ("120b", 1, True),
        ("120b", 4, False),
        ("120b", 16, True),
    ],
)
def test_the_codes_are_read_where_they_are(compile_for, model, rows, stacked):
    shapes = arguments(rows, *MODELS[model], stacked)
    compiled = compile_for("h200", lambda a: run(dict(a), stacked), shapes)
    assert compiled.memory_analysis().temp_size_in_bytes <= rows * BYTES_A_ROW
    # Bytes are read within fusions: none are left lying between them.
    program = compiled.as_text()
    entry = re.sub(r".* parameter\(.*", "", program[program.index("ENTRY %") :])
    made = re.findall(r".*= \(?.*u8\[.*\]\S* (?:copy|fusion|dynamic-slice|gather)\(.*", entry)
    assert not made, made
    assert len(re.findall(r" fusion\(", entry)) <= 8
