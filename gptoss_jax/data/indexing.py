"""Check every record of some files and note where it lies: in parallel, and once a file.

A file is indexed in parts: a .jsonl file by stretches of its bytes, a parquet file by row groups,
other files as a whole. Large data is given to several processes, and the index of a large file is
kept in the user's cache ($XDG_CACHE_HOME/gptoss_jax/data), so that the next run does not check the
file again.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import itertools
import json
import os
import re
import sys
import zipfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import gptoss_jax
from gptoss_jax import harmony
from gptoss_jax.data import parquet, workers
from gptoss_jax.data.reading import SPELLS, Reading
from gptoss_jax.errors import UserError

PARALLEL_FROM = 64 << 20  # bytes; less data is checked by this process alone
CACHE_FROM = 8 << 20  # bytes; the index of a smaller file is not kept
PROGRESS_FROM = 64 << 20  # bytes; a pass over less data shows no progress bar
PART_BYTES = 8 << 20  # of a .jsonl file or a parquet file: what a process checks at a time

Stamp = tuple[int, int]  # size in bytes, and time of change in ns


@dataclass
class Index:
    """The good records of a file or of a part of it, and what is wrong with the others.

    A record has an offset and a size in bytes (0 in parquet), a line (in parquet the row, from 1)
    and a hash of its content. The hash is the same wherever the record lies and however its file
    is written.
    """

    offsets: array[int] = field(default_factory=lambda: array("Q"))
    sizes: array[int] = field(default_factory=lambda: array("I"))
    lines: array[int] = field(default_factory=lambda: array("I"))
    hashes: array[int] = field(default_factory=lambda: array("Q"))
    bad: list[tuple[int, str]] = field(default_factory=list)  # line, and what is wrong
    unused: Counter[str] = field(default_factory=Counter)  # columns that nothing reads
    num_lines: int = 0

    def check(self, columns: Any, reading: Reading, *, offset: int, size: int, line: int) -> None:
        """Add a record, or what is wrong with it."""
        try:
            read = reading.check(columns)
            # A text is another record if it is read as the chat that it spells.
            chat = "text" in read.fields and reading.is_rendering(read.fields["text"])
            content = json.dumps([read.fields, chat], sort_keys=True, default=str).encode()
        except ValueError as error:
            self.bad.append((line, str(error)))
            return
        except RecursionError:
            self.bad.append((line, "objects or lists that are nested too deeply to be read"))
            return
        self.unused.update(read.unused)
        self.add(content, offset=offset, size=size, line=line)

    def add(self, content: bytes, *, offset: int, size: int, line: int) -> None:
        """Add a record of this content, which is known to be good."""
        self.offsets.append(offset)
        self.sizes.append(size)
        self.lines.append(line)
        digest = hashlib.blake2b(content, digest_size=8).digest()
        self.hashes.append(int.from_bytes(digest, "little"))

    def extend(self, part: Index) -> None:
        """Add the part of the file that comes next."""
        self.offsets += part.offsets
        self.sizes += part.sizes
        self.lines += array("I", (self.num_lines + line for line in part.lines))
        self.hashes += part.hashes
        self.bad += [(self.num_lines + line, problem) for line, problem in part.bad]
        self.unused += part.unused
        self.num_lines += part.num_lines


@dataclass(frozen=True)
class Job:
    """A file to index, and how to read it."""

    path: Path
    stamp: Stamp
    reading: Reading
    layout: parquet.Layout | None  # of a parquet file
    stretch_bytes: int  # of a .txt file: the size of a record

    @property
    def num_bytes(self) -> int:
        """Bytes of its records; of a parquet file, after decompression."""
        return self.layout.num_bytes if self.layout else self.stamp[0]


@dataclass(frozen=True)
class _Part:
    """A part of a file: bytes of a .jsonl file, row groups of a parquet file, else all of it."""

    job: Job
    start: int
    end: int
    num_bytes: int


def index(jobs: Sequence[Job], *, title: str, stop_at_bad: bool = False) -> Iterator[Index]:
    """Yield the index of each file, in order. `title` names the pass in the progress bar.

    With `stop_at_bad`, the index that holds the first bad record is the last one, and may end
    after that record.

    Raises:
        UserError: a file can't be read, or is not in its format at all. A record that is bad is
            none of these: it is in the index.
    """
    kept = [_read_cache(job) for job in jobs]
    parts = [part for job, known in zip(jobs, kept, strict=True) if not known for part in _cut(job)]
    total = sum(part.num_bytes for part in parts)
    with contextlib.ExitStack() as stack:
        run: Callable[[Iterable[_Part]], Iterator[Index]] = partial(map, index_part)
        if total >= PARALLEL_FROM and len(parts) > 1:
            run = stack.enter_context(workers.processes(index_part, min(len(parts), _cpus())))
        advance = stack.enter_context(progress(title, total))
        results = zip(parts, run(parts), strict=True)
        for job, known in zip(jobs, kept, strict=True):
            found = known or Index()
            for _ in () if known else _cut(job):
                part, result = next(results)
                found.extend(result)
                advance(part.num_bytes)
                if found.bad and stop_at_bad:
                    break
            else:
                if not known:
                    _write_cache(job, found)
            yield found
            if found.bad and stop_at_bad:
                return


def index_part(part: _Part) -> Index:
    """Check the records of a part. Its lines count from 1 at its beginning."""
    job, found = part.job, Index()
    with job.path.open("rb") as file:
        if job.path.suffix == ".jsonl":
            _index_lines(found, file, job.reading, part)
        elif job.path.suffix == ".json":
            _index_json(found, file, job)
        elif job.layout is not None:
            _index_rows(found, file, job, range(part.start, part.end))
        else:
            _index_text(found, file, job)
    return found


def _cut(job: Job) -> list[_Part]:
    """Cut a file into the parts that are indexed one by one."""
    if job.layout is not None:
        size, groups = job.layout.num_bytes, len(job.layout.ends)
        count = max(1, min(groups, size // PART_BYTES))
        marks = [groups * k // count for k in range(count + 1)]
    else:
        size = job.stamp[0]
        count = max(1, size // PART_BYTES) if job.path.suffix == ".jsonl" else 1
        marks = [size * k // count for k in range(count + 1)]
    ends = itertools.pairwise(marks)
    return [_Part(job, start, end, size // count) for start, end in ends]


def _index_lines(found: Index, file: BinaryIO, reading: Reading, part: _Part) -> None:
    """Index the lines that begin in the part; the last of them may end behind it."""
    offset = part.start
    if offset:  # the line that this byte is in began earlier, unless it is the first of its line
        file.seek(offset - 1)
        offset += len(file.readline()) - 1
    while offset < part.end:
        line = file.readline()
        if not line:
            break
        found.num_lines += 1
        if not line.isspace():
            try:
                columns = parse(line)
            except ValueError as error:
                found.bad.append((found.num_lines, str(error)))
            else:
                where = {"offset": offset, "size": len(line), "line": found.num_lines}
                found.check(columns, reading, **where)
        offset += len(line)


def _index_json(found: Index, file: BinaryIO, job: Job) -> None:
    """Index a list of records, each by the place of its object in the file."""
    try:
        data = file.read()
        mark = len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0
        for offset, size, line, value in _items(data[mark:].decode()):
            found.check(value, job.reading, offset=mark + offset, size=size, line=line)
    except UnicodeDecodeError:
        raise UserError(f"{job.path}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{job.path}:{error.lineno}: not JSON ({error.msg} at column {error.colno}); a .json "
            "file is a list of records, and one with a record a line is called .jsonl"
        ) from None


def _index_rows(found: Index, file: BinaryIO, job: Job, groups: range) -> None:
    assert job.layout is not None
    for row in parquet.read_rows(file, job.layout, job.path, groups=groups):
        found.num_lines += 1
        if isinstance(row, ValueError):
            found.bad.append((found.num_lines, str(row)))
        else:
            found.check(row, job.reading, offset=0, size=0, line=found.num_lines)


def _index_text(found: Index, file: BinaryIO, job: Job) -> None:
    offset, number = 0, 1
    while part := _stretch(file, offset, job.stretch_bytes):
        try:
            text = part.decode("utf-8-sig")
            spelled = None if job.reading.plain_special_tokens else harmony.spelled(text)
            if spelled is not None:
                line = number + text.count("\n", 0, spelled)
                found.bad.append((line, f"plain text that {SPELLS}"))
            elif not text.isspace():
                found.add(part, offset=offset, size=len(part), line=number)
        except UnicodeDecodeError as error:
            line = number + part.count(b"\n", 0, error.start)
            found.bad.append((line, "not UTF-8 text"))
        offset += len(part)
        number += part.count(b"\n")


def parse(line: bytes) -> Any:
    """Read one line of JSONL; raise `ValueError` with a phrase for what is wrong."""
    try:
        return json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number or a nesting beyond Python's limits
        raise ValueError(f"not JSON that can be read ({error})") from None


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
        try:
            value, end = decode(text, at)
        except json.JSONDecodeError:
            raise
        except (ValueError, RecursionError) as error:  # as in `parse`
            raise json.JSONDecodeError(f"a value that can't be read: {error}", text, at) from None
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


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- The cache ------------------------------------------------------------------------------


def _read_cache(job: Job) -> Index | None:
    """Return the index that was kept of a file, if the file and the checks are as they were."""
    if job.num_bytes < CACHE_FROM:
        return None
    try:
        with _cache_file(job).open("rb") as file, np.load(file) as stored:
            about = json.loads(str(stored["about"]))
            if about["of"] != _cache_key(job):
                return None
            found = Index(
                **{name: array(code, stored[name].tobytes()) for name, code in _COLUMNS.items()},
                bad=[(line, problem) for line, problem in about["bad"]],
                unused=Counter(about["unused"]),
                num_lines=about["num_lines"],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # none, or a damaged one
        return None
    return found


def _write_cache(job: Job, found: Index) -> None:
    """Keep the index of a file; a cache that can't be written is left out."""
    if job.num_bytes < CACHE_FROM:
        return
    about = {"of": _cache_key(job), "bad": found.bad, "num_lines": found.num_lines}
    path = _cache_file(job)
    part = path.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            columns: dict[str, Any] = {name: np.array(getattr(found, name)) for name in _COLUMNS}
            np.savez(file, about=json.dumps(about | {"unused": dict(found.unused)}), **columns)
        part.replace(path)


_COLUMNS = {"offsets": "Q", "sizes": "I", "lines": "I", "hashes": "Q"}


def _cache_file(job: Job) -> Path:
    """Return the file for the index: one for each file and way of reading it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = f"{job.path.absolute()} {job.reading} {job.stretch_bytes}"
    digest = hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
    return folder / "gptoss_jax" / "data" / f"{digest}.npz"


def _cache_key(job: Job) -> list[Any]:
    return [*job.stamp, list(job.layout.columns) if job.layout else [], _code()]


@cache
def _code() -> str:
    """Hash the code of the checks: another version of them checks a file again."""
    digest, package = hashlib.sha256(), Path(gptoss_jax.__file__).parent
    for room in ("data", "harmony"):
        for path in sorted((package / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr for a pass over `total` bytes, if they are many; yield `advance(n)`.

    Where stderr is no terminal, such as in a log or a notebook, a line says what is done.
    """
    if total < PROGRESS_FROM or not sys.stderr.isatty():
        if total >= PROGRESS_FROM:
            print(f"{title}: {total / 1e9:,.2f} GB", file=sys.stderr)
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
