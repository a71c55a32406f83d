"""Attention on TPU, in the interpreter: splash for whole rows, an own kernel for a cache."""

from __future__ import annotations

import functools
import itertools

import attention_cases
import decode_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from covering import name, pairwise, part_slow

from gptoss_jax import chips
from gptoss_jax.ops.attention import attention, pallas_tpu, pallas_tpu_decode, reference

# Few and short, of the shared axes: a grid step takes the interpreter tens of milliseconds.
FEW = [
    dict(zip(attention_cases.AXES, values, strict=True))
    for values in (
        (5, 128, (6, 3), 64, "packed", True),
        (5, None, (4, 4), 80, "padded", False),
        (128, 128, (4, 4), 64, "packed", True),
        (128, None, (8, 1), 64, "one", True),
        (130, 128, (6, 3), 80, "padded", True),
        (130, None, (4, 4), 64, "padded", True),
        (300, 128, (6, 3), 64, "packed", False),
        (300, 7, (4, 4), 64, "padded", True),
    )
]
# Every two values together, but of the lengths fewer: FEW has the others. Of the long rows one: 300
# has several blocks of keys, too, with each of the windows.
SHORT = pairwise(**attention_cases.AXES | {"length": [1, 127, 130, 300]})
SHORT += [c for c in attention_cases.COVERING if c["length"] == 1000 and c["window"] == 200]
DECODE_FEW = decode_cases.COVERING[:6]


def check_rows(case, dtype=jnp.float32):
    args = attention_cases.inputs(case, dtype)
    want = attention_cases.expected(args, case["window"])
    with chips.assume("v5e", interpret=True):
        got = attention_cases.results(args, case["window"], "pallas_tpu")
    attention_cases.assert_close(got, want, dtype=dtype)


def check_cache(case, dtype=jnp.float32):
    args, window = decode_cases.inputs(case, dtype), case["cache"][1]
    want = decode_cases.expected(args, window)
    with chips.assume("v5e", interpret=True):
        got = decode_cases.result(args, window, "pallas_tpu")
    decode_cases.assert_close(got, want, dtype=dtype)


@pytest.fixture
def small_blocks(monkeypatch):
    """Cut caches of 300 to 1,000 slots into blocks of 128, the last a partial one."""
    monkeypatch.setitem(pallas_tpu_decode.BLOCKS, "v5e", pallas_tpu_decode.Blocks(1, 1))


@pytest.mark.parametrize("case", part_slow(FEW, every=4))
def test_rows_match_the_reference(case):
    check_rows(case)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("case", SHORT, ids=name)
def test_rows_of_all_lengths_match_the_reference(case):
    check_rows(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", attention_cases.EVERY, ids=name)
def test_every_row_matches_the_reference(case):
    check_rows(case)


@pytest.mark.parametrize("case", part_slow([FEW[0], FEW[5]], every=2))
def test_rows_in_bfloat16(case):
    check_rows(case, jnp.bfloat16)


CASE = {"length": 130, "window": 128, "heads": (4, 2), "H": 64, "segments": "padded", "sinks": True}


def test_padding_gives_zeros_and_ignores_its_cotangent():
    q, k, v, sinks, segments, positions = attention_cases.inputs(CASE)
    padding = (segments == 0)[..., None, None]

    def attend(q, k, v, sinks):
        return attention(
            q, k, v, sinks=sinks, window=128, segment_ids=segments, positions=positions,
            implementation="pallas_tpu",
        )  # fmt: skip

    with chips.assume("v5e", interpret=True):
        out, back = jax.vjp(attend, q, k, v, sinks)
        with_nan = back(jnp.where(padding, jnp.nan, jnp.ones_like(out)))
    assert jnp.all(jnp.where(padding, out, 0) == 0)
    assert all(jnp.isfinite(gradient).all() for gradient in with_nan)
    for gradient in with_nan[:3]:
        assert jnp.all(jnp.where(padding, gradient, 0) == 0)


def test_rows_of_a_batch_are_mapped_over(monkeypatch):
    """On a chip splash runs under vmap, which JAX's interpreter with race detection can't do."""
    args = attention_cases.inputs({**CASE, "segments": "packed"})
    want = attention_cases.expected(args, 128)
    monkeypatch.setattr(chips, "tpu_interpreter", lambda: True)
    with chips.assume("v5e", interpret=True):
        got = attention_cases.results(args, 128, "pallas_tpu")
    attention_cases.assert_close(got, want)


def test_the_gradient_of_the_sinks_is_formed_in_float32(monkeypatch):
    """What splash in jax 0.10 and 0.11 makes, of bfloat16 products, is 3.3e-3 away here."""
    args = attention_cases.inputs(
        {**CASE, "length": 300, "segments": "one", "heads": (4, 4)}, jnp.bfloat16
    )
    want = attention_cases.expected(args, None)["sinks"]
    monkeypatch.setattr(chips, "tpu_interpreter", lambda: True)
    with chips.assume("v5e", interpret=True):
        got = attention_cases.results(args, None, "pallas_tpu")["sinks"]
    assert got.dtype == jnp.float32
    assert float(jnp.linalg.norm(got - want)) <= 2.5e-3 * float(jnp.linalg.norm(want))


@pytest.mark.parametrize("window", [None, 1, 7, 128, 300])
def test_a_block_of_the_band_is_known_without_laying_it_out(window):
    band = pallas_tpu.Band(512, window)
    index = np.arange(512)
    one, places = jnp.ones((1, 512), jnp.int32), jnp.asarray(index)[None]
    whole = np.asarray(reference.visible(one, one, places, places, window))[0]
    assert (band.mask_function(index[:, None], index[None]) == whole).all()
    for a, b in ((128, 128), (256, 128), (128, 512)):
        for i, j in itertools.product(range(0, 512, a), range(0, 512, b)):
            block = (slice(i, i + a), slice(j, j + b))
            assert band[block].any() == whole[block].any()
            assert band[block].all() == whole[block].all()


def test_blocks_divide_the_row_and_pad_it_little():
    with chips.assume("v5p"):
        for length, window in itertools.product((1, 127, 128, 129, 1000, 4096, 4097), (None, 128)):
            blocks, padded = pallas_tpu.fit(length, window, jnp.bfloat16)
            assert all(padded % size == 0 for size in blocks)
            assert length <= padded <= max(128, -(-length // 128) * 128 * 9 / 8)
        assert pallas_tpu.fit(4096, None, jnp.bfloat16)[0] == pallas_tpu.BLOCKS["v5p"]["full"]
        assert pallas_tpu.fit(4096, 128, jnp.bfloat16)[0] == pallas_tpu.BLOCKS["v5p"]["banded"]


@pytest.mark.parametrize("case", part_slow(DECODE_FEW, every=3))
def test_caches_match_the_reference(case, small_blocks):
    check_cache(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", decode_cases.COVERING[len(DECODE_FEW) :], ids=name)
def test_more_caches_match_the_reference(case, small_blocks):
    check_cache(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", decode_cases.EVERY, ids=name)
def test_every_cache_matches_the_reference(case, small_blocks):
    check_cache(case)


@pytest.mark.parametrize("case", [DECODE_FEW[0], DECODE_FEW[3]], ids=name)
def test_caches_in_bfloat16(case, small_blocks):
    check_cache(case, jnp.bfloat16)


LONG = {"T": 3, "cache": (1000, None), "heads": (4, 2), "H": 64, "sinks": True}


def test_a_cache_in_the_blocks_of_the_table():
    check_cache({**LONG, "cache": (3000, None)})


def test_blocks_that_no_query_sees_are_not_read(small_blocks):
    """Slots that nobody has written may hold NaN where their whole block is unseen."""
    q, k, v, sinks, (q_segments, k_segments), positions = decode_cases.inputs(LONG)
    unseen = (jnp.arange(1000) < 256) | (jnp.arange(1000) // 128 == 5)
    k_segments = jnp.where(unseen, 0, k_segments)
    args = (q, k, v, sinks, (q_segments, k_segments), positions)
    want = decode_cases.expected(args, None)
    k, v = (jnp.where(unseen[:, None, None], jnp.nan, x) for x in (k, v))
    with chips.assume("v5e", interpret=True):
        got = decode_cases.result((q, k, v, *args[3:]), None, "pallas_tpu")
    decode_cases.assert_close(got, want)


def test_the_gradient_through_a_cache_is_that_of_xla(small_blocks):
    q, k, v, sinks, segments, positions = decode_cases.inputs({**LONG, "cache": (300, None)})

    def loss(implementation, q, k, v, sinks):
        out = attention(
            q, k, v, sinks=sinks, window=None, segment_ids=segments[0], positions=positions[0],
            kv_segment_ids=segments[1], kv_positions=positions[1], implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.square(out))

    def gradients(implementation):
        grad = jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2, 3))
        return jax.jit(grad)(q, k, v, sinks)

    want = gradients("reference")
    with chips.assume("v5e", interpret=True):
        got = gradients("pallas_tpu")
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("length", "dtype", "races"),
    [(128, jnp.bfloat16, True), (384, jnp.float32, True), (300, jnp.bfloat16, False)],
)
def test_a_token_is_written_into_its_slot_alone(length, dtype, races, monkeypatch):
    """300: a last block in part, which jax 0.10's interpreter with race detection can't alias."""
    if not races:
        monkeypatch.setattr(chips, "tpu_interpreter", lambda: True)
    rng = np.random.default_rng(length)
    cache, new = (jnp.asarray(rng.normal(size=(4, n, 3, 16)), dtype) for n in (length, 1))
    slots = jnp.asarray([0, length - 1, length // 2, length])  # the last is out of range
    want = cache.at[jnp.arange(4), slots].set(new[:, 0], mode="drop")
    with chips.assume("v5e", interpret=True):
        got = jax.jit(pallas_tpu_decode.write)(cache, new, slots)
    assert got.dtype == dtype
    assert (got == want).all()


def test_blocks_of_a_cache_are_whole_lanes_and_small_enough():
    block_of, limits = pallas_tpu_decode.block_of, pallas_tpu_decode.BLOCKS["v5e"]
    with chips.assume("v5e"):
        assert block_of(132, rows=64, key=1024) == 132
        assert block_of(8192, rows=64, key=1024) == 1024
        assert block_of(8200, rows=64, key=1024) == 1024
        for length, rows, key in itertools.product((129, 1000, 131072), (1, 64, 512), (128, 32768)):
            block = block_of(length, rows=rows, key=key)
            assert block == length or block % 128 == 0
            assert block <= 128 or block * key <= limits.keys
            assert block <= 128 or 4 * block * rows <= limits.logits


def test_what_the_kernels_do_not_take_is_refused_with_the_reason():
    q, k, v, sinks, segments, positions = attention_cases.inputs({**CASE, "length": 9})
    narrow = k.astype(jnp.bfloat16)

    def rows(k, **where):
        return attention(
            q, k, v, sinks=sinks, window=None, segment_ids=segments, positions=positions,
            implementation="pallas_tpu", **where,
        )  # fmt: skip

    def cache(k, queries):
        where = {"segments": (segments, segments), "positions": (positions, positions)}
        return pallas_tpu_decode.refuse(q[:, :queries], k, v, sinks, window=None, **where)

    with pytest.raises(ValueError, match="this is a cpu"):
        rows(k)
    with pytest.raises(ValueError, match="this is a cpu"):
        rows(k, kv_segment_ids=segments, kv_positions=positions)
    with chips.assume("v5e"):
        with pytest.raises(ValueError, match="all three the same"):
            rows(narrow)
        with pytest.raises(ValueError, match="at most 8 queries"):
            rows(k, kv_segment_ids=segments, kv_positions=positions)
        assert "all three the same" in str(cache(narrow, 8))
        assert cache(k, 8) is None


def test_a_tpu_takes_them_unasked():
    q, k, v, sinks, segments, positions = attention_cases.inputs({**CASE, "length": 8})
    rows = functools.partial(
        attention, sinks=sinks, window=None, segment_ids=segments, positions=positions
    )
    cache = functools.partial(rows, kv_segment_ids=segments, kv_positions=positions)
    with chips.assume("v6e"):
        for attend in (rows, cache):
            assert "pallas_call" in str(jax.make_jaxpr(attend)(q, k, v))
