"""Turn records into rows: an epoch is a permutation, cut into windows that are packed one by one.

The permutation is drawn from (seed, epoch). It is cut into windows of about `data.pack_window`
records. The rows of all windows of all epochs, in order, make up one endless sequence. An epoch
loses no record and repeats none; the price is that about one row per window is not full. For a
small source of a mixture, several epochs may be packed together as one round.
"""

from __future__ import annotations

import hashlib

import grain

from gptoss_jax.data.examples import Examples
from gptoss_jax.data.packing import Row, pack


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
        if self.examples.pairs:
            items = [read[index] for index in chosen if read[index]]
        else:
            items = [[segment] for index in chosen for segment in read[index]]
        lengths = [sum(len(s.tokens) for s in item) for item in items]
        rows = pack(lengths, self.examples.config.sequence_length)
        return [[segment for k in row for segment in items[k]] for row in rows]


class _WindowIterator(grain.DatasetIterator[list[Row]]):
    """Yields windows in order; the state is the number of the next window."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows
        self._next = 0

    def __next__(self) -> list[Row]:
        self._next += 1
        return self._windows[self._next - 1]

    def get_state(self) -> dict[str, int]:
        return {"window": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["window"]


class WindowDataset(grain.IterDataset[list[Row]]):
    """The windows in order, as a grain dataset that grain's threads read."""

    def __init__(self, windows: Windows) -> None:
        """Serve `windows` from the first."""
        super().__init__()
        self._windows = windows

    def __iter__(self) -> _WindowIterator:
        """Start at the first window; the state is {"window": number of the next}."""
        return _WindowIterator(self._windows)


class Rows:
    """The rows of one source in order, taken from an iterator of its windows."""

    def __init__(self, windows: grain.DatasetIterator[list[Row]]) -> None:
        """Start at the first window, where `windows` must stand."""
        self.windows = windows
        self._rows: list[Row] = []  # the rows of window self._window, read when needed
        self._window = self._row = 0

    def take(self) -> Row:
        """Return the next row."""
        while not self._rows:  # a window without trained tokens has no rows
            self._rows = next(self.windows)
            self._window += not self._rows
        row = self._rows[self._row]
        self._row += 1
        if self._row == len(self._rows):
            self._rows, self._window, self._row = [], self._window + 1, 0
        return row

    def get_state(self) -> dict[str, int]:
        """Return the position of the next row."""
        return {"window": self._window, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        """Continue from a state; the window is read again when a row is taken."""
        self._window, self._row, self._rows = state["window"], state["row"], []
        self.windows.set_state({"window": self._window})
