"""The ring's parts by splash, in the interpreter, against those in plain XLA."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import assert_close, expected, inputs, spread

from gptoss_jax import chips
from gptoss_jax.parallel import blocks, ring, ring_tpu
from gptoss_jax.parallel.blocks import Places

N, K, H = 4, 2, 24


def row(length: int, edges: tuple[int, ...], first: int = 1) -> np.ndarray:
    """Return segment ids from `first`, the next from each edge on."""
    return first + np.searchsorted(np.asarray(edges), np.arange(length), side="right")


def segments(T: int, own: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return segment ids of queries and keys.

    Own keys: two segments and padding. Keys that come before: the queries' first segment is the
    keys' last; the keys' first and the queries' last two see nothing; there is padding in both.
    """
    if own:
        return (np.r_[row(T - 10, (T // 3,)), np.zeros(10, int)],) * 2
    queries = np.r_[row(T - 20, (T // 5, T // 2), 2), np.zeros(20, int)]
    return queries, np.r_[0, 0, 0, row(T - 3, (2 * T // 5,))]


# 300 tokens are three blocks, of queries and of keys.
@pytest.fixture(
    params=[(True, 100), (False, 100)]
    + [pytest.param((own, 300), marks=pytest.mark.slow) for own in (True, False)],
    ids=lambda param: f"{'own' if param[0] else 'before'}-{param[1]}",
)
def parts(request):
    own, T = request.param
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    q, d_out, k, v = (normal(1, T, n, H) for n in (N, N, K, K))
    at = (0, 0) if own else (1000, 0)
    index = [jnp.asarray(start + np.arange(T), jnp.int32)[None] for start in at]
    queries, keys = (
        Places(jnp.asarray(ids, jnp.int32)[None], i)
        for ids, i in zip(segments(T, own), index, strict=True)
    )
    where: dict[str, Any] = {"window": None, "queries": queries, "keys": keys, "own": own}
    return (2 * q, k, v), d_out, where


def close(got: Any, want: Any) -> None:
    got, want = np.asarray(got), np.asarray(want)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_forward(parts):
    arrays, _, where = parts
    want, want_lse = blocks.forward(*arrays, **where)
    real = np.asarray(where["queries"].segment_ids != 0)
    with chips.assume("v5e", interpret=True):
        got, lse = jax.jit(lambda *arrays: ring_tpu.forward(*arrays, **where))(*arrays)
    close(got, want)
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    assert np.isneginf(lse)[~real].all()
    seen = np.isfinite(want_lse)
    close(np.asarray(lse)[seen], np.asarray(want_lse)[seen])


def test_backward(parts):
    arrays, d_out, where = parts
    out, lse = blocks.forward(*arrays, **where)
    blind = jnp.isneginf(lse)
    # As from a softmax over more keys, and what `sink_algebra` makes of a row that sees nothing.
    out, lse = out * 0.7, jnp.where(blind, 1e5, lse + 0.4)
    d_out = jnp.where(blind[..., None], 0, d_out)
    want = blocks.backward(*arrays, d_out, out=out, lse=lse, **where)

    def run(*arrays):
        return ring_tpu.backward(*arrays, d_out, out=out, lse=lse, **where)

    with chips.assume("v5e", interpret=True):
        got = jax.jit(run)(*arrays)
    for a, b in zip(got, want, strict=True):
        close(a, b)


def test_a_window_is_refused_and_the_blocks_taken():
    q, k = jnp.zeros((1, 8, N, H)), jnp.zeros((1, 8, K, H))
    with chips.assume("v5p", interpret=True):
        assert ring._parts(q, k, k, None) is ring_tpu
        assert ring._parts(q, k, k, 5) is blocks
        assert ring._parts(q.astype(jnp.float16), k, k, None) is blocks
    assert ring._parts(q, k, k, None) is blocks


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 9])
def test_attention_over_two_shards(window, capsys):
    """The ring, and the halos: splash inside a `shard_map`, on several devices."""
    args = inputs(1, 60, "padded")
    want = expected(args, window)
    with chips.assume("v5e", interpret=True):
        assert_close(spread(args, window, {"context": 2}), want)
    assert "RACE DETECTED" not in "".join(capsys.readouterr())
