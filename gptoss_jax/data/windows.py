"""Records to rows: an epoch is a permutation, cut into windows, each packed by itself.

The permutation is drawn from (seed, epoch). It is cut into windows of about `data.pack_window`
records; the rows of window after window and epoch after epoch make up one endless sequence. Nothing
of an epoch is lost or seen twice; the price is that a window's last row or so is not full. Several
epochs may be packed as one round, for a small source of a mixture.
"""

from __future__ import annotations

import hashlib

import grain

from gptoss_jax.data.examples import Examples
from gptoss_jax.data.packing import Row, pack


class Windows:
    """The endless sequence of packed windows; `windows[w]` is the rows of window w.

    Costs the tokenising of that window's records alone.
    """

    def __init__(self, examples: Examples, *, seed: int | str, epochs: int = 1) -> None:
        """Plan windows over `examples` in the order that `seed`, any number or text, gives.

        `epochs` are packed as one, so that data that don't fill a row can share it with themselves.
        """
        self.examples, self.stopped = examples, False
        n = len(examples)
        # grain shuffles epoch e by seed + e: hashing keeps neighbouring seeds' epochs apart.
        hashed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
        self._order = grain.MapDataset.range(n).shuffle(seed=hashed).repeat()
        self.epochs, self._records = epochs, n * epochs  # of a round: what windows divide
        # Of equal size, so that no round ends in a window of a few records, which packs badly.
        self.per_round = -(-self._records // examples.config.pack_window)

    def record(self, k: int) -> int:
        """Return the index of the record at place k of the endless shuffled sequence."""
        index = self._order[k]
        assert index is not None  # grain's None stands for a filtered element: there are none
        return index

    def __getitem__(self, w: int) -> list[Row]:
        """Return the rows of window w, in random order. Raises `UserError` if a file changed.

        The two segments of a pair are neighbours: those of pair k of a row are 2k and 2k + 1.
        """
        n, windows = self._records, self.per_round
        past, i = divmod(w, windows)
        places = range(i * n // windows, (i + 1) * n // windows)
        chosen = [self.record(past * n + k) for k in places]
        self.examples.records.check_unchanged()
        read: dict[int, Row] = {}
        for index in sorted(chosen):  # as they lie in the files: a parquet row group is read once
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
    """Yields windows in turn; the state is the next one's number."""

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
    """The windows in turn, as grain's threads take them."""

    def __init__(self, windows: Windows) -> None:
        """Serve `windows` from the first."""
        super().__init__()
        self._windows = windows

    def __iter__(self) -> _WindowIterator:
        """Start at the first window; the state is {"window": number of the next}."""
        return _WindowIterator(self._windows)


class Rows:
    """The rows of one source in turn, over an iterator of its windows."""

    def __init__(self, windows: grain.DatasetIterator[list[Row]]) -> None:
        """Start where `windows` stands, which is at the first."""
        self.windows = windows
        self._rows: list[Row] = []  # of window self._window, read when it is needed
        self._window = self._row = 0

    def take(self) -> Row:
        """Return the next row."""
        while not self._rows:  # a window in which nothing is trained has no rows
            self._rows = next(self.windows)
            self._window += not self._rows
        row = self._rows[self._row]
        self._row += 1
        if self._row == len(self._rows):
            self._rows, self._window, self._row = [], self._window + 1, 0
        return row

    def get_state(self) -> dict[str, int]:
        """Return where the next row lies."""
        return {"window": self._window, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from a state; the window is read again when a row is taken."""
        self._window, self._row, self._rows = state["window"], state["row"], []
        self.windows.set_state({"window": self._window})
