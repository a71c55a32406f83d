"""Pack segments into rows: several short token sequences share a row of fixed length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int32

from gptoss_jax.types import Batch


class Segment(NamedTuple):
    """A token sequence that attends to itself alone.

    `weights[i]` is the loss weight of `tokens[i]` as a target. The first token is never a target,
    so its weight is not used.
    """

    tokens: Int32[np.ndarray, " n"]
    weights: Float32[np.ndarray, " n"]


Row = list[Segment]  # the segments that share a row


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute items of these lengths over rows of `capacity`: best fit, longest item first.

    Returns the indices of each row's items. The result depends only on the lengths and their order.
    The lower index goes first on a tie. A row's items are in index order. Rows are in the order of
    their longest items' indices, so items in random order give rows in random order. Every length
    must satisfy 0 < length <= capacity.
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[i]
        if not 0 < length <= capacity:
            raise ValueError(f"an item of length {length} for rows of {capacity}")
        at = bisect_left(free, (length, -1))
        if at == len(free):
            room, row = capacity, len(rows)
            rows.append([])
        else:
            room, row = free.pop(at)
        rows[row].append(i)
        if room > length:
            insort(free, (room - length, row))
    rows.sort(key=lambda row: row[0])
    return [sorted(row) for row in rows]


def fill(
    rows: Sequence[Sequence[Segment]], sequence_length: int, *, sources: Sequence[int] | None = None
) -> Batch:
    """Lay rows of segments out as a batch of numpy arrays [len(rows), sequence_length].

    Tokens, targets, segment ids and positions are int32, weights are float32; padding is 0. A
    segment's last token has no target in its segment, so its target and weight are 0. `sources`
    gives the source of each row.
    """
    shape = (len(rows), sequence_length)
    tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    weights = np.zeros(shape, np.float32)
    for b, row in enumerate(rows):
        start = 0
        for number, segment in enumerate(row, 1):
            end = start + len(segment.tokens)
            tokens[b, start:end] = segment.tokens
            targets[b, start : end - 1] = segment.tokens[1:]
            weights[b, start : end - 1] = segment.weights[1:]
            segment_ids[b, start:end] = number
            positions[b, start:end] = np.arange(end - start)
            start = end
    given = None if sources is None else np.array(sources, np.int32)
    # types.Batch declares jax arrays; these numpy arrays become jax arrays when they are put on
    # the devices.
    return Batch(tokens, targets, weights, segment_ids, positions, given)  # pyright: ignore[reportArgumentType]
