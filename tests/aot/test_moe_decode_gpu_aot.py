"""The Hopper kernel for a decode batch's experts, compiled for an H200 at the models' sizes."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.moe import pallas_gpu_decode
from gptoss_jax.types import LayerOf, Relaid

D = F = 2880
A = 4
INSTRUCTIONS = 4.1  # a weight: what an H200 has time for at its full bandwidth


def packed(layers, experts, rows, columns):
    count = 1
    for n in rows:
        count *= n
    codes = jax.ShapeDtypeStruct((layers, experts, count, columns // 2), jnp.uint8)
    scales = jax.ShapeDtypeStruct((layers, experts, columns // 32, count), jnp.uint8)
    return Relaid(codes, scales, "hopper", rows, columns)


def run(x, ids, shares, gate_up, gate_up_bias, down, down_bias, layer):
    weights = {
        "gate_up_weight": LayerOf(gate_up, layer),
        "gate_up_bias": LayerOf(gate_up_bias, layer),
        "down_weight": LayerOf(down, layer),
        "down_bias": LayerOf(down_bias, layer),
    }
    assert pallas_gpu_decode.refuse(x, ids, shares, **weights) is None
    return pallas_gpu_decode.experts(x, ids, shares, **weights, limit=7.0, mask=None)


def shapes(layers, experts, rows):
    def s(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    return (
        s(rows, D),
        s(rows, A, dtype=jnp.int32),
        s(rows, A, dtype=jnp.float32),
        packed(layers, experts, (2, F), D),
        s(layers, experts, 2, F),
        packed(layers, experts, (D,), F),
        s(layers, experts, D),
        s(dtype=jnp.int32),
    )


def loop(ptx):
    """Return the instructions of the block that multiplies."""
    blocks = re.split(r"^\$L__\w+:|^\t@\S+ bra ", ptx, flags=re.MULTILINE)
    body = next(block for block in blocks if "mma.sync" in block)
    return re.findall(r"^\s+(?:@\S+ )?([a-z][\w.:]*)[^;]*;", body, flags=re.MULTILINE)


@pytest.mark.parametrize(("layers", "experts"), [(24, 32), (36, 128)])
@pytest.mark.parametrize("rows", [1, 4, 16])
def test_no_spills_no_copies_few_instructions(
    compile_for, monkeypatch, tmp_path, layers, experts, rows
):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    compiled = compile_for("h200", run, *shapes(layers, experts, rows))
    # fp16 rows for both products, and the second's sums for each group, of which there are few.
    groups = min(rows * A, (rows * A + 7 * experts) // 8) if rows > 4 else rows * A
    assert compiled.memory_analysis().temp_size_in_bytes < groups * 8 * D * (2 + 2 + 3 * 4) * 1.2
    assert not re.search(r"= u8\[[^=]* (copy|fusion|gather|dynamic-slice)\(", compiled.as_text())
    kernels = sorted(tmp_path.glob("*.ptxas"))
    assert len(kernels) == 2
    for kernel in kernels:
        report = kernel.read_text()
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in report
        # Two blocks of 128 threads a multiprocessor at least: 65536 registers, 227 KiB.
        registers = int(re.search(r"Used (\d+) registers", report)[1])
        resources = kernel.with_suffix(".resources.txt").read_text()
        memory = int(re.search(r"smem_scratch_bytes=(\d+)", resources)[1])
        assert registers <= 96 and memory <= 113 * 1024
        found = loop(kernel.with_suffix(".ptx").read_text())
        weights = found.count("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32") * 16 * 16 / 32
        print(kernel.stem, registers, memory, len(found) / weights)
        assert len(found) / weights < INSTRUCTIONS
