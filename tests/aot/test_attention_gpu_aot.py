"""The Hopper kernels of attention compile at the models' shapes: registers and memory."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.attention import attention

N, K = 64, 8  # 20b and 120b


@pytest.fixture
def spills(tmp_path, monkeypatch):
    """Return a function -> bytes spilled, by the name of each kernel compiled until then."""
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))

    def read() -> dict[str, int]:
        found = {}
        for file in tmp_path.glob("*.ptxas"):
            name = re.sub(r"_\d+\.ptxas$", "", file.name)
            stores = re.findall(r"(\d+) bytes spill stores,", file.read_text())
            found[name] = max(map(int, stores))
        return found

    return read


def shapes(T: int, H: int):
    q, k = (jax.ShapeDtypeStruct((1, T, n, H), jnp.bfloat16) for n in (N, K))
    ids = jax.ShapeDtypeStruct((1, T), jnp.int32)
    return q, k, k, jax.ShapeDtypeStruct((N,), jnp.bfloat16), ids, ids


def forward(window):
    def op(q, k, v, sinks, segments, positions):
        return attention(
            q, k, v, sinks=sinks, window=window, segment_ids=segments, positions=positions,
            implementation="pallas_gpu",
        )  # fmt: skip

    return op


def backward(window):
    def op(q, k, v, sinks, segments, positions, d_out):
        def run(q, k, v, sinks):
            return forward(window)(q, k, v, sinks, segments, positions)

        out, pull = jax.vjp(run, q, k, v, sinks)
        return out, pull(d_out)

    return op


# Lengths and windows cross over: the backward pass compiles the forward kernel, too.
@pytest.mark.parametrize(("T", "window"), [(8192, None), (131072, 128)])
def test_forward(compile_for, spills, T, window):
    compiled = compile_for("h200", forward(window), *shapes(T, 64))
    assert spills() == {"attention_forward": 0}
    # The log-sum-exp, and ranges of keys a row.
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * T * (4 * N + 32)


@pytest.mark.parametrize(("T", "window"), [(8192, 128), (131072, None)])
def test_backward(compile_for, spills, T, window):
    compiled = compile_for("h200", backward(window), *shapes(T, 64), shapes(T, 64)[0])
    kernels = ("attention_forward", "attention_backward_queries", "attention_backward_keys")
    assert spills() == dict.fromkeys(kernels, 0)
    # The cotangent with padding cleared, and two float32 sums a row and head.
    assert compiled.memory_analysis().temp_size_in_bytes <= 1.1 * T * N * (2 * 64 + 8)


@pytest.mark.parametrize("window", [128, None])
def test_head_dim_128(compile_for, spills, window):
    compile_for("h200", backward(window), *shapes(4096, 128), shapes(4096, 128)[0])
    assert len(spills()) == 3
    assert set(spills().values()) == {0}
