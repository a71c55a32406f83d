"""The cases of benchmarks/kernels.py: every op, at the shapes of a model, each way it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from kernel_case import (
    LAYOUTS,
    Case,
    Sizes,
    backward,
    both,
    in_layout,
    names,
    normal,
    packed_weight,
    weight_bytes,
)

from gptoss_jax import chips
from gptoss_jax.ops import attention, cross_entropy, grouped_matmul, moe, mxfp4


def cases(sizes: Sizes) -> list[Case]:
    """Return all cases; those of other sizes come in the same order."""
    every: list[Case] = []
    for window in (sizes.W, None):
        every += [_attention(sizes, window, backward) for backward in (False, True)]
    for batch in sizes.batches:
        every += [_cached(sizes, batch, window) for window in (sizes.W, None)]
    every += [_experts(sizes, rows, packed=True, way="forward") for rows in sizes.decode]
    for packed in (True, False):
        for matrix in sizes.matrices:
            ways = ("forward", "d rows") if packed else ("forward", "d rows", "d weight")
            every += [_grouped(sizes, matrix, way, packed=packed) for way in ways]
        every += [
            _experts(sizes, sizes.prefill, packed=packed, way=way)
            for way in ("forward", "forward + backward")
        ]
    every += [_cross_entropy(sizes, wanted) for wanted in ((), (0,), (0, 1))]
    return [*every, _decode(sizes)]


def _attention(s: Sizes, window: int | None, backward: bool) -> Case:
    dtype = jnp.dtype(s.dtype)
    ones = jnp.ones((1, s.T), jnp.int32)
    positions = jnp.arange(s.T, dtype=jnp.int32)[None]

    def make(calls: int, layout: str | None) -> list[tuple]:
        every = []
        for i in range(calls):
            keys = jax.random.split(jax.random.key(i), 5)
            q, k, v, g = (
                normal(key, (1, s.T, n, s.H), dtype)
                for key, n in zip(keys[:4], (s.N, s.K, s.K, s.N), strict=True)
            )
            sinks = normal(keys[4], (s.N,), jnp.float32)
            every.append((q, k, v, sinks, ones, positions) + ((g,) if backward else ()))
        return every

    def run(implementation: str) -> Callable[..., Any]:
        def forward(q, k, v, sinks, segments, positions):
            return attention.attention(
                q, k, v, sinks=sinks, window=window, segment_ids=segments, positions=positions,
                implementation=implementation,
            )  # fmt: skip

        return both(forward, 4) if backward else forward

    width = min(window or s.T, s.T)
    pairs = width * s.T - width * (width - 1) / 2
    moved = dtype.itemsize * s.T * s.H * 2 * (s.N + s.K)
    return Case(
        "attention",
        f"{'full' if window is None else 'banded'} T={s.T}",
        "forward + backward" if backward else "forward",
        names(attention.SELF_ORDER),
        make,
        run,
        flops=4 * s.N * s.H * pairs * (3.5 if backward else 1),
        read=moved / 2 * (2 if backward else 1),
        written=moved / 2 * (2 if backward else 1),
        dtype=s.dtype,
    )


def _cached(s: Sizes, batch: int, window: int | None) -> Case:
    dtype, slots = jnp.dtype(s.dtype), window or s.S
    here = jnp.full((batch, 1), s.S - 1, jnp.int32)
    # A ring: position p in slot p % W.
    held = jnp.arange(slots, dtype=jnp.int32)
    held = held + (s.S - 1 - held) // slots * slots
    where = (jnp.ones((batch, 1), jnp.int32), here, jnp.ones((batch, slots), jnp.int32))

    def make(calls: int, layout: str | None) -> list[tuple]:
        every = []
        for i in range(calls):
            keys = jax.random.split(jax.random.key(i), 4)
            k, v = (normal(key, (batch, slots, s.K, s.H), dtype) for key in keys[:2])
            q = normal(keys[2], (batch, 1, s.N, s.H), dtype)
            sinks = normal(keys[3], (s.N,), jnp.float32)
            every.append((q, k, v, sinks, *where, jnp.broadcast_to(held, (batch, slots))))
        return every

    def run(implementation: str) -> Callable[..., Any]:
        def forward(q, k, v, sinks, segments, positions, kv_segments, kv_positions):
            return attention.attention(
                q, k, v, sinks=sinks, window=window, segment_ids=segments, positions=positions,
                kv_segment_ids=kv_segments, kv_positions=kv_positions,
                implementation=implementation,
            )  # fmt: skip

        return forward

    return Case(
        "cached attention",
        f"{'cache' if window is None else 'ring'} S={slots} batch {batch}",
        "forward",
        names(attention.CACHED_ORDER),
        make,
        run,
        flops=4 * batch * s.N * s.H * slots,
        read=dtype.itemsize * batch * s.H * (2 * slots * s.K + s.N) + 8 * batch * slots,
        written=dtype.itemsize * batch * s.H * s.N,
        dtype=s.dtype,
    )


def _grouped(s: Sizes, matrix: str, way: str, *, packed: bool) -> Case:
    dtype, P = jnp.dtype(s.dtype), s.prefill * s.A
    shape = (s.E, 2, s.F, s.D) if matrix == "gate_up" else (s.E, s.D, s.F)
    n, c = int(np.prod(shape[1:-1])), shape[-1]
    share = np.random.default_rng(0).dirichlet(np.full(s.E, 8.0))  # uneven, as routing is
    sizes = jnp.asarray(np.random.default_rng(1).multinomial(P, share), jnp.int32)

    def make(calls: int, layout: str | None) -> list[tuple]:
        every = []
        for i in range(calls):
            keys = jax.random.split(jax.random.key(i), 3)
            if packed:
                weight = in_layout(packed_weight(keys[0], shape), layout, len(shape) - 2)
            else:
                weight = normal(keys[0], shape, dtype, c**-0.5)
            rows = normal(keys[1], (P, c), dtype)
            last = () if way == "forward" else (normal(keys[2], (P, n), dtype),)
            args = (weight, rows) if way == "d weight" else (rows, weight)
            every.append((*args, sizes, *last))
        return every

    def run(implementation: str) -> Callable[..., Any]:
        def forward(rows, weight, sizes):
            return grouped_matmul.grouped_matmul(rows, weight, sizes, implementation=implementation)

        if way == "forward":
            return forward
        if way == "d rows":
            return backward(forward, 1)
        return backward(lambda weight, rows, sizes: forward(rows, weight, sizes), 1)

    weight = weight_bytes(shape, dtype, packed=packed)
    ins = {"forward": P * c, "d rows": P * n, "d weight": P * (c + n)}[way] * dtype.itemsize
    outs = {"forward": P * n, "d rows": P * c, "d weight": s.E * n * c}[way] * dtype.itemsize
    return Case(
        "grouped matmul",
        f"{matrix} P={P} {'packed' if packed else s.dtype}",
        way,
        names(grouped_matmul.ORDER),
        make,
        run,
        flops=2.0 * P * n * c,
        read=ins + (0 if way == "d weight" else weight),
        written=outs,
        dtype=s.dtype,
        layouts=LAYOUTS if packed else {},
    )


def _expert_arguments(s: Sizes, rows: int, *, packed: bool, way: str) -> Callable[..., Any]:
    shapes, dtype = ((s.E, 2, s.F, s.D), (s.E, s.D, s.F)), jnp.dtype(s.dtype)

    def weights(seed: int, layout: str | None) -> tuple:
        keys = jax.random.split(jax.random.key(seed), 4)
        matrices = []
        for key, shape in zip(keys[:2], shapes, strict=True):
            if packed:
                matrices.append(in_layout(packed_weight(key, shape), layout, len(shape) - 2))
            else:
                matrices.append(normal(key, shape, dtype, shape[-1] ** -0.5))
        biases = (normal(k, n[:-1], dtype) for k, n in zip(keys[2:], shapes, strict=True))
        return (*matrices, *biases)

    def make(calls: int, layout: str | None) -> list[tuple]:
        every, chosen = [], ()
        for i in range(calls):
            if i % 2 == 0:  # each set of weights serves two calls, with other experts
                chosen = weights(i, layout)
            keys = jax.random.split(jax.random.key(1000 + i))
            x = normal(keys[0], (rows, s.D), dtype)
            shares = jax.nn.softmax(normal(keys[1], (rows, s.A), jnp.float32))
            last = () if way == "forward" else (x,)
            every.append((x, *chosen, jnp.asarray(_expert_ids(s, rows, i)), shares, *last))
        return every

    return make


def _expert_ids(s: Sizes, rows: int, seed: int) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.permutation(s.E)[: s.A] for _ in range(rows)]).astype(np.int32)


def _experts(s: Sizes, rows: int, *, packed: bool, way: str) -> Case:
    dtype = jnp.dtype(s.dtype)

    def run(implementation: str) -> Callable[..., Any]:
        def forward(x, gate_up, down, gate_up_bias, down_bias, ids, shares):
            return moe.experts(
                x, ids, shares, gate_up_weight=gate_up, gate_up_bias=gate_up_bias,
                down_weight=down, down_bias=down_bias, limit=7.0, implementation=implementation,
            )  # fmt: skip

        return forward if way == "forward" else both(forward, 1 if packed else 5)

    used = float(np.mean([len(np.unique(_expert_ids(s, rows, i))) for i in range(8)]))
    one = weight_bytes((3, s.F, s.D), dtype, packed=packed)
    grads = 0 if packed or way == "forward" else one * s.E
    passes = 1 if way == "forward" else 2
    products = 1 if way == "forward" else 2 if packed else 3
    chip = chips.current()
    on_tpu = LAYOUTS["pallas_tpu"] if chip.kind == "tpu7x" else ("columns", "int8")
    kernels = {"cpu": (None,), "gpu": LAYOUTS["pallas_gpu"], "tpu": on_tpu}
    return Case(
        "experts",
        f"M={rows} {'packed' if packed else s.dtype}",
        way,
        names(moe.ORDER),
        _expert_arguments(s, rows, packed=packed, way=way),
        run,
        flops=products * 6.0 * rows * s.A * s.F * s.D,
        read=(used * one + dtype.itemsize * rows * s.D) * passes,
        written=grads + dtype.itemsize * rows * s.D * passes,
        dtype=s.dtype,
        layouts={**LAYOUTS, "grouped": kernels[chip.platform]} if packed else {},
    )


def _cross_entropy(s: Sizes, wanted: tuple[int, ...]) -> Case:
    dtype = jnp.dtype(s.dtype)

    def make(calls: int, layout: str | None) -> list[tuple]:
        every = []
        for i in range(calls):
            keys = jax.random.split(jax.random.key(i), 3)
            hidden = normal(keys[0], (s.M, s.D), dtype)
            weight = normal(keys[1], (s.V, s.D), dtype, s.D**-0.5)
            targets = jax.random.randint(keys[2], (s.M,), 0, s.V)
            every.append((hidden, weight, targets, jnp.ones(s.M, jnp.float32)))
        return every

    def run(implementation: str) -> Callable[..., Any]:
        def loss(*args):
            return cross_entropy.cross_entropy(*args, implementation=implementation)

        return jax.value_and_grad(loss, wanted, has_aux=True) if wanted else loss

    sizes = (s.M * s.D, s.V * s.D)
    return Case(
        "cross entropy",
        f"M={s.M} V={s.V}",
        {0: "forward", 1: "forward + backward, weight frozen", 2: "forward + backward"}[
            len(wanted)
        ],
        names(cross_entropy.ORDER),
        make,
        run,
        flops=2.0 * s.M * s.V * s.D * (1 + len(wanted)),
        read=dtype.itemsize * sum(sizes),
        written=dtype.itemsize * sum(sizes[i] for i in wanted),
        dtype=s.dtype,
    )


def _decode(s: Sizes) -> Case:
    shape, dtype = (s.E, 2, s.F, s.D), jnp.dtype(s.dtype)

    def make(calls: int, layout: str | None) -> list[tuple]:
        return [(packed_weight(jax.random.key(i), shape),) for i in range(calls)]

    def run(implementation: str) -> Callable[..., Any]:
        return lambda packed: mxfp4.decode(packed, dtype, implementation=implementation)

    return Case(
        "mxfp4 decode",
        f"{list(shape)} to {s.dtype}",
        "forward",
        ("xla", "reference"),
        make,
        run,
        flops=0,
        read=weight_bytes(shape, dtype, packed=True),
        written=weight_bytes(shape, dtype, packed=False),
        dtype=s.dtype,
    )
