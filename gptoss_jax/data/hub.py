"""Data sets of the Hugging Face hub, by name: which of their files are a split, downloaded.

    hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]

such as `hf:HuggingFaceH4/ultrachat_200k:train_sft`. The files are those of the data set itself
where their names tell the split (`train.jsonl`, `data/train-00000-of-00002.parquet`,
`en/test/0000.parquet`; folders beside `data` are configs), and else, without a REVISION, the hub's
own conversion to parquet (the branch refs/convert/parquet). `huggingface_hub` keeps them in its
cache, from where they come without a network; its variables (HF_HOME, HF_TOKEN, HF_HUB_OFFLINE)
hold.

Why not `datasets`: it needs pandas and 96 MB more, copies what it reads to Arrow files of its own,
uncompressed, before the first record, and without a network finds only what it has so copied, not
what is in the hub's cache. The files themselves are what a run reads by row groups and resumes on.
"""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

from gptoss_jax.errors import UserError

FORMATS = (".parquet", ".jsonl", ".txt")  # where a split comes in several, the first of these
CONVERTED = "refs/convert/parquet"

_SYNTAX = "hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(?:([^:]+):)?([^:]+))?")
_SHARD = re.compile(r"(?:^|[-_.])\d{4,}(?:-of-(\d{4,}))?(?:-[0-9a-f]{8,})?$")
_SPLITS = ("train", "test", "validation", "valid", "dev")
_NO_SPLITS = ("", "data", "part", "shard")  # what file names say that say nothing

Splits = dict[tuple[str, str], list[str]]  # (config, split) -> files


@dataclass(frozen=True)
class _Wanted:
    text: str  # as the user wrote it, for messages
    repo: str
    revision: str | None
    config: str | None
    split: str


@cache
def fetch(text: str, field: str) -> list[Path]:
    """Download the files of a split, or find them in the hub's cache; sorted.

    The split is "train" where the name says none, but it has to in data.held_out. A process asks
    the hub once. Raises `UserError`: no such name, revision, config or split (what there is is
    named), a gated or private data set, no network and nothing cached.
    """
    wanted = _parse(text, field)
    files, revision = _choose(wanted, field)
    only = [glob.escape(name) for name in files]
    folder = _ask(wanted, lambda: _snapshot(wanted, revision, allow_patterns=only))
    for name in files:
        if not (folder / name).is_file():
            raise UserError(f"{field}: {text}: {name} was not downloaded; try again")
    return [folder / name for name in files]


def _parse(text: str, field: str) -> _Wanted:
    match = _NAME.fullmatch(text)
    if match is None:
        raise UserError(f"{field}: {text} is no name of a hub data set: {_SYNTAX}")
    repo, revision, config, split = match.groups()
    if split is None and field != "data.train":
        raise UserError(f"{field}: {text} names no split; write it behind, as in {text}:test")
    return _Wanted(text, repo, revision, config, split or "train")


def _choose(wanted: _Wanted, field: str) -> tuple[list[str], str]:
    """Return the files of the split, and the revision that they are of."""
    failed: UserError | None = None
    there: Splits = {}
    for revision in [wanted.revision] if wanted.revision else ["main", CONVERTED]:
        try:
            found = splits(_ask(wanted, lambda at=revision: _list(wanted, at)))
        except UserError as error:
            # Without a network the cache may hold the conversion alone; and with one there may be
            # no conversion, as of private data sets and large ones.
            failed = failed if revision == CONVERTED else error
            continue
        there |= found
        files = _select(wanted, found, field)
        if files:
            _check_shards(wanted, files, field)
            return files, revision
    if failed is not None:
        raise failed
    names = ", ".join(_spell(key) for key in sorted(there)[:12]) or "no .parquet, .jsonl or .txt"
    config = f" of config {wanted.config}" if wanted.config else ""
    raise UserError(
        f"{field}: {wanted.text}: there is no split {wanted.split}{config}; it has {names}"
    )


def _spell(key: tuple[str, str]) -> str:
    return key[1] if key[0] == "default" else ":".join(key)


def _select(wanted: _Wanted, found: Splits, field: str) -> list[str] | None:
    configs = sorted(config for config, split in found if split == wanted.split)
    config = wanted.config
    if config is None and configs:
        config = "default" if "default" in configs else configs[0]
        if config != "default" and len(configs) > 1:
            raise UserError(
                f"{field}: {wanted.text}: {len(configs)} configs have the split {wanted.split} "
                f"({', '.join(configs[:12])}); name one: hf:{wanted.repo}:CONFIG:{wanted.split}"
            )
    return found.get((config or "", wanted.split))


def splits(files: Iterable[str]) -> Splits:
    """Sort the files of a data set by (config, split), as their names tell; one format a split."""
    found: Splits = {}
    for name in sorted(files):
        path = PurePosixPath(name)
        if path.suffix not in FORMATS or any(part.startswith(".") for part in path.parts):
            continue
        folders = [part for part in path.parts[:-1] if part != "data"]
        split = _SHARD.sub("", path.stem)
        known = [part for part in folders if part in _SPLITS]
        if known and split not in _SPLITS:
            split = known[-1]
            folders.remove(split)
        elif split in _NO_SPLITS:
            split = folders.pop() if folders else "train"
        found.setdefault(("/".join(folders) or "default", split), []).append(name)
    for key, names in found.items():
        best = next(s for s in FORMATS if any(n.endswith(s) for n in names))
        found[key] = [n for n in names if n.endswith(best)]
    return found


def _check_shards(wanted: _Wanted, files: list[str], field: str) -> None:
    """Refuse a part of a split, as an interrupted download leaves it in the cache."""
    for name in files:
        shard = _SHARD.search(PurePosixPath(name).stem)
        if shard and shard[1] and len(files) < int(shard[1]):
            raise UserError(
                f"{field}: {wanted.text}: {len(files)} of the {int(shard[1])} files are there; "
                "download the rest with a network"
            )


def _list(wanted: _Wanted, revision: str) -> list[str]:
    """Return the names of all files; without a network, of those in the cache."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.dataset_info(wanted.repo, revision=revision)  # without a network fails at once
        return api.list_repo_files(wanted.repo, revision=revision, repo_type="dataset")
    except Exception as error:
        if not _is_no_answer(error):
            raise
    # A pattern that no file has: what is in the cache counts, not what is missing there.
    folder = _snapshot(wanted, revision, allow_patterns=["?/"], local_files_only=True)
    return [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]


def _snapshot(wanted: _Wanted, revision: str, **which: Any) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.snapshot_download(
            wanted.repo, repo_type="dataset", revision=revision, **which
        )
    )


def _is_no_answer(error: Exception) -> bool:
    """Say whether the hub could not be reached, or is down: not that it refused."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _ask(wanted: _Wanted, call: Callable[[], Any]) -> Any:
    """Call the hub; its errors, and those of its HTTP client, become a line."""
    from huggingface_hub import errors

    try:
        return call()
    except errors.GatedRepoError:
        why = (
            f"it is gated: accept its terms on https://huggingface.co/datasets/{wanted.repo}, "
            "then `hf auth login` or set HF_TOKEN"
        )
    except errors.RepositoryNotFoundError:
        why = "the hub has no such data set, or it is private: `hf auth login` or set HF_TOKEN"
    except errors.RevisionNotFoundError:
        why = f"it has no revision {wanted.revision or 'main'}"
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = (
            "the hub can't be reached and its cache here lacks it: connect, or give the path of "
            "its files"
        )
    except Exception as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(f"{wanted.text}: {why}")
