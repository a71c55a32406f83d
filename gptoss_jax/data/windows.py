"""Turn records into rows: an epoch is a permutation, cut into windows that are packed one by one.

The permutation is drawn from (seed, epoch). It is cut into windows of about `data.pack_window`
records. The rows of all windows of all epochs, in order, make up one endless sequence. An epoch
loses no record and repeats none; the price is that about one row per window is not full. For a
small source of a mixture, several epochs may be packed together as one round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any, NamedTuple

import grain

from gptoss_jax.data.examples import Examples
from gptoss_jax.data.packing import Row, pack

Item = tuple[int, int]  # a segment: the place of its record in the window, and which of the record


class PackedRow(NamedTuple):
    """A row, and where its segments come from."""

    segments: Row
    items: list[Item]


class Windows:
    """The endless sequence of packed windows; `windows[w]` is the rows of window w.

    Getting a window tokenises only the records of that window.
    """

    def __init__(self, examples: Examples, *, seed: int | str, epochs: int = 1) -> None:
        """Plan windows over `examples` in an order that `seed` (any number or text) determines.

        Each round packs `epochs` epochs together, so that data too small to fill a row can fill it
        with repetitions.
        """
        self.examples, self.stopped = examples, False
        n = len(examples)
        # grain shuffles epoch e with seed + e. Hashing the seed keeps neighbouring seeds from
        # sharing epochs.
        hashed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
        self._order = grain.MapDataset.range(n).shuffle(seed=hashed).repeat()
        self.epochs, self._records = epochs, n * epochs  # epochs and records of a round
        # The windows of a round have equal size; a last window of few records would pack badly.
        self.per_round = -(-self._records // examples.config.pack_window)

    def record(self, k: int) -> int:
        """Return the index of the record at place k of the endless shuffled sequence."""
        index = self._order[k]
        assert index is not None  # grain gives None for a filtered element; we filter nothing
        return index

    def __getitem__(self, w: int) -> list[Row]:
        """Return the rows of window w, in random order. Raises `UserError` if a file changed.

        The two segments of a pair are neighbours: pair k of a row is segments 2k and 2k + 1.
        """
        return [row.segments for row in self.packed(w)]

    def packed(self, w: int, *, without: Collection[Item] = ()) -> list[PackedRow]:
        """Return the rows of window w, packed from all its segments but those in `without`."""
        n, windows = self._records, self.per_round
        past, i = divmod(w, windows)
        places = range(i * n // windows, (i + 1) * n // windows)
        chosen = [self.record(past * n + k) for k in places]
        self.examples.records.check_unchanged()
        read: dict[int, Row] = {}
        for index in sorted(chosen):  # in file order, so that each parquet row group is read once
            if self.stopped:
                raise RuntimeError("the data loader is closed")
            read[index] = self.examples[index]
        found = [(place, k) for place, index in enumerate(chosen) for k in range(len(read[index]))]
        left_out = set(without)
        found = [item for item in found if item not in left_out]
        size = 2 if self.examples.pairs else 1  # segments that stay together
        groups = [found[i : i + size] for i in range(0, len(found), size)]
        lengths = [sum(len(read[chosen[p]][k].tokens) for p, k in group) for group in groups]
        rows = pack(lengths, self.examples.config.sequence_length)
        taken = [[item for group in row for item in groups[group]] for row in rows]
        return [PackedRow([read[chosen[p]][k] for p, k in items], items) for items in taken]


class _WindowIterator(grain.DatasetIterator[list[PackedRow]]):
    """Yields windows in order; the state is the number of the next, and what to leave out of it."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows
        self._next = 0
        self._without: list[Item] = []

    def __next__(self) -> list[PackedRow]:
        rows = self._windows.packed(self._next, without=self._without)
        self._next, self._without = self._next + 1, []
        return rows

    def get_state(self) -> dict[str, Any]:
        return {"window": self._next, "without": self._without}

    def set_state(self, state: dict[str, Any]) -> None:
        self._next, self._without = state["window"], state["without"]


class WindowDataset(grain.IterDataset[list[PackedRow]]):
    """The windows in order, as a grain dataset that grain's threads read."""

    def __init__(self, windows: Windows) -> None:
        """Serve `windows` from the first."""
        super().__init__()
        self._windows = windows

    def __iter__(self) -> _WindowIterator:
        """Start at the first window."""
        return _WindowIterator(self._windows)


class Rows:
    """The rows of one source in order, taken from an iterator of its windows."""

    def __init__(self, windows: grain.DatasetIterator[list[PackedRow]]) -> None:
        """Start at the first window, where `windows` must stand."""
        self.windows = windows
        self._rows: list[PackedRow] = []  # the rows of window self._window, read when needed
        self._window = self._row = 0
        self._seen: list[Item] = []  # the segments of the rows of this window that were taken
        self._without: list[Item] = []  # those that had been seen before the data changed

    def take(self) -> Row:
        """Return the next row."""
        while not self._rows:  # a window without trained tokens has no rows
            self._rows = next(self.windows)
            self._seen = [item for row in self._rows[: self._row] for item in row.items]
            if not self._rows:
                self._begin(self._window + 1)
        row = self._rows[self._row]
        self._row += 1
        self._seen += row.items
        if self._row == len(self._rows):
            self._rows = []
            self._begin(self._window + 1)
        return row.segments

    def _begin(self, window: int) -> None:
        self._window, self._row, self._seen, self._without = window, 0, [], []

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next row, and what of its window was seen; it fits JSON."""
        state: dict[str, Any] = {"window": self._window, "row": self._row}
        items = {"seen": self._seen, "without": self._without}
        return state | {name: [list(i) for i in value] for name, value in items.items() if value}

    def set_state(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Continue from a state; the window is read again when a row is taken.

        If the data has `changed` since, the window is packed again from what was not seen of it.
        """
        self._begin(state["window"])
        self._rows = []
        self._row = state["row"]
        self._seen, self._without = (
            [(place, k) for place, k in state.get(name, [])] for name in ("seen", "without")
        )
        if changed and self._seen:
            self._row, self._seen, self._without = 0, [], self._without + self._seen
        self.windows.set_state({"window": self._window, "without": self._without})
