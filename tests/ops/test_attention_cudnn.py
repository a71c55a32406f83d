"""cuDNN's route: the sink's algebra and the packing of segments, proven on stand-ins for cuDNN.

What runs cuDNN itself needs a GPU; tests/aot shows that its calls are compiled.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import attention_cases as cases
import covering
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import chips
from gptoss_jax.ops.attention import attention, cudnn, reference
from gptoss_jax.ops.attention.sink_algebra import with_sink


def logits_of(q, k, mask):
    """Return logits [B, N, T, S] in the arguments' own precision, -inf where nothing is seen."""
    k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * q.shape[3] ** -0.5
    return jnp.where(mask[:, None], logits, -jnp.inf)


def forward(q, k, v, mask):
    """Attend without sinks, as a flash kernel does: a row that sees nothing has a lse of -inf."""
    logits = logits_of(q, k, mask)
    largest = jnp.maximum(jnp.max(logits, axis=-1, keepdims=True), -1e30)
    weights = jnp.exp(logits - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
    out = jnp.einsum("BNTS,BSNH->BTNH", weights / jnp.where(total > 0, total, 1), v)
    return out, (largest + jnp.log(total))[..., 0].swapaxes(1, 2)


def backward(q, k, v, mask, out, lse, d_out):
    """Differentiate, as FlashAttention does, from nothing but the output and the logsumexp."""
    K, G = k.shape[2], q.shape[2] // k.shape[2]
    p = jnp.exp(logits_of(q, k, mask) - lse.swapaxes(1, 2)[..., None])
    delta = jnp.sum(out * d_out, axis=-1).swapaxes(1, 2)[..., None]
    wide_k, wide_v = jnp.repeat(k, G, axis=2), jnp.repeat(v, G, axis=2)
    ds = p * (jnp.einsum("BTNH,BSNH->BNTS", d_out, wide_v) - delta) * q.shape[3] ** -0.5

    def of_kv_head(x):
        return x.reshape(*x.shape[:2], K, G, x.shape[3]).sum(axis=3)

    dq = jnp.einsum("BNTS,BSNH->BTNH", ds, wide_k)
    dk = jnp.einsum("BNTS,BTNH->BSNH", ds, q)
    return dq, of_kv_head(dk), of_kv_head(jnp.einsum("BNTS,BTNH->BSNH", p, d_out))


def gradients(attend, args):
    """Return the output and all gradients of a weighted sum of it, by name."""
    weight = np.random.default_rng(1).normal(size=args[0].shape)

    def loss(*args):
        out = attend(*args)
        return jnp.sum(out * jnp.asarray(weight, out.dtype)), out

    count = 3 + (args[3] is not None)
    found, out = jax.jit(jax.grad(loss, argnums=tuple(range(count)), has_aux=True))(*args)
    return {"out": out, **dict(zip(("q", "k", "v", "sinks"), found, strict=False))}


ALGEBRA = covering.pairwise(**{**cases.AXES, "length": [1, 5, 130, 300], "H": [64, 80]})


@pytest.mark.parametrize("case", covering.part_slow(ALGEBRA, every=5))
def test_the_sinks_algebra_matches_the_reference(case):
    args = cases.inputs(case)
    segments, positions = args[4:]
    mask = reference.visible(segments, segments, positions, positions, case["window"])
    attend = with_sink(forward, backward)
    got = gradients(lambda q, k, v, sinks: attend(q, k, v, sinks, mask), args[:4])
    cases.assert_close(got, cases.expected(args, case["window"]))


@pytest.mark.parametrize("window", [None, 7])
def test_the_sinks_algebra_is_exact(window):
    """In float64, against JAX's own derivative of the formula, rows that see nothing among them."""
    case = {"length": 40, "heads": (6, 3), "H": 16, "segments": "padded", "sinks": True}
    args = cases.inputs(case)
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a), jnp.float64) for a in args[:4]]
        segments, positions = args[4:]
        mask = reference.visible(segments, segments, positions, positions, window)
        assert not bool(mask.any(axis=-1).all())

        def formula(q, k, v, sinks):
            logits = logits_of(q, k, mask)
            column = jnp.broadcast_to(sinks[None, :, None, None], (*logits.shape[:3], 1))
            weights = jax.nn.softmax(jnp.concatenate([logits, column], axis=-1), axis=-1)
            v = jnp.repeat(v, q.shape[2] // v.shape[2], axis=2)
            return jnp.einsum("BNTS,BSNH->BTNH", weights[..., :-1], v)

        attend = with_sink(forward, backward)
        got = gradients(lambda q, k, v, sinks: attend(q, k, v, sinks, mask), wide)
        for name, want in gradients(formula, wide).items():
            assert float(jnp.abs(want).max()) > 0
            apart = float(jnp.abs(got[name] - want).max() / jnp.abs(want).max())
            assert apart < 1e-13, name


def flat(q, lengths, offsets):
    """Return each token's segment, numbered from 1 over the batch, and its place in it.

    JAX's own code turns what it is given into what cuDNN reads: lengths of consecutive segments,
    and where in memory each begins.
    """
    from jax._src.cudnn import fused_attention_stablehlo as calls

    B, T, N, H = q.shape
    length, _, offset, _ = calls._fix_seqlen_offsets(
        lengths, lengths, offsets, offsets, q, q[:, :, : q.shape[2]]
    )
    count = lengths.size
    length, offset = length.reshape(-1), offset.reshape(-1)[: count + 1] // (N * H)
    at = jnp.arange(B * T)[:, None]
    member = (at >= offset[:count]) & (at < offset[:count] + length)
    assert member.shape == (B * T, count)
    segment = jnp.where(member.any(axis=1), jnp.argmax(member, axis=1) + 1, 0)
    place = at[:, 0] - offset[jnp.maximum(segment - 1, 0)]
    return segment[None], place[None].astype(jnp.int32)


def as_one_row(x):
    return x.reshape(1, -1, *x.shape[2:])


def packed_forward(q, k, v, lengths, offsets, *, window):
    """Stand in for cuDNN's forward call; NaN is what it leaves alone."""
    T, N = q.shape[1:3]
    segment, place = flat(q, lengths, offsets)
    mask = reference.visible(segment, segment, place, place, window)
    out, lse = forward(as_one_row(q), as_one_row(k), as_one_row(v), mask)
    out = jnp.where(segment[..., None, None] != 0, out, jnp.nan).reshape(q.shape)
    stats = jnp.full((lengths.size, N, T), jnp.nan)
    where = jnp.where(segment[0] == 0, lengths.size, segment[0] - 1)
    return out, stats.at[where, :, place[0]].set(lse[0], mode="drop")


def packed_backward(q, k, v, lengths, offsets, stats, out, d_out, *, window):
    """Stand in for cuDNN's backward call."""
    segment, place = flat(q, lengths, offsets)
    mask = reference.visible(segment, segment, place, place, window)
    outside = segment[..., None, None] == 0
    lse = stats[segment[0] - 1, :, place[0]][None]
    lse = jnp.where(outside[..., 0], 1e5, lse)
    rows = [jnp.where(outside, 0, as_one_row(x)) for x in (out, d_out)]
    found = backward(as_one_row(q), as_one_row(k), as_one_row(v), mask, rows[0], lse, rows[1])
    return tuple(
        jnp.where(outside, jnp.nan, x).reshape(y.shape)
        for x, y in zip(found, (q, k, v), strict=True)
    )


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(cudnn, "packed_forward", packed_forward)
    monkeypatch.setattr(cudnn, "packed_backward", packed_backward)


def cudnn_results(args, window):
    segments, positions = args[4:]
    attend = functools.partial(
        cudnn.self_attention, window=window, segment_ids=segments, positions=positions
    )
    return gradients(attend, args[:4])


# Without a sink the gradient of a lone token's query is the rest of a subtraction, and no 0.
LONE = {"length": 1, "window": None, "heads": (4, 2), "H": 64, "segments": "one", "sinks": True}
SMALL = [
    LONE,
    *covering.pairwise(**{**cases.AXES, "length": [5, 129], "heads": [(4, 4), (6, 3)], "H": [64]}),
]


@pytest.mark.parametrize("case", covering.part_slow(SMALL, every=4))
def test_segments_as_cudnn_takes_them_match_the_reference(case, stand_in):
    args = cases.inputs(case)
    cases.assert_close(cudnn_results(args, case["window"]), cases.expected(args, case["window"]))


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("segments", [2, 3, 16])
def test_more_segments_than_go_at_once_take_rounds(segments, window, stand_in, monkeypatch):
    monkeypatch.setattr(cudnn, "SEGMENTS", segments)
    case: dict[str, Any] = {"length": 60, "heads": (4, 2), "H": 8, "segments": "one", "sinks": True}
    q, k, v, sinks, _, _ = cases.inputs(case)
    # Padding before, between and behind; one row has 8 runs, the other 2; ids come back.
    ids = np.repeat([[0, 1, 2, 0, 3, 3, 2, 5, 6, 0], [7] * 6 + [8] * 4], 6, axis=1)
    starts = np.r_["1", np.ones((2, 1), bool), ids[:, 1:] != ids[:, :-1]]
    starts[0, 24] = True
    index = np.broadcast_to(np.arange(60), ids.shape)
    positions = index - np.maximum.accumulate(np.where(starts, index, 0), axis=1)
    # The reference lets a returning id see its first run: number the runs instead.
    runs = np.where(ids == 0, 0, np.cumsum(starts, axis=1))
    args = (q, k, v, sinks, jnp.asarray(runs), jnp.asarray(positions, jnp.int32))
    cases.assert_close(cudnn_results(args, window), cases.expected(args, window))


def test_a_round_says_where_segments_lie():
    ids = jnp.asarray([[4, 4, 4, 0, 5, 6, 6, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    first, second = (cudnn._round(ids, number, 3) for number in range(2))
    np.testing.assert_array_equal(first.lengths, [[3, 0, 1], [8, 0, 0]])
    np.testing.assert_array_equal(first.offsets, [[0, 3, 4, -1], [0, 8, 8, -1]])
    np.testing.assert_array_equal(second.lengths, [[2, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(second.offsets, [[5, 7, 8, -1], [8, 8, 8, -1]])
    np.testing.assert_array_equal(first.inside[0], [1, 1, 1, 0, 1, 0, 0, 0])
    np.testing.assert_array_equal(second.inside[0], [0, 0, 0, 0, 0, 1, 1, 0])
    np.testing.assert_array_equal(second.place[0], [0, 0, 0, 0, 0, 0, 1, 0])
    assert int(cudnn._rounds(ids, 3)) == 2
    assert int(cudnn._rounds(ids, 16)) == 1


@pytest.mark.parametrize("window", [None, 20])
def test_both_passes_are_lowered_to_cudnn(window):
    """On every jax, whose private calls these are; tests/aot compiles what comes of it."""
    K = 2 if jax.__version_info__ >= cudnn.GROUPED_QUERIES else 4
    array = jax.ShapeDtypeStruct
    q, k = (array((2, 40, n, 64), jnp.bfloat16) for n in (4, K))

    def loss(q, k, v, sinks, ids):
        out = attention(
            q, k, v, sinks=sinks, window=window, segment_ids=ids, positions=ids,
            implementation="cudnn",
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    with chips.assume("h200"):
        grad: Any = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
        traced = grad.trace(q, k, k, array((4,), jnp.float32), array((2, 40), jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count('"__cudnn$fmhaSoftmax"') + text.count("@__cudnn$fmhaSoftmax(") == 1
    assert text.count("__cudnn$fmhaSoftmaxBackward") == 1
    assert text.count("PADDING_CAUSAL") == 2
    assert re.findall(r"sliding_window_length\\22: (\d+)", text) == [str(window or 0)] * 2


def test_cudnn_says_what_it_refuses():
    def reason(chip, dtype=jnp.bfloat16, H=64, **options):
        q, k, v, sinks, segments, positions = cases.inputs(
            {"length": 5, "heads": (4, 4), "H": H, "segments": "one", "sinks": True}, dtype
        )
        with chips.assume(chip, **options):
            return cudnn.refuse(
                q, k, v, sinks, window=None, segment_ids=segments, positions=positions
            )

    assert reason("h200") is None
    assert "is a v5e" in str(reason("v5e"))
    assert "is a cpu" in str(reason("cpu"))
    assert "interpreted" in str(reason("h200", interpret=True))
    assert "float32" in str(reason("h200", jnp.float32))
    assert "head_dim 12" in str(reason("h200", H=12))


def test_calls_of_another_jax_are_refused(monkeypatch):
    monkeypatch.setattr(cudnn, "ARRAYS", ("query",))
    cudnn._missing.cache_clear()
    assert "other private cuDNN calls" in str(cudnn._missing())
    monkeypatch.undo()
    cudnn._missing.cache_clear()
    assert cudnn._missing() is None


def test_a_window_of_the_whole_row_is_none(stand_in):
    """cuDNN is asked for a window only where there is one."""
    case = {"length": 40, "heads": (4, 2), "H": 8, "segments": "packed", "sinks": True}
    args = cases.inputs(case)
    cases.assert_close(cudnn_results(args, 40), cases.expected(args, None))


def test_without_the_op_knowing_it_the_reference_is_the_judge():
    """The stand-ins are no cuDNN: show at least that they are attention."""
    args = cases.inputs({"length": 9, "heads": (4, 2), "H": 8, "segments": "one", "sinks": False})
    q, k, v, _, segments, positions = args
    mask = reference.visible(segments, segments, positions, positions, None)
    want = attention(
        q, k, v, sinks=None, window=None, segment_ids=segments, positions=positions,
        implementation="reference",
    )  # fmt: skip
    np.testing.assert_allclose(forward(q, k, v, mask)[0], want, atol=1e-6)
