"""Verify written files: read every tensor with the safetensors library and compare its hash."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.errors import UserError
from gptoss_jax.weights.safetensors_io import DTYPES, Plan

_READ = 1 << 23  # bytes read back at a time


def hashed(
    name: str, pieces: Callable[[], Iterable[np.ndarray]], digests: dict[str, Any]
) -> Callable[[], Iterator[np.ndarray]]:
    """Wrap `pieces` so that, once all are taken, `digests[name]` is the hash of their bytes."""

    def each() -> Iterator[np.ndarray]:
        digest = digests[name] = _new_hash()
        for piece in pieces():
            _feed(digest, piece)
            yield piece

    return each


def compare_file(
    file: Path, plans: list[Plan], digests: dict[str, Any], advance: Callable[[int], None]
) -> None:
    """Read a file that was just written; compare names, shapes, dtypes and bytes with `plans`.

    Where the system allows it, the file's page cache is dropped first, so that the disk is read.
    `advance` is called with the number of bytes read.

    Raises:
        UserError: anything differs; the error names the tensor.
    """
    with file.open("rb") as f:
        os.fsync(f.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    wrong = _difference(file, {plan.name: plan for plan in plans}, digests, advance)
    if wrong:
        raise UserError(
            f"{file.name} is not what was written when it is read again: {wrong}; nothing of it is "
            "kept: check the disk, and write it again"
        )


def _difference(
    file: Path, plans: dict[str, Plan], digests: dict[str, Any], advance: Callable[[int], None]
) -> str | None:
    """Say what differs; None if nothing does."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as stored:
            differ = sorted(plans.keys() ^ set(stored.keys()))
            if differ:
                return f"tensor {differ[0]!r} is missing or extra"
            for name, plan in plans.items():
                part = stored.get_slice(name)
                found = (DTYPES.get(part.get_dtype()), tuple(part.get_shape()))
                if found != (plan.dtype, plan.shape):
                    return f"tensor {name!r} has another shape or dtype"
        for name, plan in plans.items():
            digest, count = _new_hash(), plan.shape[0]
            rows = max(1, _READ * count // plan.num_bytes)
            for start in range(0, count, rows):
                # Open the file for each piece: pages read from an open file stay in this process.
                with safe_open(file, framework="numpy") as stored:
                    piece = stored.get_slice(name)[start : min(start + rows, count)]
                _feed(digest, piece)
                advance(piece.nbytes)
            if digest.digest() != digests[name].digest():
                return f"tensor {name!r} has other bytes"
    except SafetensorError as error:
        return str(error)
    return None


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _feed(digest: Any, piece: np.ndarray) -> None:
    digest.update(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)
