"""Attention to a cache, every form against the reference: split over keys, and Hopper's kernel."""

from __future__ import annotations

from typing import Any

import covering
import decode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import chips
from gptoss_jax.ops.attention import pallas_gpu_decode, split
from gptoss_jax.ops.attention.sink_algebra import apply_sinks

needs_mosaic = pytest.mark.skipif(
    jax.__version_info__ < chips.MOSAIC_GPU, reason="the kernel needs jax 0.11.2"
)


@pytest.mark.parametrize("case", cases.COVERING, ids=covering.name)
def test_the_plain_form_matches_the_reference(case):
    args, window = cases.inputs(case), case["cache"][1]
    cases.assert_close(cases.result(args, window, "xla"), cases.expected(args, window))


SPLIT = covering.pairwise(**cases.AXES, widened=[False, True])


@pytest.mark.parametrize("case", covering.part_slow(SPLIT, every=3))
def test_shards_match_the_reference(case, monkeypatch):
    """With small shards even short caches are cut, and rows see none of some shard's keys."""
    monkeypatch.setattr(split, "SHARD", 40)
    monkeypatch.setattr(split, "LARGE", 0 if case["widened"] else 1 << 60)
    args, window = cases.inputs(case), case["cache"][1]
    cases.assert_close(cases.result(args, window, "split"), cases.expected(args, window))


def test_bfloat16_shards_match_the_reference():
    case = {"T": 4, "cache": (1024, None), "heads": (8, 1), "H": 64, "sinks": True}
    args = cases.inputs(case, jnp.bfloat16)
    assert split.shards(1024) == 2
    out = cases.result(args, None, "split")
    assert out.dtype == jnp.bfloat16
    cases.assert_close(out, cases.expected(args, None), dtype=jnp.bfloat16)


def test_blocks_of_queries_match_the_reference(monkeypatch):
    """With room for the logits of few queries at once, the last block is a partial one."""
    case = {"T": 7, "cache": (300, None), "heads": (6, 3), "H": 64, "sinks": True}
    args = cases.inputs(case)
    monkeypatch.setattr(split, "MAX_LOGITS", 4 * 6 * 300 * 3)
    cases.assert_close(cases.result(args, None, "split"), cases.expected(args, None))


def test_a_cache_is_cut_into_equal_shards():
    assert split.shards(128) == 1
    assert split.shards(split.SHARD * 4) == 4
    assert split.shards(131072) == split.MAX_SHARDS
    assert split.shards(1021 * 3) == 3
    assert split.shards(7919) == 1  # a prime


@pytest.mark.parametrize("first", [1, 70, 298])
def test_parts_merge_in_any_grouping(first):
    """Two unequal parts, each with its own logsumexp, then the sinks: what ring attention does."""
    case = {"T": 4, "cache": (300, None), "heads": (6, 3), "H": 64, "sinks": True}
    q, k, v, sinks, segments, positions = args = cases.inputs(case)

    def part(keys):
        return split.partial_attention(
            q, k[:, keys], v[:, keys], window=None,
            segments=(segments[0], segments[1][:, keys]),
            positions=(positions[0], positions[1][:, keys]),
        )  # fmt: skip

    a, b, c = part(slice(0, first)), part(slice(first, 299)), part(slice(299, 300))
    assert bool((a[1][3] == -jnp.inf).all())  # row 3 is padding
    assert bool((c[1][1] == -jnp.inf).all())  # row 1 has filled a third of its slots
    want = cases.expected(args, None)
    together = split.merge(*(jnp.stack(x) for x in zip(a, b, c, strict=True)))
    cases.assert_close(apply_sinks(*together, sinks), want)
    left = split.merge(*(jnp.stack(x) for x in zip(a, b, strict=True)))
    in_turn = split.merge(*(jnp.stack(x) for x in zip(left, c, strict=True)))
    cases.assert_close(apply_sinks(*in_turn, sinks), want)
    np.testing.assert_allclose(in_turn[1], together[1], rtol=1e-5)


def test_the_split_form_is_differentiable():
    """Ring attention trains through it: no NaN where a shard or a row sees nothing."""
    case = {"T": 4, "cache": (300, None), "heads": (6, 3), "H": 64, "sinks": True}
    args = cases.inputs(case)

    def loss(attend, q, k, v, sinks):
        return jnp.sum(jnp.square(attend((q, k, v, sinks, *args[4:]), None)))

    found, want = (
        jax.grad(lambda *a, attend=attend: loss(attend, *a), argnums=(0, 1, 2, 3))(*args[:4])
        for attend in (lambda a, w: cases.result(a, w, "split"), cases.expected)
    )
    for a, b in zip(found, want, strict=True):
        assert float(jnp.abs(a - b).max()) <= 1e-5 * float(jnp.abs(b).max())


def test_shards_take_no_copy_of_a_large_cache():
    """Temporary memory is less than either of the cache's two arrays."""
    q = jax.ShapeDtypeStruct((1, 1, 64, 64), jnp.bfloat16)
    cache = jax.ShapeDtypeStruct((1, 32768, 8, 64), jnp.bfloat16)
    ids = [jax.ShapeDtypeStruct((1, length), jnp.int32) for length in (1, 32768)]

    def attend(q, k, v, segments, positions):
        return split.cached_attention(
            q, k, v, None, window=None, segments=segments, positions=positions
        )

    jitted: Any = jax.jit(attend)
    compiled = jitted.lower(q, cache, cache, tuple(ids), tuple(ids)).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < cache.size * 2


def on_hopper(args, window):
    with chips.assume("h200", interpret=True):
        return cases.result(args, window, "pallas_gpu")


def refusal(args, window):
    q, k, v, sinks, segments, positions = args
    return pallas_gpu_decode.refuse(
        q, k, v, sinks, window=window, segments=segments, positions=positions
    )


# The interpreter takes 5 s a case: each of the kernel's own choices, in few of them.
HOPPER = [case for case in cases.COVERING if case["cache"][0] % pallas_gpu_decode.GRANULE == 0]


@needs_mosaic
@pytest.mark.parametrize("case", HOPPER[::3], ids=covering.name)
def test_the_hopper_kernel_matches_the_reference(case, monkeypatch):
    """With few programs a chip each streams several blocks, more than are in flight at once."""
    blocks = pallas_gpu_decode.BLOCKS["h200"]._replace(programs=32)
    monkeypatch.setitem(pallas_gpu_decode.BLOCKS, "h200", blocks)
    args, window = cases.inputs(case, jnp.bfloat16), case["cache"][1]
    got = on_hopper(args, window)
    cases.assert_close(got, cases.expected(args, window), dtype=jnp.bfloat16)


@needs_mosaic
@pytest.mark.exhaustive
@pytest.mark.parametrize("programs", [4, 32, 264])
@pytest.mark.parametrize("case", HOPPER, ids=covering.name)
def test_the_hopper_kernel_matches_the_reference_everywhere(case, programs, monkeypatch):
    blocks = pallas_gpu_decode.BLOCKS["h200"]._replace(programs=programs)
    monkeypatch.setitem(pallas_gpu_decode.BLOCKS, "h200", blocks)
    args, window = cases.inputs(case, jnp.bfloat16), case["cache"][1]
    got = on_hopper(args, window)
    cases.assert_close(got, cases.expected(args, window), dtype=jnp.bfloat16)


@needs_mosaic
def test_blocks_that_no_query_sees_are_not_read(monkeypatch):
    """NaN in the slots outside the window, whole blocks of them, reaches nothing."""
    blocks = pallas_gpu_decode.BLOCKS["h200"]._replace(programs=4)
    monkeypatch.setitem(pallas_gpu_decode.BLOCKS, "h200", blocks)
    case = {"T": 1, "cache": (512, None), "heads": (8, 1), "H": 64, "sinks": True}
    q, k, v, sinks, segments, positions = cases.inputs(case, jnp.bfloat16)
    row = (slice(1, 2),)  # it fills slots 0 to 169 of 512
    q, k, v, *ids = (x[row] for x in (q, k, v, *segments, *positions))
    whole = (q, k, v, sinks, tuple(ids[:2]), tuple(ids[2:]))
    poisoned = (q, *(x.at[:, 192:].set(jnp.nan) for x in (k, v)), *whole[3:])
    got = on_hopper(poisoned, None)
    cases.assert_close(got, cases.expected(whole, None), dtype=jnp.bfloat16)


@needs_mosaic
def test_the_hopper_kernel_has_the_gradient_of_the_plain_form():
    case = {"T": 1, "cache": (128, 128), "heads": (4, 2), "H": 64, "sinks": True}
    args = cases.inputs(case, jnp.bfloat16)

    def gradients(implementation):
        def loss(q, k, v, sinks):
            out = cases.result((q, k, v, sinks, *args[4:]), 128, implementation)
            return jnp.sum(out.astype(jnp.float32))

        return jax.grad(loss, argnums=(0, 1, 2, 3))(*args[:4])

    with chips.assume("h200", interpret=True):
        got, want = gradients("pallas_gpu"), gradients("xla")
    for a, b in zip(got, want, strict=True):
        assert float(jnp.abs(b).max()) > 0
        np.testing.assert_array_equal(a, b)


def test_the_hopper_kernel_says_what_it_refuses():
    def reason(dtype=jnp.bfloat16, chip="h200", **changes):
        case = {"T": 1, "cache": (128, 128), "heads": (8, 1), "H": 64, "sinks": True, **changes}
        with chips.assume(chip):
            return refusal(cases.inputs(case, dtype), case["cache"][1])

    assert "this is a v5e" in str(reason(chip="v5e"))
    if jax.__version_info__ < chips.MOSAIC_GPU:
        assert "0.11.2" in str(reason())
        return
    assert reason() is None
    assert "float32" in str(reason(jnp.float32))
    assert "up to 8 queries" in str(reason(T=9))
    assert "72" in str(reason(heads=(72, 1), cache=(128, None)))
    assert "head_dim 72" in str(reason(H=72))
    assert "300 slots" in str(reason(cache=(300, None)))
    assert "40 slots" in str(reason(cache=(40, None)))
