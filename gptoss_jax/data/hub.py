"""Download a split of a data set of the Hugging Face hub by its name.

    hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]

An example is `hf:HuggingFaceH4/ultrachat_200k:train_sft`. If the names of the data set's own files
tell the split (`train.jsonl`, `data/train-00000-of-00002.parquet`, `en/test/0000.parquet`; folders
other than `data` are configs), these files are used. Otherwise, if no REVISION is given, the hub's
own conversion to parquet is used (the branch refs/convert/parquet). `huggingface_hub` keeps the
files in its cache, so they are found later without a network. Its environment variables (HF_HOME,
HF_TOKEN, HF_HUB_OFFLINE) apply.

Why not the library `datasets`: it needs pandas and 96 MB more. It copies the data to uncompressed
Arrow files before it returns the first record. Without a network it finds only such copies, not
the files in the hub's cache. Here a run reads the original files by row group, and resumes on them.
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

FORMATS = (".parquet", ".jsonl", ".txt")  # if a split has several formats, the first one is used
CONVERTED = "refs/convert/parquet"

_SYNTAX = "hf:OWNER/NAME[@REVISION][:[CONFIG:]SPLIT]"
_NAME = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^:]+))?(?::(?:([^:]+):)?([^:]+))?")
_SHARD = re.compile(r"(?:^|[-_.])\d{4,}(?:-of-(\d{4,}))?(?:-[0-9a-f]{8,})?$")
_SPLITS = ("train", "test", "validation", "valid", "dev")
_NO_SPLITS = ("", "data", "part", "shard")  # stems of file names that do not name a split

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
    """Download the files of a split, or find them in the hub's cache; return them sorted.

    The split is "train" if the name gives none; in data.held_out the name must give one. A process
    asks the hub once. Raises `UserError` if there is no such name, revision, config or split (the
    message lists the splits that exist), if the data set is gated or private, or if there is no
    network and the cache lacks the files.
    """
    wanted = _parse(text, field)
    files, revision = _choose(wanted, field)
    patterns = [glob.escape(name) for name in files]
    folder = _ask(wanted, lambda: _snapshot(wanted, revision, allow_patterns=patterns))
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
        raise UserError(f"{field}: {text} names no split; add it at the end, as in {text}:test")
    return _Wanted(text, repo, revision, config, split or "train")


def _choose(wanted: _Wanted, field: str) -> tuple[list[str], str]:
    """Return the files of the split, and the revision that holds them."""
    failed: UserError | None = None
    available: Splits = {}
    for revision in [wanted.revision] if wanted.revision else ["main", CONVERTED]:
        try:
            found = splits(_ask(wanted, lambda at=revision: _list(wanted, at)))
        except UserError as error:
            # Go on: without a network, the cache may hold the conversion only. A missing conversion
            # is no error: private and large data sets have none.
            failed = failed if revision == CONVERTED else error
            continue
        available |= found
        files = _select(wanted, found, field)
        if files:
            _check_shards(wanted, files, field)
            return files, revision
    if failed is not None:
        raise failed
    names = (
        ", ".join(_spell(key) for key in sorted(available)[:12]) or "no .parquet, .jsonl or .txt"
    )
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
    """Group the files of a data set by (config, split), which their names tell.

    Each split keeps the files of one format: the first of `FORMATS` that it has.
    """
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
    """Refuse an incomplete split, which an interrupted download leaves in the cache."""
    for name in files:
        shard = _SHARD.search(PurePosixPath(name).stem)
        if shard and shard[1] and len(files) < int(shard[1]):
            raise UserError(
                f"{field}: {wanted.text}: {len(files)} of the {int(shard[1])} files are there; "
                "download the rest with a network"
            )


def _list(wanted: _Wanted, revision: str) -> list[str]:
    """Return the names of all files; without a network, of the files in the cache."""
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        api.dataset_info(wanted.repo, revision=revision)  # fails at once without a network
        return api.list_repo_files(wanted.repo, revision=revision, repo_type="dataset")
    except Exception as error:
        if not _is_no_answer(error):
            raise
    # No file matches this pattern, so no file is missing: we get the folder of what is cached.
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
    """Say whether the hub could not be reached or is down; False if it refused the request."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if isinstance(error, HfHubHTTPError):
        return error.response is not None and error.response.status_code >= 500
    return not isinstance(error, HFValidationError)


def _ask(wanted: _Wanted, call: Callable[[], Any]) -> Any:
    """Call the hub; turn its errors, and those of its HTTP client, into a one-line `UserError`."""
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
