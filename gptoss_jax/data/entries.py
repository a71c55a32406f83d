"""Turn the entries of `data.train` and `data.held_out` into files and names of sources.

An entry is a file, a glob, a folder, or `hf:OWNER/NAME`, a data set of the hub (`data/hub.py`).
A prefix `NAME=` gives the entry its name as a source of a mixture.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss_jax.data import hub
from gptoss_jax.errors import UserError

IN_FOLDERS = (".jsonl", ".parquet", ".txt")  # a .json beside data is often a description of it
SUFFIXES = (*IN_FOLDERS, ".json")
_FORMATS = ".jsonl, .json, .parquet or .txt"


@dataclass(frozen=True)
class Entry:
    """One entry: its name as a source, which is unique in the list, and its files."""

    name: str
    files: tuple[Path, ...]


def resolve(patterns: Sequence[str], *, field: str = "data.train") -> list[Path]:
    """List the files of all entries, each file once, in the order given. See `entries`."""
    found = entries(patterns, field=field)
    return list(dict.fromkeys(path for entry in found for path in entry.files))


def entries(patterns: Sequence[str], *, field: str = "data.train") -> list[Entry]:
    """Find the files of each entry, and give each entry a name.

    In a glob, `**` crosses folders. A folder is searched recursively for .jsonl, .parquet and .txt;
    hidden files are left out, and so are .json files, which often only describe data. The files of
    a glob or folder are sorted. An entry without a name gets the name of its file, folder or data
    set, plus a number if that name is taken. Raises `UserError` if an entry matches no file or a
    file of another format, or if two entries were given the same name.
    """
    if not patterns:
        raise UserError(f"{field} names no file: set it to {_FORMATS} files, globs or folders")
    split = [_split_name(pattern) for pattern in patterns]
    taken = [name for name, _ in split if name]
    for name in taken:
        if taken.count(name) > 1:
            raise UserError(f"{field}: {taken.count(name)} entries are named {name!r}")
    found = []
    for name, place in split:
        files = hub.fetch(place, field) if place.startswith("hf:") else _find(place, field)
        if not name:
            name = base = _derive_name(place)
            k = 2
            while name in taken:
                name, k = f"{base}_{k}", k + 1
            taken.append(name)
        found.append(Entry(name, tuple(files)))
    return found


def _split_name(pattern: str) -> tuple[str, str]:
    named = re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", pattern)
    if named is None or Path(pattern).exists():
        return "", pattern
    return named[1], named[2]


def _derive_name(place: str) -> str:
    """Name a source after the last part of its path that is not just wildcards."""
    if place.startswith("hf:"):
        place = re.split("[@:]", place.removeprefix("hf:"))[0]
    else:
        place = str(Path(place).expanduser().resolve()) if set(place) <= set("./") else place
        place = re.sub(r"\.(jsonl?|parquet|txt)$", "", place)
    parts = [re.sub(r"[^A-Za-z0-9_-]+", "_", part).strip("_") for part in place.split("/")]
    return next((part for part in reversed(parts) if part), "data")


def _find(pattern: str, field: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if p.suffix in IN_FOLDERS and p.is_file()]
        found = [p for p in found if not any(s[0] == "." for s in p.parts[len(path.parts) :])]
        if not found:
            raise UserError(
                f"{field}: the folder {pattern} holds no {' or '.join(IN_FOLDERS)} file"
            )
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
            raise UserError(f"{field}: {p} is not {_FORMATS}")
    return found
