"""Read runs from their workdirs: the data of a report page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.runs import metrics
from gptoss_jax.runs.headlines import Losses, losses_of

EVENTS = "events.jsonl"
CONFIG = "config.json"

Points = list[tuple[float, float]]  # (step, value)


@dataclass(frozen=True)
class Run:
    """One run: its records in rising order of steps, and the problems in reading them.

    `samples` are answers to held-out questions, and `answers` those that GRPO sampled.
    """

    name: str
    workdir: Path
    records: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    answers: list[dict[str, Any]]
    events: list[dict[str, Any]]
    config: dict[str, Any]  # {} if it is missing
    problems: list[str]

    def points(self, name: str) -> Points:
        """Return (step, value) for each record with a finite value under `name`."""
        found = [r for r in self.records if _is_number(r.get(name))]
        return [(float(r["step"]), float(r[name])) for r in found]

    def last(self, name: str) -> float | None:
        """Return the last value under a name."""
        points = self.points(name)
        return points[-1][1] if points else None

    def field(self, path: str) -> Any:
        """Return a field of the config, such as `train.steps`; None if it is not known."""
        value: Any = self.config
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        return value

    @property
    def losses(self) -> Losses:
        """What the losses of the run measure."""
        return losses_of(self.records)

    def names(self) -> list[str]:
        """Return the names of all numbers in the records, in the order of their first use."""
        seen = {name: None for r in self.records for name, v in r.items() if _is_number(v)}
        return [name for name in seen if name != "step"]


def load(workdirs: Sequence[str | Path]) -> list[Run]:
    """Read the runs in workdirs; `problems` lists the lines and files that can't be read.

    Raises:
        UserError: a folder does not exist, or holds no run.
    """
    folders = [Path(w) for w in workdirs]
    return [_load(folder, name) for folder, name in zip(folders, _names(folders), strict=True)]


def _load(folder: Path, name: str) -> Run:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the workdir of a run")
    if not (folder / metrics.FILE).is_file() and not (folder / CONFIG).is_file():
        raise UserError(
            f"{folder}: no run in it: there is neither {metrics.FILE} nor {CONFIG}; give a workdir"
        )
    problems: list[str] = []
    if not (folder / metrics.FILE).is_file():
        problems.append(f"{metrics.FILE} is missing")
    files = (metrics.FILE, metrics.SAMPLES, metrics.ANSWERS, EVENTS)
    records, samples, answers, events = (_read_lines(folder / f, problems) for f in files)
    config = _read_config(folder, problems)
    return Run(name, folder, records, samples, answers, events, config, problems)


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """Read records with a step, in rising order; `problems` gets the numbers of other lines."""
    if not path.is_file():
        return []
    records, bad = [], []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        problems.append(f"{path.name} can't be read: {error.strerror}")
        return []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            bad.append(number)
            continue
        if isinstance(record, dict) and _is_number(record.get("step")):
            records.append(record)
        elif record is not None:
            bad.append(number)
    if bad:
        shown = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if bad[8:] else "")
        problems.append(f"{path.name}: left out as no records: line{'s' * (len(bad) > 1)} {shown}")
    return sorted(records, key=lambda r: r["step"])


def _read_config(folder: Path, problems: list[str]) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        problems.append(f"{CONFIG} is missing")
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        problems.append(f"{CONFIG} can't be read: {error}")
        return {}
    return config


def _names(folders: list[Path]) -> list[str]:
    """Name folders by as few of their last parts as make the names different."""
    parts = [folder.absolute().parts for folder in folders]
    most = max(map(len, parts))
    for count in range(1, most + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{'/'.join(p[-1:])} ({i})" for i, p in enumerate(parts, 1)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
