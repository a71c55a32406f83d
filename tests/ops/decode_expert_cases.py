"""The cases that every kernel for a decode batch's experts meets, and the comparisons."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from covering import every, pairwise

from gptoss_jax.ops.moe import reference
from gptoss_jax.types import MXFP4, LayerOf

# Sizes are (D, F). "dropped" pairs have id E; "masked" rows hold NaN. `layers` 0: no stack.
AXES: dict[str, list[Any]] = {
    "M": [1, 3, 16],
    "E": [5, 32],
    "A": [1, 2, 4],
    "size": [(96, 160), (160, 96), (256, 192)],
    "routing": ["even", "single", "dropped", "masked", "none"],
    "layers": [0, 3],
}
# The models' width, once on each side.
WIDE = [
    {"M": 3, "E": 5, "A": 4, "size": (2880, 160), "routing": "dropped", "layers": 3},
    {"M": 16, "E": 5, "A": 2, "size": (96, 2880), "routing": "masked", "layers": 0},
]
COVERING = pairwise(**AXES) + WIDE
EVERY = every(**AXES) + WIDE
LIMIT = 2.0  # of swiglu: small, so that the clamp is met

Arguments = dict[str, Any]
Run = Callable[[Arguments], Any]  # what runs `experts(**arguments)` under test


def inputs(case: dict[str, Any], dtype: Any = jnp.float32) -> Arguments:
    """Return the arguments of `experts`, with weights in `MXFP4`."""
    rng = np.random.default_rng([case["M"], case["E"], case["A"], case["layers"]])
    D, F = case["size"]
    lead = (case["layers"], case["E"]) if case["layers"] else (case["E"],)
    ids, mask = _routes(case, rng)
    x = rng.normal(size=(case["M"], D))
    x[~mask] = np.nan
    shares = rng.uniform(0.1, 1, size=ids.shape)
    layer = jnp.int32(case["layers"] // 2)

    def of_layer(weight: Any) -> Any:
        return LayerOf(weight, layer) if case["layers"] else weight

    def bias(*shape: int) -> Any:
        return of_layer(jnp.asarray(rng.normal(size=(*lead, *shape)), dtype))

    return {
        "x": jnp.asarray(x, dtype),
        "expert_ids": jnp.asarray(ids, jnp.int32),
        "expert_weights": jnp.asarray(shares, jnp.float32),
        "gate_up_weight": of_layer(_random(rng, (*lead, 2, F), D)),
        "gate_up_bias": bias(2, F),
        "down_weight": of_layer(_random(rng, (*lead, D), F)),
        "down_bias": bias(D),
        "limit": LIMIT,
        "mask": None if case["routing"] != "masked" else jnp.asarray(mask),
    }


def _routes(case: dict[str, Any], rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    M, E, A = case["M"], case["E"], case["A"]
    ids = np.stack([rng.permutation(E)[:A] for _ in range(M)])
    mask = np.ones(M, bool)
    if case["routing"] == "single":  # the same ones for every row
        ids[:] = np.arange(E - A, E)
    elif case["routing"] == "dropped":
        ids[rng.random(ids.shape) < 0.4] = E
        ids[0, 0] = E
    elif case["routing"] == "masked":
        mask[rng.random(M) < 0.4] = False
        mask[0] = M == 1
    elif case["routing"] == "none":
        ids[:] = E
    return ids, mask


def _random(rng: np.random.Generator, rows: tuple[int, ...], columns: int) -> MXFP4:
    blocks = rng.integers(0, 256, (*rows, columns // 32, 16), np.uint8)
    # Products of about 1: a code is about 3, a scale about 1 / (3 sqrt(C)).
    top = 126 - round(0.5 * np.log2(columns))
    scales = rng.integers(top - 3, top + 1, (*rows, columns // 32)).astype(np.uint8)
    return MXFP4(jnp.asarray(blocks), jnp.asarray(scales))


def expected(arguments: Arguments) -> jax.Array:
    """Return what the reference makes of the same arguments, layers cut out of their stacks."""

    def cut(value: Any) -> Any:
        if not isinstance(value, LayerOf):
            return value
        return jax.tree.map(lambda a: a[value.layer], value.stack)

    @jax.jit  # one program, and not one an operation
    def run(arguments: Arguments) -> jax.Array:
        arguments = {name: cut(value) for name, value in arguments.items()}
        rows = arguments.pop("x"), arguments.pop("expert_ids"), arguments.pop("expert_weights")
        return reference.experts(*rows, **arguments, limit=limit)

    arguments = dict(arguments)
    limit = arguments.pop("limit")
    return run(arguments)


def assert_close(got: jax.Array, want: jax.Array) -> None:
    """Hold float32 to 1e-5 of the largest entry, and bfloat16 to 2e-2 in relative norm."""
    assert got.shape == want.shape and got.dtype == want.dtype
    a, b = np.asarray(got, np.float32), np.asarray(want, np.float32)
    assert np.isfinite(a).all()
    if got.dtype == jnp.float32:
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1e-3)
    else:
        assert np.linalg.norm(a - b) <= 2e-2 * max(np.linalg.norm(b), 1e-6)


# Every code under every scale byte that kernels take. A row of x has one entry that is not zero,
# so that each output is one decoded value, exactly.
BYTES = np.arange(2, 241)
HEIGHT = 256  # rows of a matrix, a byte each; the rest are zeros
WIDTH = 64  # columns: code d % 16 in column d
COLUMNS = (np.arange(16), np.arange(48, 64))  # the first block and the second


def _table(height: int, bytes_: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [height, WIDTH] and scale bytes [height, WIDTH/32]; row i has bytes_[i]."""
    codes = np.where(np.arange(height)[:, None] < len(bytes_), np.arange(WIDTH) % 16, 0)
    scales = np.full((height, WIDTH // 32), 127)
    scales[: len(bytes_)] = bytes_[:, None]
    return codes, scales


def _identity(size: int, columns: int, value: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of a matrix with `value` (a code) on its diagonal, and bytes 127."""
    codes = np.zeros((size, columns), int)
    np.fill_diagonal(codes, value)
    return codes, np.full((size, columns // 32), 127)


def _pack(codes: list[np.ndarray], scales: list[np.ndarray]) -> MXFP4:
    nibbles = np.stack(codes).astype(np.uint8).reshape(*np.shape(codes)[:-1], -1, 16, 2)
    blocks = nibbles[..., 0] | nibbles[..., 1] << 4
    return MXFP4(jnp.asarray(blocks), jnp.asarray(np.stack(scales), jnp.uint8))


def _value(codes: np.ndarray, bytes_: np.ndarray) -> np.ndarray:
    table = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    return np.where(codes < 8, 1, -1) * table[codes % 8] * 2.0 ** (bytes_ - 127.0)


def every_code_down() -> Iterator[tuple[Arguments, np.ndarray]]:
    """Yield arguments, and the output to the bit: one column of `down_weight`.

    The gate of hidden unit d is 16 for a row whose entry d is not zero, and sigmoid(27) is 1.
    """
    eye, ones = _identity(WIDTH, HEIGHT, 2)  # D is HEIGHT, F is WIDTH
    codes, scales = _table(HEIGHT, BYTES)
    nothing = np.zeros_like(eye)
    weights = {
        "gate_up_weight": _pack([[eye, nothing]], [[ones, ones]]),
        "gate_up_bias": jnp.zeros((1, 2, WIDTH)),
        "down_weight": _pack([codes], [scales]),
        "down_bias": jnp.zeros((1, HEIGHT)),
    }
    for columns in COLUMNS:
        x = np.zeros((16, HEIGHT))
        x[np.arange(16), columns] = 16
        want = _value(codes, scales.repeat(32, axis=1))[:, columns].T
        yield _one_slot(x, np.zeros(16), 1 / 16, weights), want.astype(np.float32)


def every_code_gate_up() -> Iterator[tuple[Arguments, np.ndarray]]:
    """Yield arguments, and the output to the bit: one column of `gate_up_weight`, gate or up.

    Experts 0 and 1 have the table as gate and no up: where the gate is 16 or more, sigmoid is 1 and
    the unit gives the gate. Two powers of two in x bring it there, for all but the lowest bytes;
    none of them lets a code times x overflow before the scale is applied.
    Experts 2 and 3 have a gate of 16 by its bias, and the table as up: they give 16 (up + 1).
    """
    spans = [(8, 126, 124), (122, 240, 10), (2, 120, 124), (121, 240, 8)]  # bytes, power in x
    eye, ones = _identity(HEIGHT, HEIGHT, 2)  # F is HEIGHT, D is padded to it below
    tables = []
    for first, last, _ in spans:
        codes, scales = _table(HEIGHT, np.arange(first, last + 1))
        pad = HEIGHT - WIDTH
        tables.append((np.pad(codes, ((0, 0), (0, pad))), _pad_scales(scales, pad // 32)))
    none = np.zeros_like(eye)
    gate_up = [[codes, none] if e < 2 else [none, codes] for e, (codes, _) in enumerate(tables)]
    bytes_ = [[scales, ones] if e < 2 else [ones, scales] for e, (_, scales) in enumerate(tables)]
    bias = np.zeros((4, 2, HEIGHT))
    bias[2:, 0] = 16
    weights = {
        "gate_up_weight": _pack(gate_up, bytes_),
        "gate_up_bias": jnp.asarray(bias),
        "down_weight": _pack([eye] * 4, [ones] * 4),
        "down_bias": jnp.zeros((4, HEIGHT)),
    }
    for columns in COLUMNS:
        for e, (_, _, power) in enumerate(spans):
            sign = np.where(np.arange(16) < 8, 1.0, -1.0)  # gates are then positive
            x = np.zeros((16, HEIGHT))
            x[np.arange(16), columns] = sign * 2.0**power
            codes, scales = tables[e]
            h = (_value(codes, scales.repeat(32, axis=1))[:, columns] * sign * 2.0**power).T
            up_plus_one = h.astype(np.float32) + np.float32(1)
            want = h.astype(np.float32) if e < 2 else 16 * up_plus_one
            yield _one_slot(x, np.full(16, e), 1.0, weights), want


def _pad_scales(scales: np.ndarray, blocks: int) -> np.ndarray:
    return np.pad(scales, ((0, 0), (0, blocks)), constant_values=127)


def _one_slot(x: np.ndarray, ids: np.ndarray, share: float, weights: Arguments) -> Arguments:
    """Return arguments with one slot a row, float32, and a clamp that nothing meets."""
    return dict(
        x=jnp.asarray(x, jnp.float32),
        expert_ids=jnp.asarray(ids[:, None], jnp.int32),
        expert_weights=jnp.full((len(x), 1), share, jnp.float32),
        **weights,
        limit=float("inf"),
        mask=None,
    )
