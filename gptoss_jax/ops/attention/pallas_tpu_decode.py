"""Attention of a few queries to a key/value cache on TPU: a kernel over blocks of keys."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention import xla
from gptoss_jax.ops.attention.reference import MASKED, visible

LANES = 128
MAX_QUERIES = 8  # more queries are a prefill, whose logits would not fit in fast memory


class Blocks(NamedTuple):
    """Limits of a block of keys: bytes of keys, and bytes of their float32 logits."""

    keys: int
    logits: int


# Reading a block should take longer than the overhead of a grid step, about 0.35 us. Reading 1 MiB
# of keys and 1 MiB of values takes 2.6 us on v5e; 2 MiB of each take 1.5 us on v5p, 2.6 us on v6e
# and 1.1 us on tpu7x (one of its two devices). Fast memory holds two blocks of each. The sizes were
# computed, not timed on a chip.
BLOCKS = {
    "v5e": Blocks(1 << 20, 1 << 20),
    "v5p": Blocks(2 << 20, 1 << 20),
    "v6e": Blocks(2 << 20, 1 << 20),
    "tpu7x": Blocks(2 << 20, 1 << 20),
}


def refuse(q, k, v, sinks, *, window, segments, positions) -> str | None:
    """Return why the kernel can't run with these arguments here, or None."""
    del sinks, window, segments, positions
    chip = chips.refuse_tpu_kernel()
    if chip is not None:
        return chip
    if q.shape[1] > MAX_QUERIES:
        return f"it takes at most {MAX_QUERIES} queries a row, not {q.shape[1]}"
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (jnp.float32, jnp.bfloat16):
        return (
            "q, k and v are to be float32 or bfloat16, all three the same, not "
            f"{q.dtype}, {k.dtype}, {v.dtype}"
        )
    return None


def cached_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
) -> Float[Array, "B T N H"]:
    """Attend to keys in any order, as in a key/value cache; see `attention`.

    A TPU stores an array [B, S, K, H] with H below 128 as [B, K, H, S], with keys along the lanes,
    and the kernel reads this order. For H of 64 and 80 XLA does not copy the cache; for 128 it
    transposes the cache. The gradient is that of the XLA implementation.
    """
    return _attend(window, chips.tpu_interpreter(), q, k, v, sinks, (segments, positions))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(window: int | None, interpret: Any, q, k, v, sinks: Any, where: Any) -> Any:
    (q_segments, k_segments), (q_positions, k_positions) = where
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G, block = N // K, block_of(S, rows=N * T, key=K * H * k.dtype.itemsize)
    R = G * T
    queries = (q * jnp.asarray(H**-0.5, q.dtype)).reshape(B, T, K, G, H)
    queries = jnp.moveaxis(queries, 2, 1).reshape(B, K, R, H)

    def as_column(x):
        """Return [B, T] in the layout of the queries of one kv head, [B, R, 1]."""
        return jnp.repeat(x, G, axis=1)[..., None]

    if sinks is None:
        sink = jnp.full((K, R, 1), MASKED, jnp.float32)
    else:
        sink = jnp.tile(sinks.astype(jnp.float32).reshape(K, G), (1, T))[..., None]
    out: Any = _call(window, block, interpret, sinks is not None)(
        *_schedule(window, where, block),
        queries,
        jnp.transpose(k, (0, 2, 3, 1)),
        jnp.transpose(v, (0, 2, 3, 1)),
        as_column(q_segments),
        as_column(q_positions),
        k_segments[:, None],
        k_positions[:, None],
        sink,
    )
    return jnp.moveaxis(out.reshape(B, K, T, G, H), 1, 2).reshape(B, T, N, H)


def _attend_fwd(window: int | None, interpret: Any, q, k, v, sinks: Any, where: Any) -> Any:
    return _attend(window, interpret, q, k, v, sinks, where), (q, k, v, sinks, where)


def _attend_bwd(window: int | None, interpret: Any, saved: Any, d_out: Array) -> tuple[Any, ...]:
    del interpret
    *arrays, (segments, positions) = saved

    def again(*arrays):
        return xla.cached_attention(*arrays, window=window, segments=segments, positions=positions)

    return (*jax.vjp(again, *arrays)[1](d_out), None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def block_of(S: int, *, rows: int, key: int) -> int:
    """Return the number of keys per block: all keys, or a multiple of `LANES` in equal blocks.

    `rows` is the number of queries over all heads; `key` is the bytes of a slot's keys over all
    heads.
    """
    blocks = BLOCKS[chips.current().kind]
    most = min(blocks.keys // key, blocks.logits // (4 * rows))
    most = max(LANES, most // LANES * LANES)
    if most >= S:
        return S
    each = -(-S // -(-S // most))
    return -(-each // LANES) * LANES


def _schedule(window: int | None, where: Any, block: int) -> tuple[Array, Array]:
    """Return which of the C blocks hold a visible key, and which block each grid step loads.

    Both are [B, C]. A step without a visible key keeps the block of the step before, or else names
    the first block with one, so that nothing extra is read.
    """
    (q_segments, k_segments), (q_positions, k_positions) = where
    B, S = k_segments.shape
    seen = visible(q_segments, k_segments, q_positions, k_positions, window).any(axis=1)
    C = pl.cdiv(S, block)
    seen = jnp.pad(seen, ((0, 0), (0, C * block - S))).reshape(B, C, block).any(axis=-1)
    latest = jax.lax.cummax(jnp.where(seen, jnp.arange(C), -1), axis=1)
    loaded = jnp.maximum(latest, jnp.argmax(seen, axis=1)[:, None])
    return seen.astype(jnp.int32), loaded.astype(jnp.int32)


def _call(window: int | None, block: int, interpret: Any, has_sinks: bool) -> Any:
    """Return the kernel call, (schedule, q, k, v, segments, positions, sinks) -> [B, K, R, H]."""

    def run(seen, loaded, q, k, v, q_segments, q_positions, k_segments, k_positions, sinks):
        B, K, R, H = q.shape
        S = k.shape[-1]

        def of_row(b, j, *_):
            return (b, 0, 0, 0)

        def of_block(b, j, seen, loaded):
            return (b, 0, 0, loaded[b, j])

        def of_keys(b, j, seen, loaded):
            return (b, 0, loaded[b, j])

        cache = pl.BlockSpec((1, K, H, block), of_block)
        queries = pl.BlockSpec((1, R, 1), lambda b, j, *_: (b, 0, 0))
        keys = pl.BlockSpec((1, 1, block), of_keys)
        sink = pl.BlockSpec((K, R, 1), lambda b, j, *_: (0, 0, 0))
        call = pl.pallas_call(
            functools.partial(_kernel, window=window, keys=S, has_sinks=has_sinks),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2,
                grid=(B, pl.cdiv(S, block)),
                in_specs=[
                    pl.BlockSpec((1, K, R, H), of_row),
                    cache,
                    cache,
                    queries,
                    queries,
                    keys,
                    keys,
                    sink,
                ],
                out_specs=pl.BlockSpec((1, K, R, H), of_row),
                scratch_shapes=[
                    pltpu.VMEM((K, R, 1), jnp.float32),
                    pltpu.VMEM((K, R, 1), jnp.float32),
                    pltpu.VMEM((K, R, H), jnp.float32),
                ],
            ),
            out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
            compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
            cost_estimate=pl.CostEstimate(
                flops=4 * B * K * R * S * H,
                bytes_accessed=2 * k.nbytes + 2 * q.nbytes,
                transcendentals=B * K * R * S,
            ),
            name="cached_attention",
            interpret=interpret,
        )
        where = (q_segments, q_positions, k_segments, k_positions)
        return call(seen, loaded, q, k, v, *where, sinks)

    return run


def _kernel(
    seen_ref,
    loaded_ref,
    q_ref,
    k_ref,
    v_ref,
    q_segments_ref,
    q_positions_ref,
    k_segments_ref,
    k_positions_ref,
    sinks_ref,
    out_ref,
    largest_ref,
    total_ref,
    sum_ref,
    *,
    window: int | None,
    keys: int,
    has_sinks: bool,
):
    """Add one block of keys to a running softmax; the last step merges the sink."""
    b, j = pl.program_id(0), pl.program_id(1)
    block = k_ref.shape[-1]
    precision = (
        jax.lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    )

    def dot(x, y, contract):
        return jax.lax.dot_general(
            x,
            y,
            ((contract, ((0,), (0,)))),
            precision=precision,
            preferred_element_type=jnp.float32,
        )

    @pl.when(j == 0)
    def _():
        # Start above MASKED, so that a row that sees nothing has weights of zero.
        largest_ref[...] = jnp.full_like(largest_ref, MASKED / 10)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when(seen_ref[b, j] != 0)
    def _():
        distance = q_positions_ref[0] - k_positions_ref[0]  # [R, block]
        k_segments = k_segments_ref[0]
        mask = (q_segments_ref[0] == k_segments) & (k_segments != 0) & (distance >= 0)
        if window is not None:
            mask &= distance < window
        values = v_ref[0]
        if keys % block:
            # Past the last key the block may hold anything, also NaN.
            lane = j * block + jax.lax.broadcasted_iota(jnp.int32, (1, block), 1)
            mask &= lane < keys
            values = jnp.where((lane < keys)[None], values, jnp.zeros_like(values))
        logits = jnp.where(mask[None], dot(q_ref[0], k_ref[0], ((2,), (1,))), MASKED)
        before = largest_ref[...]
        largest = jnp.maximum(before, jnp.max(logits, axis=-1, keepdims=True))
        weights = jnp.exp(logits - largest)
        rest = jnp.exp(before - largest)
        largest_ref[...] = largest
        total_ref[...] = total_ref[...] * rest + jnp.sum(weights, axis=-1, keepdims=True)
        sum_ref[...] = sum_ref[...] * rest + dot(weights.astype(values.dtype), values, ((2,), (2,)))

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        total, scale = total_ref[...], 1.0
        if has_sinks:
            largest = jnp.maximum(largest_ref[...], sinks_ref[...])
            scale = jnp.exp(largest_ref[...] - largest)
            total = total * scale + jnp.exp(sinks_ref[...] - largest)
        out = sum_ref[...] * (scale / jnp.maximum(total, 1e-30))
        out_ref[...] = out[None].astype(out_ref.dtype)


def write(
    cache: Float[Array, "B S K H"], new: Float[Array, "B 1 K H"], slots: Int[Array, " B"]
) -> Float[Array, "B S K H"]:
    """Write one token per row into its slot of a cache, in place; skip slots outside the cache.

    With a scatter, XLA would store the cache with H along the lanes, half of them empty, and at
    every step transpose the whole cache to the order that `cached_attention` reads.
    """
    B, S, K, H = cache.shape
    width = min(S, LANES)

    def of_slot(b, slots):
        return (b, 0, 0, jnp.clip(slots[b], 0, S - 1) // width)

    block = pl.BlockSpec((1, K, H, width), of_slot)
    flipped = pl.pallas_call(
        functools.partial(_write_kernel, keys=S),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B,),
            in_specs=[pl.BlockSpec((1, K, H, 1), lambda b, _: (b, 0, 0, 0)), block],
            out_specs=block,
        ),
        out_shape=jax.ShapeDtypeStruct((B, K, H, S), cache.dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0,
            bytes_accessed=2 * B * K * H * width * cache.dtype.itemsize,
            transcendentals=0,
        ),
        name="write_cache",
        interpret=chips.tpu_interpreter(),
    )(
        slots.astype(jnp.int32),
        jnp.transpose(new, (0, 2, 3, 1)).astype(cache.dtype),
        jnp.transpose(cache, (0, 2, 3, 1)),
    )
    return jnp.transpose(flipped, (0, 3, 1, 2))


def _write_kernel(slots_ref, new_ref, cache_ref, out_ref, *, keys: int):
    """Copy a block of slots and replace one of them."""
    slot, width = slots_ref[pl.program_id(0)], cache_ref.shape[-1]
    first = jnp.clip(slot, 0, keys - 1) // width * width
    lane = jax.lax.broadcasted_iota(jnp.int32, cache_ref.shape, 3)
    here = (lane + first == slot) & (slot < keys)
    out_ref[...] = jnp.where(here, new_ref[...], cache_ref[...])
