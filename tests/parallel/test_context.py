"""Attention over the mesh against the reference on one device: values and every gradient."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from context_cases import (
    H,
    K,
    N,
    assert_close,
    expected,
    inputs,
    on,
    over_mesh,
    places,
    spread,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gptoss_jax.config import MeshConfig
from gptoss_jax.ops.attention import attention
from gptoss_jax.parallel import blocks, context, mesh, ring


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Let chunks of these sizes be several blocks, the last one short."""
    monkeypatch.setattr(blocks, "KEYS", 16)
    monkeypatch.setattr(blocks, "QUERIES", 12)


# Segments: "one", "packed" (edges inside chunks and at none), "many" (each of 7 tokens), "padded"
# (packed, the last seventh padding: whole chunks of it), "empty" (the first row nothing else).
CASES: list[dict[str, Any]] = [
    {"mesh": {"context": 2, "data": 4}, "rows": 4, "T": 92, "window": None, "segments": "padded"},
    {"mesh": {"context": 4, "fsdp": 2}, "rows": 6, "T": 136, "window": 9, "segments": "padded"},
    {"mesh": {"context": 4, "fsdp": 2}, "rows": 2, "T": 136, "window": 60, "segments": "packed"},
    {"mesh": {"context": 8}, "rows": 1, "T": 304, "window": None, "segments": "many"},
    {"mesh": {"context": 8}, "rows": 1, "T": 304, "window": 20, "segments": "one"},
    {"mesh": {"context": 8}, "rows": 1, "T": 48, "window": 4, "segments": "one", "sinks": False},
    {"mesh": {"context": 4, "data": 2}, "rows": 2, "T": 88, "window": None, "segments": "empty",
     "sinks": False},
    {"mesh": {"context": 2, "tensor": 2, "expert": 2}, "rows": 2, "T": 60, "window": 16,
     "segments": "packed", "K": 4},
    {"mesh": {"context": 2, "tensor": 4}, "rows": 1, "T": 60, "window": None, "segments": "packed"},
    {"mesh": {"tensor": 8}, "rows": 3, "T": 50, "window": 7, "segments": "padded"},
]  # fmt: skip
MORE: list[dict[str, Any]] = [
    # A halo of one key more than 128, and of just as many.
    {"mesh": {"context": 2}, "rows": 1, "T": 1040, "window": 130, "segments": "one"},
    {"mesh": {"context": 2}, "rows": 1, "T": 1040, "window": 129, "segments": "packed"},
    {"mesh": {"context": 8}, "rows": 3, "T": 304, "window": 17, "segments": "many"},
    {"mesh": {"context": 8}, "rows": 2, "T": 48, "window": 5, "segments": "padded"},
    {"mesh": {"context": 8}, "rows": 1, "T": 16, "window": None, "segments": "one"},
    {"mesh": {"context": 8}, "rows": 1, "T": 16, "window": 1, "segments": "one"},
    {"mesh": {"context": 4, "data": 2}, "rows": 2, "T": 88, "window": 13, "segments": "empty",
     "sinks": False},
    {"mesh": {"context": 2, "tensor": 2, "expert": 2}, "rows": 2, "T": 60, "window": None,
     "segments": "padded", "K": 4},
    {"mesh": {"fsdp": 2, "tensor": 4}, "rows": 4, "T": 37, "window": None, "segments": "padded",
     "sinks": False},
    {"mesh": {"data": 2, "fsdp": 2, "expert": 2}, "rows": 8, "T": 37, "window": 9,
     "segments": "packed"},
]  # fmt: skip


def name(case: dict[str, Any]) -> str:
    axes = "".join(f"{axis[0]}{n}" for axis, n in case["mesh"].items())
    sinks = "" if case.get("sinks", True) else "-no_sinks"
    return f"{axes}-{case['T']}-window_{case['window']}-{case['segments']}{sinks}"


@pytest.mark.parametrize(
    "case",
    [*CASES[:3], *(pytest.param(case, marks=pytest.mark.slow) for case in CASES[3:] + MORE)],
    ids=name,
)
def test_as_on_one_device(case):
    kind, heads = case["segments"], case.get("K", K)
    args = inputs(case["rows"], case["T"], kind, sinks=case.get("sinks", True), K=heads)
    assert_close(spread(args, case["window"], case["mesh"]), expected(args, case["window"]))


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 9])
def test_bfloat16(window):
    args = inputs(2, 136, "packed", dtype=jnp.bfloat16)
    got = spread(args, window, {"context": 4, "tensor": 2})
    for key, b in expected(args, window).items():
        a, b = np.asarray(got[key], np.float32), np.asarray(b)
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(b), key


def test_padding_may_have_any_cotangent():
    """What comes back for padding, NaN too, reaches no gradient."""
    args = inputs(1, 64, "padded")
    real = (args[4] != 0)[:, :, None, None]

    def gradients(dirt):
        out, back = jax.vjp(over_mesh(args, None, 4), *args[:4])
        return back(jnp.where(real, jnp.ones_like(out), dirt))

    with on({"context": 4}):
        run = jax.jit(gradients)
        clean, dirty = run(0.0), run(jnp.nan)
    for a, b in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(a, b)
        assert bool(jnp.isfinite(a).all())


def test_blocks_that_none_sees_are_skipped(monkeypatch):
    """What no query of a block sees is not multiplied: NaN in a later segment stays there."""
    monkeypatch.setattr(blocks, "QUERIES", 8)
    monkeypatch.setattr(blocks, "KEYS", 8)
    q, k, v, sinks, _, _ = inputs(1, 64, "one")
    ids, positions = (x.reshape(1, 64) for x in places(2, 32, "one"))
    ids = ids.at[:, 32:].set(2)
    want = expected((q, k, v, sinks, ids, positions), None)
    k, v = (x.at[:, 32:].set(jnp.nan) for x in (k, v))
    got = spread((q, k, v, sinks, ids, positions), None, {"context": 4, "tensor": 2})
    for key in ("out", "q", "k", "v"):
        a, b = (np.asarray(x[key][:, :32]) for x in (got, want))
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max(), err_msg=key)
    assert bool(jnp.isnan(got["out"][:, 32:]).all())  # and is not hidden


@pytest.mark.parametrize("shards", [2, 4, 8])
def test_every_causal_pair_of_chunks_meets_once(shards):
    """On every shard as many at every step: of four pairs two."""
    over = mesh.make(MeshConfig(context=shards, data=8 // shards))

    def met(number):
        return jnp.asarray([ring._pair(number, pair) for pair in range(ring.PAIRS)])[None]

    def chunk(shard, half):
        return shard if half == ring.LO else 2 * shards - 1 - shard

    pairs = []
    for number in range(1, shards):
        island = jax.shard_map(
            lambda n=number: met(n), mesh=over, in_specs=(), out_specs=P("context"), check_vma=False
        )
        halves = np.asarray(jax.jit(island)())  # [shards, pairs, 2]
        assert halves.shape == (shards, 2, 2)
        for i in range(shards):
            source = (i - number) % shards
            pairs += [(chunk(i, mine), chunk(source, theirs)) for mine, theirs in halves[i]]
    own = {(a, b) for a in range(2 * shards) for b in (a, 2 * shards - 1 - a)}
    causal = {(a, b) for a in range(2 * shards) for b in range(a)}
    assert sorted(pairs) == sorted(causal - own)


@pytest.mark.parametrize("which", ["forward", "backward"])
def test_a_step_of_the_ring_computes_half(which, monkeypatch):
    """Logits of a step, by the shapes that are handed to the blocks: half of a shard's square."""
    seen = []
    real = getattr(blocks, which)

    def counted(q, k, *rest, **options):
        seen.append(q.shape[1] * k.shape[1])
        return real(q, k, *rest, **options)

    monkeypatch.setattr(blocks, which, counted)
    args = inputs(1, 128, "one")
    with on({"context": 8}):
        run = over_mesh(args, None, 8)
        jax.eval_shape(jax.grad(lambda *x: jnp.sum(run(*x))), *args[:4])
    L = 128 // 16
    # Of its own keys half are skipped when they are met; of another shard's two pairs are, by loop.
    assert seen == [(2 * L) ** 2, L**2]
    assert ring.PAIRS * L**2 == (2 * L) ** 2 // 2


def compiled(window: int | None, T: int, sizes: dict[str, int]) -> str:
    """Return the HLO of the op, forward and backward, of arrays that lie as the model's do."""
    over = mesh.make(MeshConfig(**sizes))
    *arrays, ids, positions = inputs(1, T, "padded")
    heads, tokens = P(mesh.ROWS, "context", "tensor", None), P(mesh.ROWS, "context")
    arrays = [
        jax.device_put(x, NamedSharding(over, spec))
        for x, spec in zip(
            (*arrays, ids, positions), (heads,) * 3 + (P("tensor"),) + (tokens,) * 2, strict=True
        )
    ]

    def run(q, k, v, sinks, ids, positions):
        def attend(q, k, v, sinks):
            return context.attention(
                q, k, v, sinks=sinks, window=window, segment_ids=ids, positions=positions
            )

        out, back = jax.vjp(attend, q, k, v, sinks)
        return out, back(out)

    with jax.set_mesh(over):
        return jax.jit(run).lower(*arrays).compile().as_text()


def exchanged(hlo: str) -> dict[str, list[int]]:
    """Return elements that a collective of each kind gives, one entry a collective."""
    found: dict[str, list[int]] = {}
    kinds = "collective-permute|all-gather|all-reduce|reduce-scatter|all-to-all"
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(n) for n in s.split(",") if n] or [1])) for s in shapes]
            found.setdefault(match[2], []).append(max(sizes))
    return found


def test_a_banded_layer_fetches_halos_alone():
    """Collective permutes of as many keys as the window needs, however long the row."""
    for T in (1024, 2048):
        found = exchanged(compiled(17, T, {"context": 4, "tensor": 2}))
        assert set(found) <= {"collective-permute", "all-reduce"}
        assert max(found["collective-permute"]) == 128 * (K // 2) * H
        assert max(found["all-reduce"]) <= N  # the sinks' gradient


def test_a_full_layer_gathers_nothing():
    T, shards = 64, 4
    found = exchanged(compiled(None, T, {"context": shards, "tensor": 2}))
    assert set(found) <= {"collective-permute", "all-reduce"}
    assert max(found["collective-permute"]) == T // shards * (K // 2) * H
    assert max(found["all-reduce"]) <= N


@pytest.mark.parametrize(
    ("sizes", "window"),
    [({"context": 4, "tensor": 2}, None), ({"context": 2, "data": 2, "tensor": 2}, 9)],
)
def test_tokens_that_are_not_spread(window, sizes):
    """A prefill's: whole and in order on every shard of `context`."""
    args = inputs(2, 37, "padded")

    def run(q, k, v, sinks):
        return context.attention(
            q, k, v, sinks=sinks, window=window, segment_ids=args[4], positions=args[5],
            over_context=False,
        )  # fmt: skip

    with on(sizes):
        assert_close({"out": jax.jit(run)(*args[:4])}, {"out": expected(args, window)["out"]})


@pytest.mark.parametrize(
    ("sizes", "window"),
    [
        ({"tensor": 8}, 6),
        ({"context": 2, "tensor": 2, "fsdp": 2}, None),
        ({"data": 4, "tensor": 2}, 6),
        ({}, None),
    ],
)
def test_a_cache(sizes, window):
    rng = np.random.default_rng(3)
    q, k, v, sinks, _, _ = inputs(4, 19, "one")
    q = q[:, :3]
    kv_positions = jnp.asarray(np.stack([rng.permutation(19) for _ in range(4)]), jnp.int32)
    kv_ids = (kv_positions < 16).astype(jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(13, 16, dtype=jnp.int32), (4, 3))
    where: dict[str, Any] = {
        "segment_ids": jnp.ones((4, 3), jnp.int32), "positions": positions,
        "kv_segment_ids": kv_ids, "kv_positions": kv_positions,
    }  # fmt: skip

    def reference(q, k, v, sinks):
        return attention(q, k, v, sinks=sinks, window=window, implementation="reference", **where)

    def run(q, k, v, sinks):
        return context.cached_attention(q, k, v, sinks=sinks, window=window, **where)

    args = (q, k, v, sinks)
    want = jax.jit(reference)(*args)
    with on(sizes):
        assert_close({"out": jax.jit(run)(*args)}, {"out": want})


def test_without_a_mesh_it_is_the_op():
    args = inputs(2, 30, "packed")

    def run(q, k, v, sinks):
        return context.attention(
            q, k, v, sinks=sinks, window=5, segment_ids=args[4], positions=args[5]
        )

    assert_close({"out": jax.jit(run)(*args[:4])}, {"out": expected(args, 5)["out"]})


def test_balanced_order():
    x = np.arange(2 * 12 * 3).reshape(2, 12, 3)
    order = [0, 1, 10, 11, 2, 3, 8, 9, 4, 5, 6, 7]  # three shards, chunks of two
    np.testing.assert_array_equal(context.balance(x, shards=3), x[:, order])
    np.testing.assert_array_equal(context.balance(x[0], shards=3, axis=0), x[0][order])
    np.testing.assert_array_equal(context.balance(x, shards=1), x)


@pytest.mark.parametrize(("shards", "axis"), [(1, 1), (2, 1), (3, -2), (6, 1)])
def test_unbalance_undoes_balance(shards, axis):
    x = np.random.default_rng(0).normal(size=(2, 12, 5)).astype(np.float32)
    there = context.balance(x, shards=shards, axis=axis)
    np.testing.assert_array_equal(context.unbalance(there, shards=shards, axis=axis), x)


@pytest.mark.parametrize("reorder", [context.balance, context.unbalance])
def test_lengths_that_do_not_divide_are_refused(reorder):
    with pytest.raises(ValueError, match=r"14 tokens are no multiple of 8: 2 for each shard"):
        reorder(np.zeros((1, 14)), shards=4)


@pytest.mark.parametrize(
    ("sizes", "rows", "T", "message"),
    [
        ({"context": 8}, 1, 40, "40 tokens are no multiple of 2 . mesh.context = 16"),
        ({"data": 8}, 6, 40, "6 rows do not divide over data x fsdp x expert = 8"),
    ],
)
def test_what_the_mesh_does_not_divide_is_refused(sizes, rows, T, message):
    q, k, v, sinks, ids, positions = inputs(rows, T, "one")
    with on(sizes), pytest.raises(ValueError, match=message):
        context.attention(q, k, v, sinks=sinks, window=None, segment_ids=ids, positions=positions)
