"""The Hopper kernels of attention: forward, dq, and dk with dv. See pallas_gpu.py for an overview.

Every thread block has some warpgroups that compute and one, the feeder, that loads their data. The
feeder copies the tiles of the loop from global to shared memory by TMA, and is ahead by as many
steps as there are stages. Products use WGMMA, with the probabilities as an operand in registers.
The interpreter has no such operand, so there the probabilities pass through shared memory
(`staged`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

MASKED = -1e30  # a masked logit; finite, so that inf - inf never occurs
NOTHING = MASKED / 10  # initial value of a row's largest logit: above MASKED, below real logits
LOG2E = math.log2(math.e)
TINY = 1e-30

GRID = ("group", "tile", "row")  # the first varies fastest: neighbours share keys and values
WGMMA = plgpu.Layout.WGMMA
ROWS = WGMMA.reduce(1)  # layout of a vector with one entry per row of a WGMMA tile
COLUMNS = WGMMA.reduce(0)

ACC: Any = plgpu.WGMMAAccumulatorRef
_load: Any = plgpu.load  # Any, because its arguments differ between versions

WARPGROUPS = 2  # computing warpgroups in a thread block
# Registers per thread: two computing warpgroups and the feeder share the 65536 of an SM.
FEEDER_REGISTERS = 24
COMPUTE_REGISTERS = 240


class Blocks(NamedTuple):
    """Query and key rows of one warpgroup's step, steps in flight, and two options.

    `in_turn`: a thread block goes through all query heads of its kv head, and loads the rows of the
    next head meanwhile; this pays off if a row has few blocks of keys. `alternate` (forward only):
    one warpgroup multiplies while the other computes exponentials.
    """

    queries: int
    keys: int
    stages: int
    in_turn: bool = False
    alternate: bool = False


class Task(NamedTuple):
    """The static parameters of a call. `scale` multiplies logits; tiles must divide T."""

    scale: float
    blocks: Blocks
    interpreter: Any  # `interpret=` of the kernel

    @property
    def staged(self) -> bool:
        """Return whether register operands pass through shared memory."""
        return bool(self.interpreter)


class Band(NamedTuple):
    """Which keys each query sees, and which queries see each key, as ranges of indices.

    Query i sees keys low[i]..i. Queries j..high[j] see key j. If there are none, low is T and high
    is -1.
    """

    low: Int[Array, "B T"]
    high: Int[Array, "B T"]


def _tile(*shape: int, dtype: Any, swizzle: int = 128) -> Any:
    """Return a scratch tile in shared memory, in the layout that TMA writes and WGMMA reads."""
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _product(a: Any, b: Any) -> Array:
    """Return the product of two tiles in shared memory, in float32 registers."""

    def run(ref):
        plgpu.wgmma(ref, a, b)
        return ref[...]

    return pl.run_scoped(run, ACC((a.shape[0], b.shape[1]), jnp.float32))


def _accumulate(ref: Any, a: Array, b: Any, stage: Any) -> None:
    """Start to add `a` @ `b` to the accumulator `ref`; `a` in registers, `b` in shared memory."""
    if stage is not None:
        stage[...] = a
        plgpu.commit_smem()
        a = stage
    plgpu.wgmma(ref, a, b)


def _add_product(total: Array, a: Array, b: Any, stage: Any) -> Array:
    """Return `total` + `a` @ `b`, with `a` in registers and `b` in shared memory."""
    if stage is None:
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(ACC.init(total))
    stage[...] = a
    plgpu.commit_smem()
    return total + _product(stage, b)


def _zeros(shape: tuple[int, ...], layout: Any, value: float = 0.0) -> Array:
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def _spread(x: Array, shape: tuple[int, int], axis: int) -> Array:
    """Broadcast a vector along the other axis of a tile."""
    return lax.broadcast_in_dim(x, shape, [axis])


def _iota(shape: tuple[int, int], axis: int) -> Array:
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=WGMMA)


def _load_rows(ref: Any, *index: Any) -> Array:
    """Load a vector from global memory, with one entry per row of a WGMMA tile."""
    return _load(ref.at[index], layout=ROWS, optimized=False)


class Stream(NamedTuple):
    """Tiles that the feeder loads together, each from `source(step)` to `tiles[slot]`.

    `copies` lists the pairs (source, tiles). `ready` and `free` are the barriers of the slots.
    """

    copies: Sequence[tuple[Callable[[Any], Any], Any]]
    ready: Any
    free: Any


def _feed(streams: Sequence[Stream], steps: Any, stages: int) -> None:
    """Copy the tiles of every step, as soon as the computing warpgroups have freed the slot."""
    plgpu.set_max_registers(FEEDER_REGISTERS, action="decrease")

    @pl.loop(0, steps)
    def _(step):
        slot = lax.rem(step, stages)
        for stream in streams:

            @pl.when(step >= stages)
            def _(stream=stream):
                plgpu.barrier_wait(stream.free.at[slot])

            for source, tiles in stream.copies:
                plgpu.copy_gmem_to_smem(source(step), tiles.at[slot], stream.ready.at[slot])

    @pl.loop(lax.max(steps - stages, 0), steps)
    def _(step):
        for stream in streams:
            plgpu.barrier_wait(stream.free.at[lax.rem(step, stages)])


def _call(body: Any, task: Task, *, out: Any, scratch: dict[str, Any], grid: Any, name: str) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=GRID,
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name=name,
        interpret=task.interpreter,
    )


def heads_of_a_tile(N: int, K: int) -> int:
    """Return how many query heads a thread block works on: one per warpgroup, or a single one.

    Two heads with the same rows need the same keys at every step. Two blocks of rows of one head
    need different keys at the ends of the band.
    """
    return WARPGROUPS if (N // K) % WARPGROUPS == 0 else 1


def query_tile(N: int, K: int, blocks: Blocks) -> int:
    """Return the number of query rows that a thread block covers."""
    return blocks.queries * WARPGROUPS // heads_of_a_tile(N, K)


class _Place(NamedTuple):
    """The work of this warpgroup, in a thread block that loops over keys."""

    batch: Any
    kv_head: Any
    head: Any  # the query head of this warpgroup's first turn
    tile: Any
    row: Any  # this warpgroup's first row
    first: Any  # the first block of keys
    steps: Any  # the number of blocks of keys


def _turns(N: int, K: int, blocks: Blocks) -> int:
    """Return the number of turns of a thread block; it works on other heads in each turn."""
    return N // K // heads_of_a_tile(N, K) if blocks.in_turn else 1


def _place_of_queries(start_ref: Any, q_ref: Any, K: int, blocks: Blocks) -> _Place:
    """Return this warpgroup's work; the longest rows of the causal triangle come first."""
    N = q_ref.shape[2]
    heads, rows = heads_of_a_tile(N, K), query_tile(N, K, blocks)
    wg = lax.axis_index("wg")
    batch, kv_head = lax.div(lax.axis_index("row"), K), lax.rem(lax.axis_index("row"), K)
    tile = q_ref.shape[1] // rows - 1 - lax.axis_index("tile")
    head = kv_head * (N // K) + lax.axis_index("group") * heads * _turns(N, K, blocks)
    row = tile * rows
    if heads > 1:
        head += wg
    else:
        row += wg * blocks.queries
    first = start_ref[batch, tile]
    last = lax.div((tile + 1) * rows - 1, blocks.keys) + 1
    return _Place(batch, kv_head, head, tile, row, first, lax.max(last - first, 0))


def _grid_of_queries(q: Array, K: int, blocks: Blocks) -> tuple[int, int, int]:
    B, T, N, _ = q.shape
    groups = N // K // heads_of_a_tile(N, K) // _turns(N, K, blocks)
    return (groups, T // query_tile(N, K, blocks), B * K)


def _in_turn(turns: int, slots: int, fetch: Any, work: Any) -> None:
    """Run `work(turn, slot)` for each turn; `fetch(turn, slot)` runs one turn ahead of it."""
    fetch(0, 0)

    @pl.loop(0, turns)
    def _(turn):
        if turns > 1:

            @pl.when(turn + 1 < turns)
            def _():
                fetch(turn + 1, lax.rem(turn + 1, slots))

        work(turn, lax.rem(turn, slots))


def _feed_keys(k_stream: Any, v_stream: Any, at: _Place, turns: int, blocks: Blocks) -> None:
    """Load the blocks of keys and of values; each stream is (reference, tiles, ready, free)."""

    def stream(ref, tiles, ready, free):
        def source(i):
            block = at.first + lax.rem(i, at.steps)
            return ref.at[at.batch, pl.ds(block * blocks.keys, blocks.keys), at.kv_head]

        return Stream([(source, tiles)], ready, free)

    _feed((stream(*k_stream), stream(*v_stream)), at.steps * turns, blocks.stages)


def _cut_to(low: Array, row: Any, key: Any, shape: tuple[int, int]) -> Callable[[Array], Array]:
    """Return a function that masks a tile of logits: queries from `row` on, keys from `key` on."""

    def masked(logits):
        keys = _iota(shape, 1) + key
        seen = (keys >= _spread(low, shape, 0)) & (keys <= _iota(shape, 0) + row)
        return jnp.where(seen, logits, MASKED)

    return masked


def _spans(low: Array, rows: int, keys: int) -> tuple[Array, Array]:
    """Return each query tile's first block of keys, and the key from which `low` masks no row."""
    tiles = low.reshape(low.shape[0], -1, rows)
    return tiles.min(-1) // keys, tiles.max(-1)


def forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    sinks: Float[Array, " N"] | None,
    band: Band,
    task: Task,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Return the output, and each row's float32 logsumexp of its logits and sink."""
    B, T, N, H = q.shape
    K, blocks = k.shape[2], task.blocks
    bq, bk, stages, *_ = blocks
    turns, heads = _turns(N, K, blocks), heads_of_a_tile(N, K)
    slots = min(turns, 2)
    scale = task.scale * LOG2E  # logits in units of log 2, for exp2
    start, clear = _spans(band.low, query_tile(N, K, blocks), bk)

    def body(
        q_ref, k_ref, v_ref, sinks_ref, low_ref, start_ref, clear_ref, out_ref, lse_ref,
        *, q_tile, k_tile, v_tile, p_tile, out_tile, lse_tile,
        q_ready, k_ready, v_ready, k_free, v_free, meeting,
    ):  # fmt: skip
        wg = lax.axis_index("wg")
        at = _place_of_queries(start_ref, q_ref, K, blocks)
        rows = pl.ds(at.row, bq)

        def arrive():
            if meeting is not None:
                plgpu.barrier_arrive(meeting)

        def meet():
            if meeting is not None:
                plgpu.barrier_wait(meeting)

        def lag(behind):
            """Let warpgroup `behind` meet once more: first 1, to lag half a step; at the end 0."""
            if meeting is not None:

                @pl.when(wg == behind)
                def _():
                    arrive()
                    meet()

        def fetch(turn, slot):
            source = q_ref.at[at.batch, rows, at.head + turn * heads]
            plgpu.copy_gmem_to_smem(source, q_tile.at[slot, wg], q_ready.at[slot, wg])

        def one_head(turn, slot_of_q, low, from_clear):
            head = at.head + turn * heads
            if sinks_ref is None:
                largest, total = _zeros((bq,), ROWS, NOTHING), _zeros((bq,), ROWS)
            else:
                largest = jnp.broadcast_to(sinks_ref[head] * LOG2E, (bq,))
                largest, total = plgpu.layout_cast(largest, ROWS), _zeros((bq,), ROWS, 1.0)
            plgpu.barrier_wait(q_ready.at[slot_of_q, wg])

            def step(i, carry):
                acc, largest, total = carry
                slot = lax.rem(turn * at.steps + i, stages)
                key = (at.first + i) * bk
                plgpu.barrier_wait(k_ready.at[slot])

                def first_product(ref):
                    plgpu.wgmma(ref, q_tile.at[slot_of_q, wg], k_tile.at[slot].T)
                    arrive()
                    meet()
                    return ref[...]

                logits = pl.run_scoped(first_product, ACC((bq, bk), jnp.float32))
                plgpu.barrier_arrive(k_free.at[slot])
                cut = (key < from_clear) | (key + bk - 1 > at.row)
                masked = _cut_to(low, at.row, key, (bq, bk))
                logits = lax.cond(cut, masked, lambda logits: logits, logits)
                new = jnp.maximum(largest, logits.max(axis=1) * scale)
                shrink = jnp.exp2(largest - new)
                p = jnp.exp2(logits * scale - _spread(new, (bq, bk), 0))
                total = total * shrink + p.sum(axis=1)
                acc *= _spread(shrink, (bq, H), 0)
                p = p.astype(v_ref.dtype)
                if meeting is not None:
                    acc, total, new, p = lax.optimization_barrier((acc, total, new, p))
                arrive()
                plgpu.barrier_wait(v_ready.at[slot])
                meet()
                stage = None if p_tile is None else p_tile.at[wg]
                acc = _add_product(acc, p, v_tile.at[slot], stage)
                plgpu.barrier_arrive(v_free.at[slot])
                return acc, new, total

            carry = (_zeros((bq, H), WGMMA), largest, total)
            acc, largest, total = lax.fori_loop(0, at.steps, step, carry)
            total = jnp.maximum(total, TINY)
            acc *= _spread(1 / total, (bq, H), 0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the turn before
            out_tile[wg] = acc.astype(q_ref.dtype)
            lse_tile[wg] = largest * (1 / LOG2E) + jnp.log(total)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_tile.at[wg], out_ref.at[at.batch, rows, head])
            plgpu.copy_smem_to_gmem(lse_tile.at[wg], lse_ref.at[at.batch, head, rows])

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            low = _load_rows(low_ref, at.batch, rows)
            from_clear = clear_ref[at.batch, at.tile]
            lag(1)
            _in_turn(turns, slots, fetch, lambda i, slot: one_head(i, slot, low, from_clear))
            lag(0)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == WARPGROUPS)
        def _():
            k_stream, v_stream = (k_ref, k_tile, k_ready, k_free), (v_ref, v_tile, v_ready, v_free)
            _feed_keys(k_stream, v_stream, at, turns, blocks)

    scratch = {
        "q_tile": _tile(slots, WARPGROUPS, bq, H, dtype=q.dtype),
        "k_tile": _tile(stages, bk, H, dtype=k.dtype),
        "v_tile": _tile(stages, bk, H, dtype=v.dtype),
        "p_tile": _tile(WARPGROUPS, bq, bk, dtype=v.dtype) if task.staged else None,
        "out_tile": _tile(WARPGROUPS, bq, H, dtype=q.dtype),
        "lse_tile": plgpu.SMEM((WARPGROUPS, bq), jnp.float32),
        "q_ready": plgpu.Barrier(num_barriers=(slots, WARPGROUPS)),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "v_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "meeting": plgpu.Barrier(num_arrivals=WARPGROUPS) if blocks.alternate else None,
    }
    out = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)]
    run = _call(
        body, task, out=out, scratch=scratch, grid=_grid_of_queries(q, K, blocks),
        name="attention_forward",
    )  # fmt: skip
    out, lse = run(q, k, v, sinks, band.low, start, clear)
    return out, lse


def backward_queries(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    band: Band,
    task: Task,
) -> Float[Array, "B T N H"]:
    """Return the gradient of `q`; `delta` is each row's sum of d_out * out in float32."""
    N, H = q.shape[2:]
    K, blocks = k.shape[2], task.blocks
    bq, bk, stages, *_ = blocks
    turns, heads = _turns(N, K, blocks), heads_of_a_tile(N, K)
    slots = min(turns, 2)
    scale = task.scale * LOG2E
    start, clear = _spans(band.low, query_tile(N, K, blocks), bk)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, low_ref, start_ref, clear_ref, dq_ref,
        *, q_tile, do_tile, k_tile, v_tile, ds_tile, dq_tile,
        rows_ready, k_ready, v_ready, k_free, v_free,
    ):  # fmt: skip
        wg = lax.axis_index("wg")
        at = _place_of_queries(start_ref, q_ref, K, blocks)
        rows = pl.ds(at.row, bq)

        def fetch(turn, slot):
            for ref, tile in ((q_ref, q_tile), (do_ref, do_tile)):
                source = ref.at[at.batch, rows, at.head + turn * heads]
                plgpu.copy_gmem_to_smem(source, tile.at[slot, wg], rows_ready.at[slot, wg])

        def one_head(turn, slot_of_q, low, from_clear, dq):
            head = at.head + turn * heads
            lse = _load_rows(lse_ref, at.batch, head, rows) * LOG2E
            delta = _load_rows(delta_ref, at.batch, head, rows)
            stage = None if ds_tile is None else ds_tile.at[wg]
            plgpu.barrier_wait(rows_ready.at[slot_of_q, wg])

            @pl.loop(0, at.steps)
            def _(i):
                slot = lax.rem(turn * at.steps + i, stages)
                key = (at.first + i) * bk

                def products(logits, d_p):
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.wgmma(logits, q_tile.at[slot_of_q, wg], k_tile.at[slot].T)
                    plgpu.barrier_wait(v_ready.at[slot])
                    plgpu.wgmma(d_p, do_tile.at[slot_of_q, wg], v_tile.at[slot].T)
                    logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                    cut = (key < from_clear) | (key + bk - 1 > at.row)
                    masked = _cut_to(low, at.row, key, (bq, bk))
                    logits = lax.cond(cut, masked, lambda logits: logits, logits)
                    p = jnp.exp2(logits * scale - _spread(lse, (bq, bk), 0))
                    return p, d_p[...]

                tile = ACC((bq, bk), jnp.float32)
                p, d_p = pl.run_scoped(products, tile, tile)
                plgpu.barrier_arrive(v_free.at[slot])
                ds = p * (d_p - _spread(delta, (bq, bk), 0))
                _accumulate(dq, ds.astype(k_ref.dtype), k_tile.at[slot], stage)
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(k_free.at[slot])

            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the turn before
            dq_tile[wg] = (dq[...] * task.scale).astype(dq_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dq_tile.at[wg], dq_ref.at[at.batch, rows, head])

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            low = _load_rows(low_ref, at.batch, rows)
            from_clear = clear_ref[at.batch, at.tile]

            def work(turn, slot):
                run = functools.partial(one_head, turn, slot, low, from_clear)
                pl.run_scoped(run, ACC((bq, H), jnp.float32))

            _in_turn(turns, slots, fetch, work)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg == WARPGROUPS)
        def _():
            k_stream, v_stream = (k_ref, k_tile, k_ready, k_free), (v_ref, v_tile, v_ready, v_free)
            _feed_keys(k_stream, v_stream, at, turns, blocks)

    scratch = {
        "q_tile": _tile(slots, WARPGROUPS, bq, H, dtype=q.dtype),
        "do_tile": _tile(slots, WARPGROUPS, bq, H, dtype=q.dtype),
        "k_tile": _tile(stages, bk, H, dtype=k.dtype),
        "v_tile": _tile(stages, bk, H, dtype=v.dtype),
        "ds_tile": _tile(WARPGROUPS, bq, bk, dtype=k.dtype) if task.staged else None,
        "dq_tile": _tile(WARPGROUPS, bq, H, dtype=q.dtype),
        "rows_ready": plgpu.Barrier(num_barriers=(slots, WARPGROUPS), num_arrivals=2),
        "k_ready": plgpu.Barrier(num_barriers=stages),
        "v_ready": plgpu.Barrier(num_barriers=stages),
        "k_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "v_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
    }
    run = _call(
        body, task, out=jax.ShapeDtypeStruct(q.shape, q.dtype), scratch=scratch,
        grid=_grid_of_queries(q, K, blocks), name="attention_backward_queries",
    )  # fmt: skip
    return run(q, k, v, d_out, lse, delta, band.low, start, clear)


def backward_keys(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    d_out: Float[Array, "B T N H"],
    lse: Float[Array, "B N T"],
    delta: Float[Array, "B N T"],
    band: Band,
    task: Task,
) -> tuple[Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Return the gradients of `k` and `v`, summed in float32 over the query heads of each kv head.

    A warpgroup owns rows of keys. All products use transposed tiles, keys by queries.
    """
    B, T, N, H = q.shape
    K, G = k.shape[2], N // k.shape[2]
    bq, bk, stages, *_ = task.blocks
    scale = task.scale * LOG2E
    # The queries of a product must fill a swizzle, whose elements have 2 bytes.
    tile = functools.partial(_tile, swizzle=min(128, 2 * bq))
    of_warpgroup = band.high.reshape(B, -1, bk)
    stop, clear = of_warpgroup.max(-1), of_warpgroup.min(-1)

    def body(
        q_ref, k_ref, v_ref, do_ref, lse_ref, delta_ref, high_ref, stop_ref, clear_ref,
        dk_ref, dv_ref, *, k_tile, v_tile, q_tile, do_tile, lse_tile, delta_tile, p_tile,
        rows_ready, q_ready, do_ready, q_free, do_free,
    ):  # fmt: skip
        wg = lax.axis_index("wg")
        batch, kv_head = lax.div(lax.axis_index("row"), K), lax.rem(lax.axis_index("row"), K)
        place = lax.axis_index("tile") * WARPGROUPS
        first = lax.div(place * bk, bq)
        stops = [stop_ref[batch, place + i] for i in range(WARPGROUPS)]
        last = functools.reduce(lax.max, stops)
        blocks = lax.select(last < 0, 0, lax.div(last, bq) + 1 - first)
        steps = blocks * G

        def query_of(i):
            return (first + lax.rem(i, blocks)) * bq

        def compute(dk, dv):
            row = (place + wg) * bk
            rows = pl.ds(row, bk)
            for ref, tiles in ((k_ref, k_tile), (v_ref, v_tile)):
                plgpu.copy_gmem_to_smem(
                    ref.at[batch, rows, kv_head], tiles.at[wg], rows_ready.at[wg]
                )
            high = _load_rows(high_ref, batch, rows)
            until_clear = clear_ref[batch, place + wg]
            stop = stop_ref[batch, place + wg]
            stage = None if p_tile is None else p_tile.at[wg]
            plgpu.barrier_wait(rows_ready.at[wg])

            def step(slot, query):
                def masked(logits):
                    queries = _iota((bk, bq), 1) + query
                    seen = (queries <= _spread(high, (bk, bq), 0)) & (
                        queries >= _iota((bk, bq), 0) + row
                    )
                    return jnp.where(seen, logits, MASKED)

                def products(logits, d_p):
                    plgpu.wgmma(logits, k_tile.at[wg], q_tile.at[slot].T)
                    plgpu.barrier_wait(do_ready.at[slot])
                    plgpu.wgmma(d_p, v_tile.at[wg], do_tile.at[slot].T)
                    lse = _load(lse_tile.at[slot], layout=COLUMNS) * LOG2E
                    logits = plgpu.wgmma_accumulator_load(logits, wait_n=1)
                    cut = (query < row + bk - 1) | (query + bq - 1 > until_clear)
                    logits = lax.cond(cut, masked, lambda logits: logits, logits)
                    p = jnp.exp2(logits * scale - _spread(lse, (bk, bq), 1))
                    _accumulate(dv, p.astype(do_ref.dtype), do_tile.at[slot], stage)
                    d_p = plgpu.wgmma_accumulator_load(d_p, wait_n=1)
                    delta = _load(delta_tile.at[slot], layout=COLUMNS)
                    return p * (d_p - _spread(delta, (bk, bq), 1))

                both = ACC((bk, bq), jnp.float32)
                ds = pl.run_scoped(products, both, both)
                _accumulate(dk, ds.astype(q_ref.dtype), q_tile.at[slot], stage)
                plgpu.wgmma_wait(0)

            @pl.loop(0, steps)
            def _(i):
                slot = lax.rem(i, stages)
                query = query_of(i)
                plgpu.barrier_wait(q_ready.at[slot])
                concerned = (query + bq > row) & (query <= stop)
                pl.when(concerned)(lambda: step(slot, query))

                @pl.when(jnp.logical_not(concerned))
                def _():
                    plgpu.barrier_wait(do_ready.at[slot])

                plgpu.barrier_arrive(q_free.at[slot])
                plgpu.barrier_arrive(do_free.at[slot])

            k_tile[wg] = (dk[...] * task.scale).astype(dk_ref.dtype)
            v_tile[wg] = dv[...].astype(dv_ref.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_tile.at[wg], dk_ref.at[batch, rows, kv_head])
            plgpu.copy_smem_to_gmem(v_tile.at[wg], dv_ref.at[batch, rows, kv_head])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(wg < WARPGROUPS)
        def _():
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            sums = ACC((bk, H), jnp.float32)
            pl.run_scoped(compute, sums, sums)

        @pl.when(wg == WARPGROUPS)
        def _():
            def at(i):
                return kv_head * G + lax.div(i, blocks), pl.ds(query_of(i), bq)

            def queries(ref):
                def source(i):
                    head, rows = at(i)
                    return ref.at[batch, rows, head]

                return source

            def sums(ref):
                def source(i):
                    return ref.at[(batch, *at(i))]

                return source

            streams = (
                Stream([(queries(q_ref), q_tile), (sums(lse_ref), lse_tile)], q_ready, q_free),
                Stream(
                    [(queries(do_ref), do_tile), (sums(delta_ref), delta_tile)], do_ready, do_free
                ),
            )
            _feed(streams, steps, stages)

    scratch = {
        "k_tile": tile(WARPGROUPS, bk, H, dtype=k.dtype),
        "v_tile": tile(WARPGROUPS, bk, H, dtype=v.dtype),
        "q_tile": tile(stages, bq, H, dtype=q.dtype),
        "do_tile": tile(stages, bq, H, dtype=q.dtype),
        "lse_tile": plgpu.SMEM((stages, bq), jnp.float32),
        "delta_tile": plgpu.SMEM((stages, bq), jnp.float32),
        "p_tile": tile(WARPGROUPS, bk, bq, dtype=q.dtype) if task.staged else None,
        "rows_ready": plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=2),
        "q_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "do_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
        "q_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
        "do_free": plgpu.Barrier(num_barriers=stages, num_arrivals=WARPGROUPS),
    }
    out = [jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)]
    run = _call(
        body, task, out=out, scratch=scratch, grid=(1, T // (WARPGROUPS * bk), B * K),
        name="attention_backward_keys",
    )  # fmt: skip
    dk, dv = run(q, k, v, d_out, lse, delta, band.high, stop, clear)
    return dk, dv
