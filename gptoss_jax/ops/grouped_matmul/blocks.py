"""Tile sizes of the TPU kernels of grouped matmul, by chip. None has been timed on a device."""

from __future__ import annotations

from typing import NamedTuple


class Blocks(NamedTuple):
    """Upper limits: a kernel takes less if a matrix is smaller or memory is short."""

    rows: int  # of the sorted rows, in one step
    packed: int  # columns of the result in one step, for a packed weight: a multiple of 1024
    dense: int  # the same for a dense weight: a multiple of 128
    gradient: tuple[int, int, int]  # rows, N and C in one step of the gradient of a dense weight
    vmem: int  # bytes of a core's fast memory (VMEM) that a kernel may take


MIB = 1 << 20
BLOCKS = {
    "v5e": Blocks(512, 1024, 640, (256, 640, 1024), 96 * MIB),
    "v5p": Blocks(512, 1024, 640, (256, 640, 1024), 60 * MIB),
    "v6e": Blocks(512, 1024, 1024, (256, 640, 1024), 96 * MIB),
    "tpu7x": Blocks(512, 1024, 1024, (256, 640, 1024), 48 * MIB),
}
