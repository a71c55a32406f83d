"""Read records from files: check each record, and index where it lies.

A `.jsonl` file has one record per line: a chat `{"messages": [...], "tools"?, "reasoning"?}` or
`{"text": ...}`; or, if pairs are asked for, a pair (`data/preferences.py`). A `.parquet` file has
one record per row, with the same fields. A `.txt` file is one document, however long. For random
access it is cut at line ends into stretches: chunks of about `stretch_bytes`, each one record.

`Records` keeps 16 bytes per record in memory, not the record itself: each read opens the file and
seeks. If a file's size or time of change is not as it was at indexing, the run stops.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_jax.data import parquet, preferences
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import CHANNELS, EFFORTS, ROLES

PROGRESS_FROM = 256 << 20  # bytes; a pass over less data shows no progress bar


@dataclass(frozen=True)
class Record:
    """One record. `where` is `file:line` for messages; in parquet, the line is the row from 1."""

    where: str
    fields: dict[str, Any]
    ends: bool = True  # whether its document ends here: False for a stretch of a .txt but the last


def parse(line: bytes, *, pairs: bool = False) -> dict[str, Any]:
    """Read one line of JSONL as a record; raise `ValueError` with a phrase for what is wrong."""
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"not JSON that can be read ({error})") from None
    check(record, pairs=pairs)
    return record


def check(record: Any, *, pairs: bool = False) -> None:
    """Raise `ValueError`, with a phrase for the reason, unless this is a record."""
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)}, not an object with messages or text")
    if pairs:
        preferences.check(record, _check_chat)
    elif "messages" in record:
        _check_chat(record)
    elif "chosen" in record:
        raise ValueError("lacks messages (a chat) or text; a pair is for objective.name dpo")
    elif "text" not in record:
        raise ValueError("lacks messages (a chat) or text")
    elif not isinstance(record["text"], str):
        raise ValueError(f"text is {_kind(record['text'])}, not a string")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", bytes: "bytes"}
    return "null" if value is None else names.get(type(value), "a number")


def _expect(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _check_chat(record: dict[str, Any]) -> None:
    """Check what the renderer needs: records of large data are first rendered during training."""
    messages, tools, effort = (record.get(k) for k in ("messages", "tools", "reasoning"))
    if not isinstance(messages, list):
        raise ValueError(f"messages is {_kind(messages)}, not a list")
    _expect(len(messages) > 0, "messages is empty")
    _expect(
        tools is None or (isinstance(tools, list) and all(isinstance(t, dict) for t in tools)),
        "tools is not a list of objects",
    )
    _expect(
        effort is None or effort in EFFORTS,
        f"reasoning is {effort!r}: it is one of {', '.join(EFFORTS)}",
    )
    for i, message in enumerate(messages):
        _check_message(message, f"messages[{i}]")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"{name} is {_kind(message)}, not an object")
    role, content, channel = (message.get(k) for k in ("role", "content", "channel"))
    thinking, calls = message.get("thinking"), message.get("tool_calls")
    _expect("role" in message, f"{name} lacks role")
    _expect(role in ROLES, f"{name}.role is {role!r}: it is one of {', '.join(ROLES)}")
    _expect(
        channel is None or channel in CHANNELS,
        f"{name}.channel is {channel!r}: it is one of {', '.join(CHANNELS)}",
    )
    _expect(
        thinking is None or isinstance(thinking, str),
        f"{name}.thinking is {_kind(thinking)}, not a string",
    )
    if calls is not None and not isinstance(calls, list):
        raise ValueError(f"{name}.tool_calls is {_kind(calls)}, not a list")
    for i, call in enumerate(calls or []):
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name}.tool_calls[{i}] lacks name")
        _expect(
            isinstance(function.get("arguments"), str | dict),
            f"{name}.tool_calls[{i}] lacks arguments (JSON text or an object)",
        )
    _expect(content is not None or bool(calls), f"{name} lacks content")
    _expect(
        content is None or isinstance(content, str),
        f"{name}.content is {_kind(content)}, not a string",
    )


Stamp = tuple[int, int]  # size in bytes, and time of change in ns


def stamp(path: Path) -> Stamp:
    """Return the size and time of change of a file, which show later whether it has changed."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


class Records:
    """The records of some files, checked and indexed by byte offset; `records[i]` reads one.

    The constructor reads all files once, so that a bad line raises `UserError` before training
    starts; the error names file and line. With `skip_bad`, bad lines are left out and counted in
    `skipped`. `UserError` is also raised if no record is left, and for a .txt file if `pairs` are
    asked for. Blank lines and empty .txt files hold no record.
    """

    def __init__(
        self,
        files: Sequence[Path],
        *,
        field: str,
        stretch_bytes: int,
        skip_bad: bool = False,
        pairs: bool = False,
        whole: bool = False,
    ) -> None:
        """Index `files`, a list from `entries.resolve`; `field` names them in messages.

        Records of parquet files have all columns if `whole`, else only the columns of a chat, a
        text or a pair. Records of .jsonl files always have all fields.
        """
        self.files = list(files)
        self.pairs = pairs
        self.skipped = 0
        self.first_skipped = ""
        self._skip_bad = skip_bad
        self._stamps = [stamp(path) for path in self.files]
        self._layouts: dict[int, parquet.Layout] = {}  # of the parquet files
        for k, path in enumerate(self.files):
            if path.suffix == ".parquet":
                with self._open(k) as file:
                    self._layouts[k] = parquet.read_layout(file, path, pairs=pairs, whole=whole)
            elif path.suffix == ".txt" and pairs:
                raise UserError(f"{path}: plain text, and objective.name dpo trains on pairs")
        self._group: tuple[int, int, Any] = (-1, -1, None)  # file, row group, and its table
        sizes = [
            self._layouts[k].num_bytes if k in self._layouts else size
            for k, (size, _) in enumerate(self._stamps)
        ]
        self.num_bytes = sum(sizes)
        self._starts = []  # the index of each file's first record
        # In parquet, the line is the row; offset and size are not used there, and are 0.
        self._offsets, self._sizes, self._lines = array("Q"), array("I"), array("I")
        with progress("reading " + field, self.num_bytes) as advance:
            for k, path in enumerate(self.files):
                self._starts.append(len(self._offsets))
                with self._open(k) as file:
                    if path.suffix == ".jsonl":
                        self._index_jsonl(path, file, advance)
                    elif path.suffix == ".parquet":
                        self._index_parquet(k, file, advance)
                    else:
                        self._index_text(path, file, stretch_bytes, advance)
        self.check_unchanged()
        if not len(self):
            bad = f" ({self.skip_summary()})" if self.skipped else ""
            names = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
            raise UserError(f"{field} holds no record: {names}{bad}")

    def _index_jsonl(self, path: Path, file: BinaryIO, advance: Callable[[int], None]) -> None:
        offset = 0
        for number, line in enumerate(file, 1):
            if not line.isspace():
                try:
                    parse(line, pairs=self.pairs)
                    self._add(offset, len(line), number)
                except ValueError as error:
                    self.bad(f"{path}:{number}", str(error))
            offset += len(line)
            advance(len(line))

    def _index_parquet(self, k: int, file: BinaryIO, advance: Callable[[int], None]) -> None:
        path, layout = self.files[k], self._layouts[k]
        size = layout.num_bytes // max(1, layout.metadata.num_rows)
        for number, row in enumerate(parquet.read_rows(file, layout, path), 1):
            try:
                if isinstance(row, ValueError):
                    raise row
                check(row, pairs=self.pairs)
                self._add(0, 0, number)
            except ValueError as error:
                self.bad(f"{path}:{number}", str(error))
            advance(size)

    def _index_text(
        self, path: Path, file: BinaryIO, stretch_bytes: int, advance: Callable[[int], None]
    ) -> None:
        offset, number = 0, 1
        while part := _stretch(file, offset, stretch_bytes):
            try:
                if not part.decode("utf-8-sig").isspace():
                    self._add(offset, len(part), number)
            except UnicodeDecodeError as error:
                line = number + part.count(b"\n", 0, error.start)
                self.bad(f"{path}:{line}", "not UTF-8 text")
            offset += len(part)
            number += part.count(b"\n")
            advance(len(part))

    def _add(self, offset: int, size: int, line: int) -> None:
        self._offsets.append(offset)
        self._sizes.append(size)
        self._lines.append(line)

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
                return Record(self.where(i), self._read_row(k, file, self._lines[i] - 1))
            file.seek(self._offsets[i])
            data = file.read(self._sizes[i])
        try:
            if self.running(i):
                ends = i + 1 == len(self) or self._file(i + 1) != k
                fields = {"text": data.decode("utf-8-sig")}
                return Record(self.where(i), fields, ends=ends)
            return Record(self.where(i), parse(data, pairs=self.pairs))
        except ValueError as error:  # the file changed within one clock tick and kept its size
            raise _changed(self.where(i), str(error)) from None

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


def _stretch(file: Any, offset: int, size: int) -> bytes:
    """Read from `offset` to the first line end past `size` bytes; at most twice `size`."""
    file.seek(offset)
    part = file.read(2 * size)
    if len(part) <= size:
        return part
    cut = part.find(b"\n", size) + 1
    if not cut and len(part) < 2 * size:
        cut = len(part)
    elif not cut:  # cut before the last character, which may be incomplete
        cut = len(part) - next((k for k in range(1, 5) if part[-k] & 0xC0 != 0x80), 0)
    return part[:cut]


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr for a pass over `total` bytes, if they are many; yield `advance(n)`."""
    if total < PROGRESS_FROM:
        yield lambda n: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task, pending = bar.add_task(title, total=total), 0

        def advance(n: int) -> None:
            nonlocal pending
            pending += n
            if pending >= 1 << 20:  # updating the bar costs more than reading a line
                bar.advance(task, pending)
                pending = 0

        yield advance
