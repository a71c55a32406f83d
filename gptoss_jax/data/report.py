"""What the data is: in a line for people, and as a fingerprint for a run that goes on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.loader import Windows
from gptoss_jax.data.sources import resolve

HASH_WHOLE = 1 << 30  # bytes; of a larger file, SAMPLES spread evenly are hashed
SAMPLES = 64
SAMPLE_BYTES = 1 << 20


def describe(config: Config, *, held_out: bool = False) -> str:
    """Say in one line what `data.train`, or `data.held_out`, holds and how well it packs.

    Exact for data up to some MiB; else from a sample, and marked "about".
    """
    examples = open_examples(config, held_out=held_out)
    stats, n = examples.stats, len(examples)
    windows = Windows(examples, seed=0 if held_out else config.train.seed)
    exact = stats.records == n
    count = windows.per_epoch if exact else 1
    packed = [row for w in range(count) for row in windows[w]]
    used = sum(len(s.tokens) for row in packed for s in row)
    length = config.data.sequence_length
    scale, about = (1.0, "") if exact else (n / stats.records, "about ")
    rows = round(len(packed) * windows.per_epoch / count)
    full = used / max(1, len(packed) * length)
    files = _plural(len(examples.records.files), "file")
    parts = [
        f"{examples.field}: {_plural(n, 'record')} in {files}",
        f"{about}{round(stats.tokens * scale):,} tokens ({round(stats.trained * scale):,} trained)",
        f"{about}{_plural(rows, 'row')} of {length:,}, {full:.1%} full",
    ]
    if stats.cut:
        parts.append(f"{about}{round(stats.cut * scale):,} truncated")
    if stats.untrained:
        parts.append(f"{about}{round(stats.untrained * scale):,} left out with nothing to train")
    if examples.records.skipped:
        parts.append(examples.records.skip_summary())
    return "; ".join(parts)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def fingerprint(config: Config) -> dict[str, Any]:
    """Return what decides the batches of `data.train`, JSON-able: files by content, and settings.

    Files go by their names without folders, so a data set that moved is the same. Files over 1 GiB
    are hashed at 64 places of 1 MiB.
    """
    data = config.data
    return {
        "files": [_file(path) for path in resolve(data.train)],
        "settings": {
            "data.sequence_length": data.sequence_length,
            "data.batch_size": data.batch_size,
            "data.on_long": data.on_long,
            "data.on_bad_record": data.on_bad_record,
            "data.train_on": list(data.train_on),
            "data.reasoning": data.reasoning,
            "data.pack_window": data.pack_window,
            "model.vocab_size": config.model.vocab_size,
            "train.seed": config.train.seed,
        },
    }


def _file(path: Path) -> dict[str, Any]:
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= HASH_WHOLE:
            key, digest = "sha256", hashlib.file_digest(file, "sha256")
        else:
            key, digest = "sha256_sampled", hashlib.sha256()
            for k in range(SAMPLES):
                file.seek(k * (size - SAMPLE_BYTES) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return {"name": path.name, "size": size, key: digest.hexdigest()}


def differences(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Say, a phrase each, in what two fingerprints differ; empty if they do not."""
    found = []
    for key, value in now["settings"].items():
        old = then["settings"].get(key)
        if old != value:
            found.append(f"{key} was {old}, is {value}")
    old_files, new_files = _by_name(then["files"]), _by_name(now["files"])
    found += [f"data file {name} is gone" for name in old_files if name not in new_files]
    found += [f"data file {name} is new" for name in new_files if name not in old_files]
    for name, file in new_files.items():
        old = old_files.get(name, file)
        if old["size"] != file["size"]:
            found.append(f"data file {name} was {old['size']:,} bytes, is {file['size']:,}")
        elif old != file:
            found.append(f"data file {name} has other content")
    if not found and then["files"] != now["files"]:
        found.append("the data files come in another order")
    return found


def _by_name(files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key files by name; a name that several folders have gets a number from the second on."""
    named: dict[str, dict[str, Any]] = {}
    for file in files:
        name, k = file["name"], 2
        while name in named:
            name, k = f"{file['name']} ({k})", k + 1
        named[name] = file
    return named
