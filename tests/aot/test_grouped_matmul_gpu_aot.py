"""The Hopper kernels of grouped matmul, compiled for an H200 at the sizes of both models."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.grouped_matmul import grouped_matmul
from gptoss_jax.ops.mxfp4 import hopper
from gptoss_jax.types import MXFP4, LayerOf, Relaid

C = 2880
EXPERTS = {"20b": 32, "120b": 128}
SLACK = 1e6  # bytes: the items of work, a few integers each


@pytest.fixture
def compiled(compile_for, tmp_path, monkeypatch):
    """Return a function that compiles for an H200, and says how many kernels it found unspilt."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def run(function, *shapes):
        program = compile_for("h200", function, *shapes)
        reports = [path.read_text() for path in tmp_path.glob("*.ptxas")]
        for report in reports:
            assert "0 bytes spill stores, 0 bytes spill loads" in report
            # C7510: the compiler made the tensor cores wait for each product.
            assert "C7510" not in report
        return program, len(reports)

    return run


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def value_and_gradients(product, *args):
    out, vjp = jax.vjp(product, *args)
    return out, vjp(out)


# Each two of a model, a width and a number of rows occur together.
@pytest.mark.parametrize(
    ("model", "n", "rows"),
    [("20b", 5760, 16384), ("20b", 2880, 64), ("120b", 5760, 64), ("120b", 2880, 16384)],
)
def test_packed_forward_and_the_gradient_of_rows(compiled, model, n, rows):
    layers, experts = 2, EXPERTS[model]
    blocks = shape(layers, experts, n, C // 32, 16, dtype=jnp.uint8)
    scales = shape(layers, experts, n, C // 32, dtype=jnp.uint8)
    codes, scales = jax.eval_shape(hopper.pack, blocks, scales)

    def run(rows, codes, scales, layer, sizes):
        weight = LayerOf(Relaid(codes, scales, "hopper", (n,), C), layer)
        return value_and_gradients(
            lambda rows: grouped_matmul(rows, weight, sizes, implementation="pallas_gpu"), rows
        )

    int32 = jnp.int32
    program, kernels = compiled(
        run, shape(rows, C), codes, scales, shape(dtype=int32), shape(experts, dtype=int32)
    )
    assert kernels == 2
    assert program.memory_analysis().temp_size_in_bytes < SLACK
    # The codes are an argument of the program and of the kernels, and nothing else touches them.
    matrices = rf"u8\[(?:{layers},{experts}|{layers * experts}),"
    made = re.findall(rf"= {matrices}\S+ ([\w-]+)\(", program.as_text())
    assert set(made) <= {"parameter", "bitcast", "get-tuple-element"}


def test_unrolled_layers_in_the_checkpoints_order_are_relaid_one_at_a_time(compile_for):
    """In a loop of tokens, too: as a sampler has them that relays nothing."""
    layers, experts, rows = 5, EXPERTS["20b"], 64
    blocks = shape(layers, experts, C, C // 32, 16, dtype=jnp.uint8)
    scales = shape(layers, experts, C, C // 32, dtype=jnp.uint8)

    def run(rows, blocks, scales, sizes):
        def token(_, rows):
            for i in range(layers):
                weight = LayerOf(MXFP4(blocks, scales), jnp.int32(i))
                rows = grouped_matmul(rows, weight, sizes, implementation="pallas_gpu")
            return rows

        return jax.lax.fori_loop(0, 7, token, rows)

    args = shape(rows, C), blocks, scales, shape(experts, dtype=jnp.int32)
    program = compile_for("h200", run, *args)
    one = experts * C * (C // 2 + C // 32)
    assert program.memory_analysis().temp_size_in_bytes < 2 * one


@pytest.mark.parametrize(("model", "n"), [("20b", 5760), ("20b", 2880), ("120b", 5760)])
def test_dense_with_all_gradients(compiled, model, n):
    experts, rows = EXPERTS[model], 16384

    def run(rows, weight, sizes):
        return value_and_gradients(
            lambda r, w: grouped_matmul(r, w, sizes, implementation="pallas_gpu"), rows, weight
        )

    program, kernels = compiled(
        run, shape(rows, C), shape(experts, n, C), shape(experts, dtype=jnp.int32)
    )
    assert kernels == 3
    assert program.memory_analysis().temp_size_in_bytes < SLACK


def test_axes_that_no_wide_tile_fills(compiled):
    def run(rows, weight, sizes):
        return value_and_gradients(
            lambda r, w: grouped_matmul(r, w, sizes, implementation="pallas_gpu"), rows, weight
        )

    _, kernels = compiled(run, shape(130, 160), shape(5, 96, 160), shape(5, dtype=jnp.int32))
    assert kernels == 3
