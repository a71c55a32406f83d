"""Continue a run whose data files changed: its records are known by hashes of their contents.

A run keeps the hashes of its records, in their order (`data_records.npz`). The order of training is
an order of these places. If a file has changed when the run resumes, each place gets the record
with its hash, wherever this lies now. A place whose record is gone gets the record that took its
position: the mended one; if there is none, the place stays empty. Records that are new are not
trained by this run. What was seen stays as it was: a window of rows in which a run stopped is
packed again from the places that it had not yet used.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

FILE = "data_records.npz"
_CHECKPOINTS = "checkpoints"  # the folder of `runs.records.FOLDER`, without which no run began


@dataclass(frozen=True)
class Aligned:
    """Where the records of a run lie now."""

    places: Int64[np.ndarray, " n"]  # the index of the record of each place; -1: there is none
    changed: int  # places with another record than the run's
    new: int  # records without a place

    @property
    def gone(self) -> int:
        """Count the places without a record."""
        return int((self.places < 0).sum())

    def describe(self) -> str:
        """Say what has changed since the run began; "" if nothing has."""
        counts = {"changed": self.changed, "left out now": self.gone}
        parts = [f"{n:,} {what}" for what, n in counts.items() if n]
        if self.new:
            parts.append(f"{self.new:,} new, which this run does not train")
        return f"records since the run began: {', '.join(parts)}" if parts else ""


def align(then: Sequence[int], now: Sequence[int]) -> Aligned | None:
    """Find the records of a run by their hashes, `then`, among those that are there `now`.

    Equal records are matched in their order. A place without a match gets the record at the same
    distance behind the nearest matched place before it, if that has no match either. Returns None
    if less than half of the run's records are found: these are other data.
    """
    where: dict[int, list[int]] = defaultdict(list)
    for i in reversed(range(len(now))):
        where[now[i]].append(i)
    places = np.array([where[h].pop() if where[h] else -1 for h in then], np.int64)
    found = int((places >= 0).sum())
    if 2 * found < len(then):
        return None
    free = np.ones(len(now), bool)
    free[places[places >= 0]] = False
    matched, before = places >= 0, -1
    for i in range(len(then)):
        if matched[i]:
            before = int(places[i])
        elif before + 1 < len(now) and free[before + 1]:
            before += 1
            places[i], free[before] = before, False
    return Aligned(places, int((places >= 0).sum()) - found, int(free.sum()))


def keep(folder: Path, sources: Sequence[Sequence[int]]) -> None:
    """Write the hashes of the records of each source, unless a run has written its own."""
    if (folder / FILE).exists() and has_begun(folder):
        return
    part = folder / f"{FILE}.{os.getpid()}.part"
    with part.open("wb") as file:
        np.savez(file, *(np.array(hashes, np.uint64) for hashes in sources))
    part.replace(folder / FILE)


def read(folder: Path) -> list[list[int]] | None:
    """Return what `keep` wrote; None if no run has begun there, or if it was an older one."""
    if not has_begun(folder):
        return None
    try:
        with np.load(folder / FILE) as stored:
            return [stored[f"arr_{k}"].tolist() for k in range(len(stored.files))]
    except FileNotFoundError:
        return None


def has_begun(folder: Path) -> bool:
    """Say whether a run has written a checkpoint into its folder."""
    kept = folder / _CHECKPOINTS
    return kept.is_dir() and any(path.name.isdecimal() for path in kept.iterdir())
