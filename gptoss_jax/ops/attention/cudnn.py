"""Self-attention on NVIDIA GPUs by cuDNN, which has no sinks: `sink_algebra` adds them.

cuDNN gets segments in its packed layout: the start and length of each segment. This takes memory
linear in T and skips the work between segments. Tracing does not know the number of segments and
cuDNN needs a bound, so segments are processed in rounds of up to `SEGMENTS` per row, as many rounds
as needed. The calls are private functions of JAX, because its public ones give no gradient to the
logsumexp.
"""

from __future__ import annotations

import functools
import inspect
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention.sink_algebra import with_sink

SEGMENTS = 16  # most segments of a row in one round
MAX_STATS = 1 << 26  # float32 elements of a round's [B, segments, N, T] logsumexps: 256 MiB
CHIPS = ("h100", "h200", "b200")  # its packed layout needs Hopper or later
CUDNN = 91000  # least cuDNN version with all features used here, among those that JAX supports
# Least jax version: earlier ones compute the offsets of keys from the number of query heads.
GROUPED_QUERIES = (0, 11, 2)
# Arguments of JAX's private functions in all versions from 0.10.2 to 0.12, except `score_mod`.
ARRAYS = (
    "query", "key", "value", "bias", "q_seqlen", "kv_seqlen", "q_offsets", "kv_offsets",
    "page_table_k", "page_table_v",
)  # fmt: skip
OPTIONS = (
    "scale", "seed", "dropout_rate", "variadic_args", "mask_type", "layout",
    "sliding_window_length", "cudnn_version", "return_residual",
)  # fmt: skip


def refuse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> str | None:
    """Return why cuDNN can't run, or None."""
    del sinks, window, segment_ids, positions
    kind = chips.current().kind
    if kind not in CHIPS:
        return f"cuDNN's packed attention needs one of {', '.join(CHIPS)}, and this is a {kind}"
    if chips.current().interpret:
        return "cuDNN can't be interpreted"
    dtypes = {q.dtype, k.dtype, v.dtype}
    if len(dtypes) > 1 or q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN takes bfloat16 or float16, not {', '.join(sorted(map(str, dtypes)))}"
    if q.shape[3] % 8 or q.shape[3] > 256:
        return f"head_dim {q.shape[3]} has to be a multiple of 8 up to 256"
    if q.size >= 1 << 31:
        return f"q has {q.size} elements, and cuDNN's offsets are 32 bits wide"
    if q.shape[2] != k.shape[2] and jax.__version_info__ < GROUPED_QUERIES:
        return f"grouped queries in segments need jax 0.11.2, and this is {jax.__version__}"
    return _missing()


@functools.cache
def _missing() -> str | None:
    """Return what JAX's cuDNN calls or cuDNN itself lack, or None; check cuDNN only on a GPU."""
    try:
        from jax._src.cudnn import fused_attention_stablehlo as calls

        rule = inspect.signature(calls._dot_product_attention_fwd_rule).parameters
        names = tuple(name for name in rule if not name.startswith("score_mod"))
        if names != ARRAYS + OPTIONS or not hasattr(calls, "_dot_product_attention_bwd_p_wrapper"):
            return f"jax {jax.__version__} has other private cuDNN calls: {', '.join(names)}"
        if jax.default_backend() == "gpu" and calls.check_cudnn_version() < CUDNN:
            return f"cuDNN {calls.check_cudnn_version()} is older than {CUDNN}"
    except (ImportError, AttributeError, RuntimeError) as error:
        return f"jax {jax.__version__} has no cuDNN attention: {error}"
    return None


def self_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segment_ids: Int[Array, "B T"],
    positions: Int[Array, "B T"],
) -> Float[Array, "B T N H"]:
    """Attend over rows whose index order is their causal order; see `attention`."""
    del positions  # they rise by one in a segment, so differences of indices are enough
    if window is not None and window >= q.shape[1]:
        window = None
    forward, backward = (functools.partial(f, window) for f in (_forward, _backward))
    return with_sink(forward, backward)(q, k, v, sinks, segment_ids)


class Round(NamedTuple):
    """Up to M segments of each row, and the segment and place of each token."""

    lengths: Int[Array, "B M"]  # 0 for padding and for unused entries
    offsets: Int[Array, "B M+1"]  # index of a segment's first token in its row; the last is -1
    inside: Bool[Array, "B T"]  # whether a token is in one of these segments
    entry: Int[Array, "B T"]  # the token's segment; M if outside
    place: Int[Array, "B T"]  # the token's index in its segment


def _round(segment_ids: Int[Array, "B T"], number: Any, M: int) -> Round:
    """Return the M segments of each row from segment number * M on.

    All M entries of `offsets` are set, used or not. JAX moves entries other than -1 to the front of
    the batch, so entry m of row b is then cuDNN's segment b * M + m, however the batch is sharded.
    """
    B, T = segment_ids.shape
    run = _runs(segment_ids)
    find = jax.vmap(functools.partial(jnp.searchsorted, side="left"), (0, None))
    edges = find(run, number * M + jnp.arange(M + 1)).astype(jnp.int32)
    starts = edges[:, :M]
    ids = jnp.take_along_axis(segment_ids, jnp.minimum(starts, T - 1), axis=1)
    entry = run - number * M
    inside = (entry >= 0) & (entry < M) & (segment_ids != 0)
    entry = jnp.where(inside, entry, M)
    start = jnp.take_along_axis(starts, jnp.minimum(entry, M - 1), axis=1)
    return Round(
        lengths=jnp.where(ids != 0, edges[:, 1:] - starts, 0),
        offsets=jnp.concatenate([starts, jnp.full((B, 1), -1, jnp.int32)], axis=1),
        inside=inside,
        entry=entry,
        place=jnp.where(inside, jnp.arange(T, dtype=jnp.int32) - start, 0),
    )


def _runs(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Number the runs of equal ids in each row from 0, including runs of padding."""
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(jnp.cumsum(changes, axis=1, dtype=jnp.int32), [(0, 0), (1, 0)])


def _segments(q: Float[Array, "B T N H"]) -> int:
    """Return the number of segments per row in one round; the packed layout needs at least two."""
    return max(2, min(SEGMENTS, MAX_STATS // (q.size // q.shape[3])))


def _rounds(segment_ids: Int[Array, "B T"], M: int) -> Array:
    return jnp.max(_runs(segment_ids)) // M + 1


def _forward(window: int | None, q: Any, k: Any, v: Any, segment_ids: Array) -> tuple[Any, Any]:
    """Attend without sinks; return the output and the logsumexp [B, T, N], -inf in padding."""
    B, T, N, _ = q.shape
    M, rows = _segments(q), jnp.arange(q.shape[0])[:, None]

    def one(number, so_far):
        part = _round(segment_ids, number, M)
        out, stats = packed_forward(q, k, v, part.lengths, part.offsets, window=window)
        stats = stats.reshape(B, M, N, T)
        lse = stats[rows, jnp.minimum(part.entry, M - 1), :, part.place]
        return _where(part.inside, (out, lse), so_far)

    start = (jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf, jnp.float32))
    return jax.lax.fori_loop(0, _rounds(segment_ids, M), one, start)


def _backward(
    window: int | None, q: Any, k: Any, v: Any, segment_ids: Array, out: Any, lse: Any, d_out: Any
) -> tuple[Any, ...]:
    """Return the gradients of q, k and v."""
    B, T, N, _ = q.shape
    M, rows = _segments(q), jnp.arange(q.shape[0])[:, None]

    def one(number, so_far):
        part = _round(segment_ids, number, M)
        stats = jnp.zeros((B, M, N, T), jnp.float32)
        stats = stats.at[rows, part.entry, :, part.place].set(lse, mode="drop")
        gradients = packed_backward(
            q, k, v, part.lengths, part.offsets, stats.reshape(B * M, N, T), out, d_out,
            window=window,
        )  # fmt: skip
        return _where(part.inside, gradients, so_far)

    start = tuple(jnp.zeros_like(x) for x in (q, k, v))
    return jax.lax.fori_loop(0, _rounds(segment_ids, M), one, start)


def _where(inside: Bool[Array, "B T"], new: Any, old: Any) -> tuple[Any, ...]:
    """Take tokens of these segments from `new`, where cuDNN does not write other tokens."""

    def take(a, b):
        return jnp.where(inside.reshape(inside.shape + (1,) * (b.ndim - 2)), a, b)

    return tuple(take(a, b) for a, b in zip(new, old, strict=True))


def packed_forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B M"],
    offsets: Int[Array, "B M+1"],
    *,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B*M N T"]]:
    """Call cuDNN; return the output, and logsumexps by segment, head and place in the segment.

    Entries that belong to no segment may hold anything.
    """
    calls, arrays, options = _operands(q, k, v, lengths, offsets, window)
    bind = calls._dot_product_attention_fwd_p_wrapper.bind
    out, stats = bind(*arrays, **options, is_training=True)
    return out, stats


def packed_backward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    lengths: Int[Array, "B M"],
    offsets: Int[Array, "B M+1"],
    stats: Float[Array, "B*M N T"],
    out: Float[Array, "B T N H"],
    d_out: Float[Array, "B T N H"],
    *,
    window: int | None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Call cuDNN; return the gradients of q, k and v, undefined for tokens of no segment."""
    calls, arrays, options = _operands(q, k, v, lengths, offsets, window)
    bind = calls._dot_product_attention_bwd_p_wrapper.bind
    dq, dk, dv = bind(*arrays, stats, out, d_out, **options)
    return dq, dk, dv


def _operands(
    q: Any, k: Any, v: Any, lengths: Any, offsets: Any, window: int | None
) -> tuple[ModuleType, tuple[Any, ...], dict[str, Any]]:
    """Return JAX's module, and the arguments that its forward and backward calls share.

    cuDNN's window includes the query's own key, as ours does. The calls are bound one level below
    JAX's checks, because these check the devices that run the trace, not those it is compiled for.
    """
    from jax._src.cudnn import fused_attention_stablehlo as calls

    unused = jnp.zeros(0, q.dtype)
    arrays = (q, k, v, unused, lengths, lengths, offsets, offsets, unused, unused)
    options = {
        "scale": q.shape[3] ** -0.5,
        "seed": 0,
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias and no gradient of a bias
        "mask_type": calls.MaskType.PADDING_CAUSAL,
        "layout": calls.AttentionLayout.BTNH.value,
        "sliding_window_length": window,
    }
    if "score_mod" in inspect.signature(calls._dot_product_attention_fwd_rule).parameters:
        options["score_mod"] = None
    return calls, arrays, options
