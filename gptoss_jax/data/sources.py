"""Files to records: what is read, where each record lies, and what is wrong with it.

A `.jsonl` file holds a record a line: a chat `{"messages": [...], "tools"?, "reasoning"?}` or
`{"text": ...}`. A `.txt` file is one document, however long; for random access it is cut at line
ends into stretches of about `stretch_bytes`.

`Records` keeps 20 bytes a record, not the records: each read opens the file and seeks.
"""

from __future__ import annotations

import contextlib
import glob
import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import CHANNELS, EFFORTS, ROLES

SUFFIXES = (".jsonl", ".txt")
PROGRESS_FROM = 256 << 20  # bytes; a pass over less needs no progress bar


@dataclass(frozen=True)
class Record:
    """One record as read. `where` is `file:line`, for messages."""

    where: str
    fields: dict[str, Any]
    ends: bool = True  # its document ends with it: not so in all but the last stretch of a .txt


def resolve(patterns: Sequence[str], *, field: str = "data.train") -> list[Path]:
    """List the files that files, globs and folders name, each once, in the order given.

    A glob (`**` crosses folders) and a folder (searched in depth for .jsonl and .txt; hidden files
    are left out) give theirs sorted. Raises `UserError` where one names nothing, or another format.
    """
    if not patterns:
        raise UserError(f"{field} names no file: set it to .jsonl or .txt files, globs or folders")
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.is_dir():
            found = [p for p in sorted(path.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
            found = [
                p for p in found if not any(s.startswith(".") for s in p.parts[len(path.parts) :])
            ]
            if not found:
                raise UserError(f"{field}: the folder {pattern} holds no .jsonl or .txt file")
        elif path.is_file():
            found = [path]
        elif glob.has_magic(pattern):
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            found = [p for p in found if p.is_file()]
            if not found:
                raise UserError(f"{field}: no file matches {pattern}")
        else:
            raise UserError(f"{field}: there is no file or folder {pattern}")
        for p in found:
            if p.suffix not in SUFFIXES:
                raise UserError(f"{field}: {p} is neither .jsonl nor .txt")
        files.update(dict.fromkeys(found))
    return list(files)


def parse(line: bytes) -> dict[str, Any]:
    """Read one line of JSONL as a record; `ValueError` says in a phrase what is wrong with it."""
    try:
        record = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"not JSON that can be read ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"{_kind(record)}, not an object with messages or text")
    if "messages" in record:
        _check_chat(record)
    elif "text" not in record:
        raise ValueError("lacks messages (a chat) or text")
    elif not isinstance(record["text"], str):
        raise ValueError(f"text is {_kind(record['text'])}, not a string")
    return record


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _expect(ok: bool, problem: str) -> None:
    if not ok:
        raise ValueError(problem)


def _check_chat(record: dict[str, Any]) -> None:
    """Check what the renderer needs, for it meets a record of large data only when training."""
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


class Records:
    """The records of some files, checked and indexed by byte offset; `records[i]` reads one.

    Making it passes over all files once, so that a bad line stops before training starts, naming
    file and line; with `skip_bad` such lines are left out and counted in `skipped`. Raises
    `UserError` also if no record is left. Blank lines and empty .txt files hold no record.
    """

    def __init__(
        self, files: Sequence[Path], *, field: str, stretch_bytes: int, skip_bad: bool = False
    ) -> None:
        """Index `files`, of which `resolve` made the list; `field` names them in messages."""
        self.files = list(files)
        self.num_bytes = sum(p.stat().st_size for p in self.files)
        self.skipped = 0
        self.first_skipped = ""
        self._skip_bad = skip_bad
        self._starts = []  # the index of each file's first record
        self._offsets, self._sizes, self._lines = array("Q"), array("I"), array("I")
        with progress("reading " + field, self.num_bytes) as advance:
            for path in self.files:
                self._starts.append(len(self._offsets))
                if path.suffix == ".jsonl":
                    self._index_jsonl(path, advance)
                else:
                    self._index_text(path, stretch_bytes, advance)
        if not len(self):
            bad = f" ({self.skip_summary()})" if self.skipped else ""
            names = ", ".join(map(str, self.files[:3])) + (", ..." if len(self.files) > 3 else "")
            raise UserError(f"{field} holds no record: {names}{bad}")

    def _index_jsonl(self, path: Path, advance: Callable[[int], None]) -> None:
        offset = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    try:
                        parse(line)
                        self._add(offset, len(line), number)
                    except ValueError as error:
                        self.bad(f"{path}:{number}", str(error))
                offset += len(line)
                advance(len(line))

    def _index_text(self, path: Path, stretch_bytes: int, advance: Callable[[int], None]) -> None:
        offset, number = 0, 1
        with path.open("rb") as file:
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
        """Stop at a bad record with `UserError`, or count it, as `skip_bad` says."""
        message = f"{where}: {problem}"
        if not self._skip_bad:
            raise UserError(f"{message}; mend it, or leave such out: data.on_bad_record=skip")
        self.skipped += 1
        self.first_skipped = self.first_skipped or message

    def skip_summary(self) -> str:
        """Say how many records were bad and left out, and name the first; "" if none were."""
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
        """Say whether record `i` is a stretch of a .txt file: cut to fit, never truncated."""
        return self.files[self._file(i)].suffix == ".txt"

    def _file(self, i: int) -> int:
        return bisect_right(self._starts, i) - 1

    def __getitem__(self, i: int) -> Record:
        """Read record `i`. Raises `UserError` if the file has changed since it was indexed."""
        k = self._file(i)
        path = self.files[k]
        with path.open("rb") as file:
            file.seek(self._offsets[i])
            data = file.read(self._sizes[i])
        try:
            if self.running(i):
                ends = i + 1 == len(self) or self._file(i + 1) != k
                fields = {"text": data.decode("utf-8-sig")}
                return Record(self.where(i), fields, ends=ends)
            return Record(self.where(i), parse(data))
        except ValueError as error:
            raise UserError(f"{self.where(i)}: changed while it was in use ({error})") from None


def _stretch(file: Any, offset: int, size: int) -> bytes:
    """Read from `offset` to the first line end past `size` bytes, or to twice that if none is."""
    file.seek(offset)
    part = file.read(2 * size)
    if len(part) <= size:
        return part
    cut = part.find(b"\n", size) + 1
    if not cut and len(part) < 2 * size:
        cut = len(part)
    elif not cut:  # at the start of the last character, which may be cut short
        cut = len(part) - next((k for k in range(1, 5) if part[-k] & 0xC0 != 0x80), 0)
    return part[:cut]


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr for a pass over `total` bytes, if they are many; yields `advance(n)`."""
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
            if pending >= 1 << 20:  # the bar costs more than a line
                bar.advance(task, pending)
                pending = 0

        yield advance
