"""Read headers and rows of safetensors files, and write such files as a stream.

No file is mapped into memory, so the host holds only the rows that were asked for. The format is: 8
bytes with the length of a JSON header, little endian; the header; the tensors' bytes without gaps.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gptoss_jax.errors import UserError

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
# The library's order of dtypes in a file: by alignment, then by its list of dtypes.
_RANK = {"F32": 0, "BF16": 1, "F16": 2, "U8": 3}


@dataclass(frozen=True)
class Entry:
    """The place of a tensor in a file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read_rows(self, start: int, stop: int) -> np.ndarray:
        """Read rows [start, stop) of the first axis into a new array.

        Raises UserError if the file has become shorter than its header says.
        """
        row = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = np.empty((stop - start) * row, np.uint8)
        view, done = buffer.data, 0
        with self.file.open("rb", buffering=0) as f:
            f.seek(self.offset + start * row)
            while done < len(buffer):
                got = f.readinto(view[done:])
                if not got:
                    raise UserError(f"{self.file}: tensor {self.name!r} is cut short")
                done += got
        return buffer.view(self.dtype).reshape(stop - start, *self.shape[1:])


def _header(file: Path) -> tuple[dict[str, Any], int, int]:
    """Return the header, the offset at which the tensors begin, and the size of the file."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, _LARGEST_HEADER):
                raise UserError(
                    f"{file}: no whole safetensors header: the file is cut short or is no "
                    "safetensors file; fetch it again"
                )
            header = json.loads(f.read(length))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: its safetensors header is no JSON; fetch it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{file}: its safetensors header is no JSON object; fetch it again")
    return header, 8 + length, size


def read_header(file: Path) -> dict[str, Entry]:
    """Return the tensors of a file by name, after checking that they cover all of its bytes.

    Raises UserError that names the file and the tensor if the file is cut short, is too long, is
    not a safetensors file, or has a dtype other than float32, bfloat16, float16 and uint8.
    """
    header, begin, size = _header(file)
    entries = {}
    ends = begin
    for name, value in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype_name, shape = value["dtype"], tuple(int(n) for n in value["shape"])
            start, stop = (int(n) for n in value["data_offsets"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file}: the header's entry of tensor {name!r} is broken") from error
        if dtype_name not in DTYPES:
            raise UserError(
                f"{file}: tensor {name!r} has dtype {dtype_name}: only {', '.join(DTYPES)} are read"
            )
        entry = Entry(file, name, DTYPES[dtype_name], shape, begin + start)
        if entry.num_bytes != stop - start or start < 0 or any(n < 0 for n in shape):
            raise UserError(f"{file}: the header's entry of tensor {name!r} contradicts itself")
        entries[name] = entry
        ends = max(ends, begin + stop)
    if ends > size:
        cut = min(
            (e for e in entries.values() if e.offset + e.num_bytes > size), key=lambda e: e.offset
        )
        raise UserError(
            f"{file}: cut short: it has {size:,} bytes of {ends:,}, and tensor {cut.name!r} is "
            "the first that is not whole; fetch it again"
        )
    if ends < size or sum(e.num_bytes for e in entries.values()) != ends - begin:
        raise UserError(f"{file}: its bytes and its header do not match; fetch it again")
    return entries


@dataclass(frozen=True)
class Plan:
    """A tensor to be written: `pieces` makes its bytes in order, piece by piece, when needed."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def file_order(plans: Iterable[Plan]) -> list[Plan]:
    """Sort as the safetensors library does: by dtype, widest first, then by name."""
    return sorted(plans, key=lambda plan: (_RANK[_NAMES[plan.dtype]], plan.name))


def write_file(file: Path, plans: list[Plan], advance: Callable[[int], None]) -> None:
    """Write one file, tensor after tensor, with one piece in memory at a time.

    `advance` is called with the number of bytes written. The file equals what the safetensors
    library writes for the same tensors (with the metadata `{"format": "pt"}`, which transformers
    requires). Raises ValueError if the pieces of a tensor have another dtype or total size.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    plans = file_order(plans)
    for plan in plans:
        header[plan.name] = {
            "dtype": _NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": [offset, offset + plan.num_bytes],
        }
        offset += plan.num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb", buffering=0) as f:
        _write_all(f.fileno(), len(text).to_bytes(8, "little") + text)
        for plan in plans:
            written = 0
            for piece in plan.pieces():
                if piece.dtype != plan.dtype:
                    raise ValueError(f"{plan.name}: a piece of {piece.dtype}, not {plan.dtype}")
                data = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                _write_all(f.fileno(), data)
                written += data.nbytes
                advance(data.nbytes)
            if written != plan.num_bytes:
                raise ValueError(f"{plan.name}: {written} bytes came, not {plan.num_bytes}")


def _write_all(descriptor: int, data: bytes | np.ndarray) -> None:
    view = memoryview(data) if isinstance(data, bytes) else data.data
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
