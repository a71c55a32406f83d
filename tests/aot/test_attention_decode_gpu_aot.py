"""Decode attention compiled for an H200 at the models' own shapes: no spills, no cache copied."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.attention import attention

# B, T, S, window of 20b and 120b, which have N = 64, K = 8, H = 64: the ring, short and long rows.
SHAPES = [
    (1, 1, 128, 128),
    (32, 1, 128, 128),
    (1, 4, 136, 128),
    (1, 1, 131072, None),
    (8, 1, 32768, None),
    (8, 4, 32768, None),
]


def shapes(B, T, S, *, heads=(64, 8), H=64):
    N, K = heads

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    ids = tuple(array(B, length, dtype=jnp.int32) for length in (T, S))
    cache = array(B, S, K, H)
    return array(B, T, N, H), cache, cache, array(N, dtype=jnp.float32), ids, ids


def compiled(compile_for, implementation, arrays, window):
    def attend(q, k, v, sinks, segments, positions):
        return attention(
            q, k, v, sinks=sinks, window=window, segment_ids=segments[0], positions=positions[0],
            kv_segment_ids=segments[1], kv_positions=positions[1], implementation=implementation,
        )  # fmt: skip

    return compile_for("h200", attend, *arrays)


def copies_of(array, text):
    """Return the instructions of the main computation whose result is as large as `array`."""
    entry = text[text.index("ENTRY") :]
    found = re.findall(r"%(\S+) = \(?(\w+)\[([\d,]+)\]\S* (?!parameter|bitcast)\w", entry)
    sizes = {}
    for name, dtype, dims in found:
        count = 1
        for d in dims.split(","):
            count *= int(d)
        if count >= array.size and dtype in ("bf16", "f32"):
            sizes[name] = count
    return sizes


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernel_reads_the_cache_where_it_lies(compile_for, shape, tmp_path, monkeypatch):
    """Beside q, which is small, nothing but partial outputs is in temporary memory."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    B, T, S, window = shape
    arrays = shapes(B, T, S)
    made = compiled(compile_for, "pallas_gpu", arrays, window)
    text = made.as_text()
    assert "mosaic_gpu" in text
    if arrays[1].size > 1 << 22:
        assert not copies_of(arrays[1], text)
    assert made.memory_analysis().temp_size_in_bytes < 5 << 20
    assert_no_spills(tmp_path)


@pytest.mark.parametrize("heads", [(4, 4), (6, 3), (8, 1)], ids=str)
@pytest.mark.parametrize("H", [64, 80, 128])
def test_other_heads_compile_without_spills(compile_for, heads, H, tmp_path, monkeypatch):
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
    compiled(compile_for, "pallas_gpu", shapes(2, 4, 1000, heads=heads, H=H), 200)
    assert_no_spills(tmp_path)


def assert_no_spills(folder):
    reports = [path.read_text() for path in folder.glob("*.ptxas")]
    assert reports
    for report in reports:
        assert re.findall(r"(\d+) bytes spill", report) == ["0", "0"], report


@pytest.mark.parametrize(
    ("B", "T", "S", "megabytes"), [(1, 1, 131072, 60), (8, 4, 32768, 500)], ids=str
)
def test_the_split_form_copies_no_cache(compile_for, B, T, S, megabytes):
    """Its logits are in memory, [B, T, N, S] in float32 and in bf16; the cache is there once."""
    arrays = shapes(B, T, S)
    made = compiled(compile_for, "split", arrays, None)
    assert made.memory_analysis().temp_size_in_bytes < megabytes << 20
    if T == 1:
        assert not copies_of(arrays[1], made.as_text())
