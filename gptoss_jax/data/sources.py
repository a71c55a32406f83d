"""Read records from files: check each record, and index where it lies.

A `.jsonl` file has one record per line, a `.json` file a list of them, a `.parquet` file one per
row: in any format of `data/formats.py`. A `.txt` file is one document, however long. For random
access it is cut at line ends into stretches: chunks of about `stretch_bytes`, each one record.

`Records` keeps 24 bytes per record in memory, not the record itself: each read opens the file and
seeks. If a file's size or time of change is not as it was at indexing, the run stops.
"""

from __future__ import annotations

import contextlib
import os
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_jax.data import indexing, parquet
from gptoss_jax.data.indexing import Stamp, parse
from gptoss_jax.data.reading import Reading
from gptoss_jax.errors import UserError


@dataclass(frozen=True)
class Record:
    """One record. `where` is `file:line` for messages; in parquet, the line is the row from 1.

    `fields` are those of a chat, a text or a pair (`data/formats.py`), `columns` those of the file.
    """

    where: str
    fields: dict[str, Any]
    columns: dict[str, Any]
    ends: bool = True  # whether its document ends here: False for a stretch of a .txt but the last


def stamp(path: Path) -> Stamp:
    """Return the size and time of change of a file, which show later whether it has changed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Records:
    """The records of some files, checked and indexed by byte offset; `records[i]` reads one.

    The constructor checks all files (`data/indexing.py`), so that a bad record raises `UserError`
    before training starts; the error names file and line. With `skip_bad`, bad records are left
    out and counted in `skipped`. `UserError` is also raised if no record is left, and for a .txt
    file if pairs are asked for. Blank lines and empty .txt files hold no record.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        field: str,
        stretch_bytes: int,
        skip_bad: bool = False,
        reading: Reading | None = None,
        whole: bool = False,
    ) -> None:
        """Index `files`, a list from `entries.resolve`; `field` names them in messages.

        Records of parquet files have all columns if `whole`, else only those that a format reads.
        Records of .json and .jsonl files always have all columns.
        """
        self.files = list(files)
        self.reading = reading = reading or Reading()
        self.pairs = reading.pairs
        self.unused: Counter[str] = Counter()  # columns that nothing reads, and in how many records
        self.skipped = 0
        self.first_skipped = ""
        self._skip_bad = skip_bad
        self._stamps = [stamp(path) for path in self.files]
        self._layouts: dict[int, parquet.Layout] = {}  # of the parquet files
        for k, path in enumerate(self.files):
            if path.suffix == ".parquet":
                with self._open(k) as file:
                    layout = parquet.read_layout(file, path, reading, whole=whole)
                self._layouts[k] = layout
                self.unused.update(dict.fromkeys(layout.left_out, layout.metadata.num_rows))
            elif path.suffix == ".txt" and self.pairs:
                raise UserError(f"{path}: plain text, and objective.name dpo trains on pairs")
        self._group: tuple[int, int, Any] = (-1, -1, None)  # file, row group, and its table
        jobs = [
            indexing.Job(path, self._stamps[k], reading, self._layouts.get(k), stretch_bytes)
            for k, path in enumerate(self.files)
        ]
        self.num_bytes = sum(job.num_bytes for job in jobs)
        self._starts: list[int] = []  # the index of each file's first record
        # In parquet, the line is the row; offset and size are not used there, and are 0.
        self._offsets, self._sizes, self._lines = array("Q"), array("I"), array("I")
        self.hashes = array("Q")  # of each record's content
        found = indexing.index(jobs, title="checking " + field, stop_at_bad=not skip_bad)
        for path, index in zip(self.files, found, strict=False):
            self._starts.append(len(self._offsets))
            for line, problem in index.bad:
                self.bad(f"{path}:{line}", problem)
            self._offsets += index.offsets
            self._sizes += index.sizes
            self._lines += index.lines
            self.hashes += index.hashes
            self.unused += index.unused
        self.check_unchanged()
        if not len(self):
            bad = f" ({self.skip_summary()})" if self.skipped else ""
            names = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
            raise UserError(f"{field} holds no record: {names}{bad}")

    def bad(self, where: str, problem: str) -> None:
        """Raise `UserError` for a bad record, or count it if `skip_bad`."""
        message = f"{where}: {problem}"
        if not self._skip_bad:
            raise UserError(
                f"{message}; fix it, or set data.on_bad_record=skip to leave out bad records"
            )
        self.skipped += 1
        self.first_skipped = self.first_skipped or message

    def skip_summary(self) -> str:
        """Say how many bad records were left out, and name the first; "" if there were none."""
        if not self.skipped:
            return ""
        records = "record" if self.skipped == 1 else "records"
        return f"{self.skipped:,} bad {records} left out, the first {self.first_skipped}"

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._offsets)

    def where(self, i: int) -> str:
        """Return `file:line` of record `i`."""
        return f"{self.files[self._file(i)]}:{self._lines[i]}"

    def running(self, i: int) -> bool:
        """Say whether record `i` is a stretch of a .txt file: cut into segments, not truncated."""
        return self.files[self._file(i)].suffix == ".txt"

    def _file(self, i: int) -> int:
        return bisect_right(self._starts, i) - 1

    def __getitem__(self, i: int) -> Record:
        """Read record `i`. Raises `UserError` if the file has changed since it was indexed."""
        k = self._file(i)
        with self._open(k) as file:
            if k in self._layouts:
                return self._record(i, self._read_row(k, file, self._lines[i] - 1))
            file.seek(self._offsets[i])
            data = file.read(self._sizes[i])
        try:
            if self.running(i):
                ends = i + 1 == len(self) or self._file(i + 1) != k
                fields = {"text": data.decode("utf-8-sig")}
                return Record(self.where(i), fields, fields, ends=ends)
            return self._record(i, parse(data))
        except ValueError as error:  # the file changed within one clock tick and kept its size
            raise _changed(self.where(i), str(error)) from None

    def _record(self, i: int, columns: dict[str, Any]) -> Record:
        return Record(self.where(i), self.reading.read(columns).fields, columns)

    def _read_row(self, k: int, file: BinaryIO, row: int) -> dict[str, Any]:
        path, layout = self.files[k], self._layouts[k]
        group = layout.group(row)
        held, held_group, table = self._group
        if (held, held_group) != (k, group):
            table = parquet.read_group(file, layout, path, group=group)
            self._group = k, group, table  # one assignment: another thread may read it meanwhile
        return parquet.read_row(table, row - (layout.ends[group - 1] if group else 0))

    def check_unchanged(self) -> None:
        """Raise `UserError` if any file has changed since it was indexed, without reading it."""
        for k in range(len(self.files)):
            self._compare(k, None)

    @contextlib.contextmanager
    def _open(self, k: int) -> Iterator[BinaryIO]:
        try:
            file = self.files[k].open("rb")
        except OSError as error:
            raise _unreadable(self.files[k], error) from None
        with file:
            self._compare(k, file)
            yield file

    def _compare(self, k: int, file: BinaryIO | None) -> None:
        """Compare a file with its stamp: the open `file` if given, else the file at its path."""
        path, (size, time) = self.files[k], self._stamps[k]
        try:
            stat = path.stat() if file is None else os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(path, error) from None
        if stat.st_size != size:
            raise _changed(path, f"it was {size:,} bytes, is {stat.st_size:,}")
        if stat.st_mtime_ns != time:
            raise _changed(path, "it was written again, of the same size")


def _unreadable(path: Path, error: OSError) -> UserError:
    if isinstance(error, FileNotFoundError):
        return _changed(path, "it is gone")
    return UserError(f"{path}: can't be read ({error.strerror or error})")


def _changed(where: str | Path, how: str) -> UserError:
    return UserError(
        f"{where}: changed while it was in use ({how}); put it back as it was and start again, "
        "which goes on from the last checkpoint"
    )
