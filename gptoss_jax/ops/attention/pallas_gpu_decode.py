"""Attention of few queries to a key/value cache on Hopper: keys are split over the chip.

There is one program per batch row, kv head and split. With P splits, a program streams every P-th
block of the keys that its row sees through shared memory. The queries of its kv head are the rows
of one WGMMA tile. The results of all splits are then merged.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gptoss_jax import chips
from gptoss_jax.ops.attention import xla
from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.attention.sink_algebra import apply_sinks
from gptoss_jax.ops.attention.split import merge

ROWS = 64  # rows of a WGMMA tile, for the queries (T * G) of one kv head
MAX_QUERIES = 8  # largest T; more queries are a prefill
GRANULE = 8  # rows of a tile of shared memory; the G rows of a position are padded to this
MAX_SPLITS = 64  # the merge reads all splits one by one


class Blocks(NamedTuple):
    """How keys are split into blocks."""

    keys: int  # keys per block
    stages: int  # blocks in flight
    programs: int  # programs that fill the chip


# 64 keys of head_dim 64 take 16 KiB with their values, so 4 stages leave room for two programs per
# SM.
BLOCKS = {"h100": Blocks(64, 4, 264), "h200": Blocks(64, 4, 264)}


def refuse(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    sinks: Float[Array, " N"] | None,
    *,
    window: int | None,
    segments: tuple[Int[Array, "B T"], Int[Array, "B S"]],
    positions: tuple[Int[Array, "B T"], Int[Array, "B S"]],
) -> str | None:
    """Return why the kernel can't run, or None."""
    del sinks, window, segments, positions
    reason = chips.refuse_hopper_kernel()
    if reason is not None:
        return reason
    (T, N, H), (S, K), dtypes = q.shape[1:], k.shape[1:3], (q.dtype, k.dtype, v.dtype)
    if set(dtypes) != {jnp.dtype(jnp.bfloat16)}:
        return f"it is for bfloat16, not {dtypes}"
    if T > MAX_QUERIES:
        return f"it is for up to {MAX_QUERIES} queries a sequence, not {T}"
    if T * _padded(N // K) > ROWS:
        return f"a kv head has {T} * {_padded(N // K)} rows of queries, and {ROWS} fit"
    if H % 16 or H > 128:
        return f"head_dim {H} has to be a multiple of 16 up to 128"
    if S % GRANULE or BLOCKS[chips.current().kind].keys > S:
        return f"a cache of {S} slots is not a multiple of {GRANULE}, or is less than a block"
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

    Blocks before the first and after the last block that a row's queries see are not read. The
    gradient, which decoding does not need, is that of the XLA implementation.
    """
    return _attend(window, q, k, v, sinks, segments, positions)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(window: int | None, q: Any, k: Any, v: Any, sinks: Any, segments: Any, positions: Any):
    blocks = BLOCKS[chips.current().kind]
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    count = -(-S // blocks.keys)
    splits = min(count, MAX_SPLITS, -(-blocks.programs // (B * K)))
    rows = jnp.pad(q.reshape(B, T, K, G, H), [(0, 0)] * 3 + [(0, _padded(G) - G), (0, 0)])
    where = [_in_blocks(x[1], blocks.keys) for x in (positions, segments)]
    bounds = []
    if splits < count:  # otherwise each program has one block and needs no bounds
        seen = visible(segments[0], segments[1], positions[0], positions[1], window).any(axis=1)
        bounds = _bounds(seen, blocks.keys, count)
    outs, lses = _kernel(blocks, splits, window)(
        rows, k, v, positions[0], segments[0], *where, *bounds
    )
    outs = outs[..., :G, :].reshape(splits, B, T, N, H)
    lses = lses[..., :G].reshape(splits, B, T, N)
    return apply_sinks(*merge(outs, lses), sinks).astype(q.dtype)


def _attend_fwd(window: int | None, *operands: Any) -> tuple[Any, Any]:
    return _attend(window, *operands), operands


def _attend_bwd(window: int | None, operands: Any, d_out: Any) -> tuple[Any, ...]:
    *arrays, segments, positions = operands
    attend = functools.partial(
        xla.cached_attention, window=window, segments=segments, positions=positions
    )
    return (*jax.vjp(attend, *arrays)[1](d_out), None, None)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _mosaic_gpu() -> Any:
    """Import Mosaic GPU only when needed: older versions of jax have other names in it."""
    from jax.experimental.pallas import mosaic_gpu

    return mosaic_gpu


def _padded(G: int) -> int:
    return -(-G // GRANULE) * GRANULE


def _in_blocks(x: Int[Array, "B S"], keys: int) -> Int[Array, "B S"]:
    """Pad with zeros (segment 0) to whole blocks; reads past the end of the cache give zeros."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % keys)])


def _bounds(seen: Bool[Array, "B S"], keys: int, count: int) -> tuple[Int[Array, " B"], ...]:
    """Return the first block with a visible key and the end of the last; (count, 0) if none."""
    block = jnp.arange(seen.shape[1], dtype=jnp.int32) // keys
    first = jnp.min(jnp.where(seen, block, count), axis=1)
    return first, jnp.max(jnp.where(seen, block + 1, 0), axis=1)


def _kernel(blocks: Blocks, splits: int, window: int | None) -> Any:
    """Return the kernel, which maps queries and cache to partial outputs and logsumexps.

    R is the padded G. The arguments are q [B, T, K, R, H], k and v [B, S, K, H], positions and
    segments of queries [B, T], positions and segments of keys [B, S padded to blocks], and unless
    all blocks are read, the first block and the end [B]. The results are out
    [splits, B, T, K, R, H] and lse [splits, B, T, K, R], in float32.
    """
    plgpu = _mosaic_gpu()

    def call(q, k, *rest):
        B, T, K, R, H = q.shape
        shape = (splits, B, T, K, R)
        return plgpu.kernel(
            functools.partial(
                _body, blocks=blocks, splits=splits, window=window, scale=H**-0.5, R=R
            ),
            out_type=(
                jax.ShapeDtypeStruct((*shape, H), jnp.float32),
                jax.ShapeDtypeStruct(shape, jnp.float32),
            ),
            scratch_types=_scratch(blocks, T, H),
            grid=(B, K, splits),
            grid_names=("batch", "head", "split"),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            interpret=chips.gpu_interpreter(),
        )(q, k, *rest)

    return call


def _scratch(blocks: Blocks, T: int, H: int) -> dict[str, Any]:
    """Return the kernel's shared memory and barriers."""
    plgpu = _mosaic_gpu()

    # Use the widest swizzle whose tiles divide the columns. Both operands of a product must have
    # the same swizzle.
    def matrix(*shape, columns: int = H, dtype: Any = jnp.bfloat16):
        row = columns * jnp.dtype(dtype).itemsize
        swizzle = next(size for size in (128, 64, 32) if row % size == 0)
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    stages, keys = blocks.stages, blocks.keys
    return {
        "q_smem": matrix(ROWS, H),
        "k_smem": matrix(stages, keys, H),
        "v_smem": matrix(stages, keys, H),
        "p_smem": matrix(ROWS, keys),
        "positions_smem": plgpu.SMEM((stages, keys), jnp.int32),
        "segments_smem": plgpu.SMEM((stages, keys), jnp.int32),
        "out_smem": matrix(ROWS, H, dtype=jnp.float32),
        "lse_smem": plgpu.SMEM((ROWS,), jnp.float32),
        "arrived": plgpu.Barrier(num_arrivals=4, num_barriers=stages),
        "begun": plgpu.Barrier(num_arrivals=T),
    }


def _body(
    q_ref, k_ref, v_ref, q_positions, q_segments, k_positions, k_segments, *rest,
    q_smem, k_smem, v_smem, p_smem, positions_smem, segments_smem, out_smem, lse_smem,
    arrived, begun, blocks, splits, window, scale, R,
) -> None:  # fmt: skip
    """Attend from the queries of one kv head to the blocks first + split + i * splits of keys."""
    from jax.experimental import pallas as pl

    plgpu = _mosaic_gpu()

    *bounds, out_ref, lse_ref = rest
    (stages, keys), (T, H) = (blocks.stages, blocks.keys), (q_ref.shape[1], q_ref.shape[4])
    batch, head, split = (jax.lax.axis_index(name) for name in ("batch", "head", "split"))
    first, end = (x[batch] for x in bounds) if bounds else (0, k_positions.shape[1] // keys)
    mine = first + split
    steps = jnp.maximum(end - mine + splits - 1, 0) // splits
    by_row, by_column = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
    tile = (ROWS, keys)

    def fetch(step):
        slot = jax.lax.rem(step, stages)
        where = pl.ds((mine + step * splits) * keys, keys)
        for source, target in (
            (k_ref.at[batch, where, head], k_smem),
            (v_ref.at[batch, where, head], v_smem),
            (k_positions.at[batch, where], positions_smem),
            (k_segments.at[batch, where], segments_smem),
        ):
            plgpu.copy_gmem_to_smem(source, target.at[slot], arrived.at[slot])

    for t in range(T):
        plgpu.copy_gmem_to_smem(q_ref.at[batch, t, head], q_smem.at[pl.ds(t * R, R)], begun)
    for step in range(stages):
        pl.when(step < steps)(functools.partial(fetch, jnp.int32(step)))
    query_places = [(q_positions[batch, t], q_segments[batch, t]) for t in range(T)]
    plgpu.barrier_wait(begun)

    def over_columns(x, shape=tile):
        return jax.lax.broadcast_in_dim(x, shape, [0])

    def mask(slot):
        """Return 0 for visible keys and MASKED for others; rows from T * R on are never read."""
        position = plgpu.load(positions_smem.at[slot], layout=by_column)
        segment = plgpu.load(segments_smem.at[slot], layout=by_column)
        row = plgpu.broadcasted_iota(jnp.int32, tile, 0, layout=plgpu.Layout.WGMMA)
        total = None
        for t, (q_position, q_segment) in reversed(list(enumerate(query_places))):
            distance = q_position - position
            seen = (segment == q_segment) & (segment != 0) & (distance >= 0)
            seen = seen if window is None else seen & (distance < window)
            one = jax.lax.broadcast_in_dim(jnp.where(seen, 0.0, MASKED), tile, [1])
            total = one if total is None else jnp.where(row < (t + 1) * R, one, total)
        return total

    def attend(step, carry):
        out, largest, total = carry
        slot = jax.lax.rem(step, stages)
        plgpu.barrier_wait(arrived.at[slot])

        def products(acc):
            plgpu.wgmma(acc, q_smem, k_smem.at[slot].T)
            return acc[...]

        # Logits are in units of log 2, so that a weight is one exp2.
        logits = pl.run_scoped(products, plgpu.ACC(tile, jnp.float32))
        logits = logits * (scale * math.log2(math.e)) + mask(slot)
        larger = jnp.maximum(largest, logits.max(axis=1))
        decay = jnp.exp2(largest - larger)
        p = jnp.exp2(logits - over_columns(larger))
        p_smem[...] = p.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def outputs(acc):
            plgpu.wgmma(acc, p_smem, v_smem.at[slot])
            return acc[...]

        # Not accumulated in place: in the interpreter an accumulator can't start from a value.
        more = pl.run_scoped(outputs, plgpu.ACC(out.shape, jnp.float32))
        out = out * over_columns(decay, out.shape) + more
        pl.when(step + stages < steps)(lambda: fetch(step + stages))
        return out, larger, total * decay + p.sum(axis=1)

    out, largest, total = jax.lax.fori_loop(
        0,
        steps,
        attend,
        (
            plgpu.layout_cast(jnp.zeros((ROWS, H), jnp.float32), plgpu.Layout.WGMMA),
            # Start above MASKED, so that a row that sees nothing has weights of zero.
            plgpu.layout_cast(jnp.full((ROWS,), MASKED / 10, jnp.float32), by_row),
            plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), by_row),
        ),
    )
    positive = jnp.maximum(total, 1e-30)
    out_smem[...] = out * over_columns(1.0 / positive, out.shape)
    lse = largest * math.log(2) + jnp.log(positive)
    lse_smem[...] = jnp.where(total > 0, lse, -jnp.inf)
    plgpu.commit_smem()
    for t in range(T):
        rows, target = pl.ds(t * R, R), (split, batch, t, head)
        plgpu.copy_smem_to_gmem(out_smem.at[rows], out_ref.at[target])
        plgpu.copy_smem_to_gmem(lse_smem.at[rows], lse_ref.at[target])
    plgpu.wait_smem_to_gmem(0)
