"""Describe the data: in words for people, and as a fingerprint that a resumed run compares."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from gptoss_jax.config import Config, DataConfig
from gptoss_jax.data import mended, questions
from gptoss_jax.data.entries import entries, resolve
from gptoss_jax.data.examples import Examples, Stats, open_examples, open_sources
from gptoss_jax.data.mixture import plan, shares
from gptoss_jax.data.windows import Windows

HASH_WHOLE = 1 << 30  # bytes; a file up to this size is hashed as a whole
SAMPLES = 64  # places at which a larger file is hashed, spread evenly
SAMPLE_BYTES = 1 << 20
# Settings that may change while a run goes on: which records are refused, and where they lie.
_MENDING = (
    *("data.on_bad_record", "data.ignore", "data.plain_special_tokens"),
    "files a source",
)


def describe(config: Config, *, held_out: bool = False) -> str:
    """Describe what `data.train` (or `data.held_out`) holds and how well it packs.

    The text is one line. A mixture has one more line for each source: its share of the tokens, and
    how many epochs of it `train.steps` steps make. The numbers are exact for data up to some MiB.
    For larger data they are estimated from a sample and marked "about".
    """
    if held_out and not config.data.held_out:
        return "data.held_out: none, so neither held-out loss nor exact match"
    if config.objective.kind.records == "questions" and not held_out:
        return questions.describe(config)
    if held_out or not config.data.weights:
        examples = open_examples(config, held_out=held_out)
        survey = _survey_of(examples, 0 if held_out else config.train.seed)
        return f"{examples.field}: {_summarise(examples, survey)}"
    sources = open_sources(config)
    surveys = [_survey(plan(source, config)) for source in sources]
    split = shares(config.data.weights)
    # Source i gets the share split[i] of the tokens, and one of its rows holds per_row[i] tokens on
    # average. So T tokens need sum_i(T * split[i] / per_row[i]) rows, which we solve for T.
    per_row = [max(1.0, s.used / max(1, s.packed)) for s in surveys]
    rows = config.train.steps * config.data.batch_size
    tokens = rows / sum(w / n for w, n in zip(split, per_row, strict=True))
    lines = [
        f"data.train: a mixture of {_plural(len(sources), 'source')}, about {round(tokens):,} "
        f"tokens in {_plural(config.train.steps, 'step')}"
    ]
    for source, survey, share in zip(sources, surveys, split, strict=True):
        epochs = share * tokens / (survey.stats.tokens * survey.scale)
        lines.append(
            f"  {source.name}: {share:.1%} of the tokens, {epochs:,.2f} epochs; "
            f"{_summarise(source.examples, survey)}"
        )
    return "\n".join(lines)


def steps_per_epoch(config: Config) -> float:
    """Return how many steps a pass over `data.train` takes, in which each record is trained once.

    It is below 1 if the data fill less than a batch. It is estimated from a sample of data above
    some MiB. Of questions, those that would be left out as too long count too. There is no such
    number for a mixture.
    """
    examples = open_examples(config)
    if config.objective.kind.records == "questions":
        grpo = config.objective.grpo
        return len(examples) * grpo.updates / (config.data.batch_size // grpo.group_size)
    return max(1, _survey_of(examples, config.train.seed).rows) / config.data.batch_size


def describe_length(config: Config) -> list[str]:
    """Return lines that say how many epochs `train.steps` steps are; none for a mixture.

    For a mixture, `describe` says it for each source.
    """
    if config.data.weights:
        return []
    each, steps = steps_per_epoch(config), config.train.steps
    lines = [
        f"length    {_plural(steps, 'step')}: about {steps / each:,.2f} epochs of {each:,.1f} "
        "steps (an epoch is a pass over data.train)"
    ]
    if each < 1:
        asks = config.objective.kind.records == "questions"
        unit = "questions" if asks else f"rows of {config.data.sequence_length:,}"
        lines.append(
            f"          a batch holds more {unit} than data.train has: each step trains a record "
            f"about {1 / each:,.1f} times; lower data.batch_size"
            + ("" if asks else " or data.sequence_length, or give more data")
        )
    return lines


@dataclass(frozen=True)
class _Survey:
    stats: Stats
    scale: float  # number of all records divided by the number counted; 1 if all were counted
    rows: int  # rows of one epoch
    packed: int  # rows that were packed for the survey: those of a whole round or of one window
    used: int  # tokens in these packed rows


@lru_cache(maxsize=2)  # one for the training data, one for the held-out data
def _survey_of(examples: Examples, seed: int) -> _Survey:
    return _survey(Windows(examples, seed=seed))


def _survey(windows: Windows) -> _Survey:
    examples = windows.examples
    stats, n = examples.stats, len(examples)
    count = windows.per_round if stats.records == n else 1
    packed = [row for w in range(count) for row in windows[w]]
    used = sum(len(s.tokens) for row in packed for s in row)
    rows = round(len(packed) * windows.per_round / count / windows.epochs)
    return _Survey(stats, n / stats.records, rows, len(packed), used)


def _summarise(examples: Examples, survey: _Survey) -> str:
    stats, scale, n = survey.stats, survey.scale, len(examples)
    length = examples.config.sequence_length
    about = "" if stats.records == n else "about "
    gone = examples.mended.gone if examples.mended else 0
    full = survey.used / max(1, survey.packed * length)
    parts = [
        f"{_plural(n - gone, 'record')} in {_plural(len(examples.records.files), 'file')}",
        f"{about}{round(stats.tokens * scale):,} tokens ({round(stats.trained * scale):,} trained)",
        f"{about}{_plural(survey.rows, 'row')} of {length:,}, {full:.1%} full",
    ]
    if stats.cut:
        parts.append(f"{about}{round(stats.cut * scale):,} truncated")
    if stats.untrained:
        parts.append(f"{about}{round(stats.untrained * scale):,} left out with nothing to train")
    if stats.turns:
        parts.append(
            f"{about}{_plural(round(stats.turns * scale), 'answer')} not trained, as later turns "
            "leave out their analysis (data.turns=split trains them)"
        )
    if examples.records.skipped:
        parts.append(examples.records.skip_summary())
    if examples.mended and examples.mended.describe():
        parts.append(examples.mended.describe())
    if examples.records.unused:
        parts.append(f"columns not used: {', '.join(sorted(examples.records.unused))}")
    return "; ".join(parts)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' * (n != 1)}"


def fingerprint(config: Config) -> dict[str, Any]:
    """Return what determines the batches of `data.train`: hashes of the files, and settings.

    The value can be written as JSON. Files are named without their folders, so a data set that was
    moved stays the same. Sources are identified by their places in the list. Of a file over 1 GiB,
    64 pieces of 1 MiB are hashed.
    """
    data = config.data
    files, mixture = resolve(data.train), {}
    if data.weights:  # a file may be in several sources
        sources = [entry.files for entry in entries(data.train)]
        files = [path for source in sources for path in source]
        mixture = {
            "data.weights": [round(share, 9) for share in shares(data.weights)],
            "files a source": [len(source) for source in sources],
        }
    return {
        "files": [_file(path) for path in files],
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
            **_if_set(data),
            **mixture,
        },
    }


def _if_set(data: DataConfig) -> dict[str, Any]:
    """Return the settings that runs of before did not have, where they say something."""
    settings = {
        "data.ignore": list(data.ignore),
        "data.plain_special_tokens": data.plain_special_tokens,
    }
    if data.turns != "all":
        settings["data.turns"] = data.turns
    if data.history != "harmony":
        settings["data.history"] = data.history
    if data.date != "none":
        settings["data.date"] = data.date
    return {name: value for name, value in settings.items() if value}


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
    """List the differences of two fingerprints, one phrase each; empty if there are none."""
    found = []
    for key in {**now["settings"], **then["settings"]}:
        was, value = (one["settings"].get(key, "not given") for one in (then, now))
        if was != value:
            found.append(f"{key} was {was}, is {value}")
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


def changes(config: Config, then: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """List the differences of two fingerprints that make a run another one.

    Two kinds do not: other files, if most of the run's records are in them, and the settings in
    `_MENDING`. `data/mended.py` says how the run then goes on. A .txt file has no records, so it
    must stay as it is.
    """
    found = differences(then, now)
    if not found or not all(source.examples.follows for source in open_sources(config)):
        return found
    kept = [
        {
            "files": [file for file in one["files"] if file["name"].endswith(".txt")],
            "settings": {k: v for k, v in one["settings"].items() if k not in _MENDING},
        }
        for one in (then, now)
    ]
    return differences(*kept)


def keep_records(config: Config, folder: Path) -> None:
    """Keep the hashes of the records in the folder of a run, to know them if their files change."""
    mended.keep(folder, [source.examples.records.hashes for source in open_sources(config)])


def _by_name(files: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Key files by name; when a name repeats, number it from the second file on."""
    named: dict[str, dict[str, Any]] = {}
    for file in files:
        name, k = file["name"], 2
        while name in named:
            name, k = f"{file['name']} ({k})", k + 1
        named[name] = file
    return named
