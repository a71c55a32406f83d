"""Every form of attention against the reference: values and all gradients."""

from __future__ import annotations

import functools
import itertools

import attention_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import name, part_slow

from gptoss_jax.ops.attention import attention, xla


def make(length: int, heads: tuple[int, int], H: int, segments: str):
    """Return q, k, v, sinks, segment ids and positions of two rows."""
    N, K = heads
    rng = np.random.default_rng(length * 31 + H)

    def normal(*shape, scale=1):
        return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)

    q = normal(2, length, N, H, scale=2)
    k, v = (normal(2, length, K, H) for _ in range(2))
    ids = np.ones((2, length), np.int32)
    if segments != "one" and length > 2:
        ids[0, length // 3 :] = 2
        ids[1, length // 2 :] = 3
    if segments == "padded":
        ids[:, -max(1, length // 5) :] = 0
    starts = np.r_["1", np.ones((2, 1), bool), ids[:, 1:] != ids[:, :-1]]
    index = np.broadcast_to(np.arange(length), ids.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    return q, k, v, normal(N), jnp.asarray(ids), jnp.asarray(positions, jnp.int32)


def results(args, window, sinks, implementation):
    q, k, v, sink, segments, positions = args
    weight = jnp.asarray(np.random.default_rng(1).normal(size=q.shape), jnp.float32)

    def loss(q, k, v, sink):
        out = attention(
            q, k, v, sinks=sink if sinks else None, window=window,
            segment_ids=segments, positions=positions, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(out * weight), out

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))
    gradients, out = grad(q, k, v, sink)
    return dict(zip(("out", "dq", "dk", "dv", "dsink"), (out, *gradients), strict=True))


def assert_equal(ours, theirs, tolerance=1e-5):
    for key in theirs:
        got, expected = np.asarray(ours[key]), np.asarray(theirs[key])
        largest, apart = max(np.abs(expected).max(), 1e-3), np.abs(got - expected).max()
        assert apart <= tolerance * largest, f"{key}: {apart / largest:.1e}"


@pytest.mark.parametrize("case", part_slow(cases.COVERING, every=4))
def test_matches_the_reference(case):
    args = cases.inputs(case)
    want = cases.expected(args, case["window"])
    if case["sinks"] and case["length"] > 1:
        assert np.abs(want["sinks"]).max() > 0
    cases.assert_close(cases.results(args, case["window"], "xla"), want)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", cases.EVERY, ids=name)
def test_every_case_matches_the_reference(case):
    args = cases.inputs(case)
    want = cases.expected(args, case["window"])
    cases.assert_close(cases.results(args, case["window"], "xla"), want)


@pytest.mark.parametrize("window", [None, 70])
def test_blocks_of_queries_match_the_reference(monkeypatch, window):
    """With room for few logits at once every blocked path runs, its last block a partial one."""
    args = make(130, (6, 2), 8, "packed")
    theirs = results(args, window, True, "reference")
    monkeypatch.setattr(xla, "MAX_LOGITS", 2 * 6 * 130 * 7)
    assert_equal(results(args, window, True, None), theirs)


def test_the_reference_is_the_formula():
    """Row by row in float64: softmax over visible logits and the sink, the sink dropped."""
    arrays = make(20, (4, 2), 6, "padded")
    for window in (None, 4):
        q, k, v, sink, segments, positions = arrays
        out = attention(
            q, k, v, sinks=sink, window=window, segment_ids=segments, positions=positions,
            implementation="reference",
        )  # fmt: skip
        q, k, v, sink, segments, positions = map(np.asarray, arrays)
        for b, i, n in itertools.product(range(2), range(20), range(4)):
            seen = [
                j
                for j in range(20)
                if segments[b, i] == segments[b, j] != 0
                and 0 <= positions[b, i] - positions[b, j] < (window or 99)
            ]
            logits = [float(q[b, i, n] @ k[b, j, n // 2]) / 6**0.5 for j in seen]
            weights = np.exp(np.array([*logits, float(sink[n])], np.float64))
            weights = weights[:-1] / weights.sum()
            expected = sum(
                w * np.asarray(v[b, j, n // 2]) for w, j in zip(weights, seen, strict=True)
            )
            np.testing.assert_allclose(out[b, i, n], expected, atol=2e-6)


def test_keys_of_a_cache_may_stand_in_any_order():
    q, k, v, sink, segments, positions = make(30, (6, 2), 8, "one")
    order = np.random.default_rng(0).permutation(30)
    for window in (None, 9):
        straight = attention(
            q, k, v, sinks=sink, window=window, segment_ids=segments, positions=positions
        )
        shuffled = attention(
            q[:, -3:], k[:, order], v[:, order], sinks=sink, window=window,
            segment_ids=segments[:, -3:], positions=positions[:, -3:],
            kv_segment_ids=segments[:, order], kv_positions=positions[:, order],
        )  # fmt: skip
        np.testing.assert_allclose(shuffled, straight[:, -3:], atol=1e-6)


def test_padding_gives_finite_zeros_and_no_gradient():
    q, k, v, sink, segments, positions = make(40, (6, 2), 8, "padded")
    pad = np.asarray(segments) == 0
    for window, sinks in itertools.product((None, 16), (sink, None)):
        where = {"window": window, "segment_ids": segments, "positions": positions}
        attend = jax.jit(functools.partial(attention, q, k, sinks=sinks, **where))
        assert not np.asarray(attend(v))[pad].any()
        squares = jax.grad(lambda v, attend=attend: jnp.sum(jnp.square(attend(v))))
        gradient = np.asarray(jax.jit(squares)(v))
        assert np.isfinite(gradient).all() and not gradient[pad].any()


def temporaries(length: int, window: int | None) -> int:
    """Return the compiler's figure for one forward and backward pass, in bytes."""
    shape = jax.ShapeDtypeStruct((1, length, 4, 16), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def loss(q, k, v, ids, positions):
        return attention(
            q, k, v, sinks=jnp.zeros(4), window=window, segment_ids=ids, positions=positions
        ).sum()

    grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    compiled = grad.lower(shape, shape, shape, ids, ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def test_a_banded_layer_costs_its_window():
    """FLOPs and memory rise with T and not with T squared."""
    assert temporaries(8192, 64) < 2.5 * temporaries(4096, 64)
    assert temporaries(8192, 64) * 4 < temporaries(8192, None)


def test_one_of_two_cache_arguments_is_refused():
    q, k, v, sink, segments, positions = make(5, (2, 1), 8, "one")
    with pytest.raises(ValueError, match="together"):
        attention(
            q, k, v, sinks=sink, window=None, segment_ids=segments, positions=positions,
            kv_positions=positions,
        )  # fmt: skip
