"""Read records from files: check each record, and index where it lies.

A `.jsonl` file has one record per line, a `.json` file a list of them, a `.parquet` file one per
row: in any format of `data/formats.py`. A `.txt` file is one document, however long. For random
access it is cut at line ends into stretches: chunks of about `stretch_bytes`, each one record.

`Records` keeps 16 bytes per record in memory, not the record itself: each read opens the file and
seeks. If a file's size or time of change is not as it was at indexing, the run stops.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from gptoss_jax import harmony
from gptoss_jax.data import formats, parquet, preferences
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import EFFORTS
from gptoss_jax.harmony.dialects import kind

SPELLS = (
    "spells one of Harmony's special tokens: give a chat as messages, each with its own text, or "
    "set data.plain_special_tokens if the tokens are meant as text"
)
PROGRESS_FROM = 256 << 20  # bytes; a pass over less data shows no progress bar


@dataclass(frozen=True)
class Record:
    """One record. `where` is `file:line` for messages; in parquet, the line is the row from 1.

    `fields` are those of a chat, a text or a pair (`data/formats.py`), `columns` those of the file.
    """

    where: str
    fields: dict[str, Any]
    columns: dict[str, Any]
    ends: bool = True  # whether its document ends here: False for a stretch of a .txt but the last


@dataclass(frozen=True)
class Reading:
    """How records are read: what kind they are, and what of them is passed over."""

    pairs: bool = False
    ignore: tuple[str, ...] = ()  # columns; keys of messages as messages.KEY
    plain_special_tokens: bool = False  # a text that spells Harmony's special tokens is plain text

    def read(self, columns: Any) -> formats.Read:
        """Return a record in one of the three forms, its messages with Harmony's fields alone.

        Raises ValueError, with a phrase for the reason, if it is none of them.
        """
        if not isinstance(columns, dict):
            raise ValueError(f"{kind(columns)}, not an object with messages or text")
        read = formats.read(columns, pairs=self.pairs, ignore=self.ignore)
        own = (name for name in self.ignore if name.startswith("messages."))
        keys = [name.removeprefix("messages.") for name in own]
        chats = {"messages": read.fields.get("messages")}
        if self.pairs:
            chats = preferences.split(read.fields)._asdict()
        elif "text" in read.fields:
            return read
        try:
            for name, chat in chats.items():
                read.fields[name] = harmony.read_messages(chat, name, ignore=keys)
        except UserError as error:
            raise ValueError(str(error)) from None
        return read

    def check(self, columns: Any) -> formats.Read:
        """Return what `read` does; raise ValueError also for what can't be rendered."""
        read = self.read(columns)
        try:
            if self.pairs:
                preferences.check(read.fields, self._check_chat)
            elif "messages" in read.fields:
                self._check_chat(read.fields)
            elif harmony.spelled(read.fields["text"]) is not None and not self.plain_special_tokens:
                harmony.read_rendering(read.fields["text"])
        except UserError as error:
            raise ValueError(str(error)) from None
        return read

    def _check_chat(self, fields: dict[str, Any]) -> None:
        """Check all that the renderer needs, so that it refuses nothing during training."""
        messages, effort = fields["messages"], fields.get("reasoning") or EFFORTS[0]
        harmony.check(messages, fields.get("tools"), effort)
        where = "" if self.plain_special_tokens else _spelled(messages, "messages")
        if where:
            raise ValueError(f"{where} {SPELLS}")


def parse(line: bytes) -> dict[str, Any]:
    """Read one line of JSONL; raise `ValueError` with a phrase for what is wrong."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"not JSON that can be read ({error})") from None


def _spelled(value: Any, where: str) -> str:
    """Return where a text in `value` spells a special token of Harmony; "" if none does."""
    if isinstance(value, str):
        return "" if harmony.spelled(value) is None else where
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(value, dict):
        items = ((f"{where}.{k}", v) for k, v in value.items() if k not in ("ids", "content_type"))
    elif isinstance(value, list):
        items = ((f"{where}[{i}]", v) for i, v in enumerate(value))
    return next(filter(None, (_spelled(v, place) for place, v in items)), "")


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
        reading: Reading | None = None,
        whole: bool = False,
    ) -> None:
        """Index `files`, a list from `entries.resolve`; `field` names them in messages.

        Records of parquet files have all columns if `whole`, else only those that a format reads.
        Records of .json and .jsonl files always have all columns.
        """
        self.files = list(files)
        self.reading = reading = reading or Reading()
        self.pairs = pairs = reading.pairs
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
                    elif path.suffix == ".json":
                        self._index_json(path, file, advance)
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
                    self._check(parse(line))
                    self._add(offset, len(line), number)
                except ValueError as error:
                    self.bad(f"{path}:{number}", str(error))
            offset += len(line)
            advance(len(line))

    def _check(self, columns: Any) -> None:
        self.unused.update(self.reading.check(columns).unused)

    def _index_json(self, path: Path, file: BinaryIO, advance: Callable[[int], None]) -> None:
        """Index a list of records, each by the place of its object in the file."""
        try:
            data = file.read()
            mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
            for offset, size, line, value in _items(data[mark:].decode()):
                try:
                    self._check(value)
                    self._add(mark + offset, size, line)
                except ValueError as error:
                    self.bad(f"{path}:{line}", str(error))
                advance(size)
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8 text") from None
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); a .json "
                "file is a list of records, and one with a record a line is called .jsonl"
            ) from None

    def _index_parquet(self, k: int, file: BinaryIO, advance: Callable[[int], None]) -> None:
        path, layout = self.files[k], self._layouts[k]
        size = layout.num_bytes // max(1, layout.metadata.num_rows)
        for number, row in enumerate(parquet.read_rows(file, layout, path), 1):
            try:
                if isinstance(row, ValueError):
                    raise row
                self._check(row)
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
                text = part.decode("utf-8-sig")
                spelled = None if self.reading.plain_special_tokens else harmony.spelled(text)
                if spelled is not None:
                    line = number + text.count("\n", 0, spelled)
                    self.bad(f"{path}:{line}", f"plain text that {SPELLS}")
                elif not text.isspace():
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


def _items(text: str) -> Iterator[tuple[int, int, int, Any]]:
    """Yield offset and size in bytes, line and value of each item of a JSON list."""
    decode, place, offset, line = json.JSONDecoder().raw_decode, 0, 0, 1
    begin = re.compile(r"\s*\[\s*(\]\s*\Z)?").match(text)
    if begin is None:
        raise json.JSONDecodeError("Expecting a list", text, 0)
    at = begin.end()
    if begin[1] is not None:
        return
    while True:
        value, end = decode(text, at)
        offset += len(text[place:at].encode())
        line += text.count("\n", place, at)
        size = len(text[at:end].encode())
        yield offset, size, line, value
        place, offset, line = end, offset + size, line + text.count("\n", at, end)
        after = re.compile(r"\s*(,\s*|\]\s*\Z)").match(text, end)
        if after is None:
            raise json.JSONDecodeError("Expecting , or the end of the list", text, end)
        if after[1][0] == "]":
            return
        at = after.end()


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
