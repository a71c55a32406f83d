"""cuDNN's attention compiled for an H200: which calls are made, and with how much memory.

Their workspace is not in these figures: XLA asks cuDNN for it where there is a GPU.
"""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest

from gptoss_jax.ops.attention import attention

# B, T, (N, K), H, window, and the bound on temporary memory in MiB.
SHAPES = [
    (1, 131072, (64, 8), 64, 128, 4000),
    (1, 131072, (64, 8), 64, None, 4000),
    (2, 1000, (6, 3), 80, 200, 10),
]


def arrays(B, T, heads, H):
    N, K = heads
    q, k = (jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K))
    ids = jax.ShapeDtypeStruct((B, T), jnp.int32)
    return q, k, k, jax.ShapeDtypeStruct((N,), jnp.float32), ids


def attend(window):
    def attend(q, k, v, sinks, ids):
        return attention(
            q, k, v, sinks=sinks, window=window, segment_ids=ids, positions=ids,
            implementation="cudnn",
        )  # fmt: skip

    return attend


def gradient(window):
    def loss(q, k, v, sinks, ids):
        return jnp.sum(attend(window)(q, k, v, sinks, ids).astype(jnp.float32))

    return jax.grad(loss, argnums=(0, 1, 2, 3))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_are_cudnns(compile_for, shape):
    B, T, heads, H, window, megabytes = shape
    made = compile_for("h200", gradient(window), *arrays(B, T, heads, H))
    text = made.as_text()
    targets = re.findall(r'custom_call_target="(__cudnn[^"]*)"', text)
    assert sorted(targets) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    assert re.findall(r'"sliding_window_length": ?(\d+)', text) == [str(window or 0)] * 2
    assert re.findall(r'"mask_type": ?"(\w+)"', text) == ["PADDING_CAUSAL"] * 2
    assert made.memory_analysis().temp_size_in_bytes < megabytes << 20


def test_prefill_is_one_call(compile_for):
    made = compile_for("h200", attend(128), *arrays(1, 8192, (64, 8), 64))
    assert re.findall(r'custom_call_target="(__cudnn[^"]*)"', made.as_text()) == [
        "__cudnn$fmhaSoftmax"
    ]
    assert made.memory_analysis().temp_size_in_bytes < 170 << 20
