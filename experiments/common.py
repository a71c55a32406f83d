"""What the runner and the experiments' analyses share: runs, their numbers, lines over seeds."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import re
import runpy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptoss_jax.config import Config
from gptoss_jax.errors import UserError
from gptoss_jax.runs import metrics

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent

Curve = tuple[list[float], list[float]]  # x and y


@dataclasses.dataclass(frozen=True)
class Run:
    """One training run that is complete: a variant with a seed."""

    variant: str
    seed: int
    config: Config
    workdir: Path


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is kept of a run: numbers for the table, in its order, and curves for the figure."""

    numbers: dict[str, float]
    curves: dict[str, Curve]


Results = dict[str, list[Measured]]  # a variant's runs, one a seed


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A folder of `experiments/`: its config files and its analysis.py."""

    name: str
    variants: tuple[str, ...]
    changes: tuple[str, ...]  # the fields in which variants differ, such as "model.sinks"
    get_config: Callable[[str], Config]
    starts_from: dict[str, str]  # a variant to the one whose end, with the same seed, is its start
    configs: dict[str, str]  # a variant to its config file, if it is not config.py

    @property
    def folder(self) -> Path:
        """Where it lives."""
        return FOLDER / self.name

    def config_file(self, variant: str) -> str:
        """Return the path of a variant's config file as a command names it."""
        return f"experiments/{self.name}/{self.configs.get(variant, 'config.py')}"

    def options(self, variant: str, config: Config | None = None) -> list[str]:
        """Return the options that turn a variant's config file into its config, or into another."""
        of_file = variant if variant in self.configs else self.variants[0]
        config = self.get_config(variant) if config is None else config
        return options(config, self.get_config(of_file))

    def measure(self, run: Run) -> Measured:
        """Read what its analysis wants of a run."""
        return self._analysis().measure(run)

    def draw(self, results: Results) -> Figure:
        """Draw its figure."""
        return self._analysis().draw(results)

    def _analysis(self) -> Any:
        if str(ROOT) not in sys.path:
            sys.path.insert(0, str(ROOT))
        return importlib.import_module(f"experiments.{self.name}.analysis")


def names() -> list[str]:
    """List the experiments that exist: the folders with a config.py."""
    return sorted(path.parent.name for path in FOLDER.glob("*/config.py"))


def load(name: str) -> Experiment:
    """Read an experiment's config.py.

    Raises:
        UserError: there is none of that name, or its config.py lacks a part.
    """
    if name not in names():
        raise UserError(f"no experiment {name!r}: there are {', '.join(names())}")
    path = FOLDER / name / "config.py"
    try:
        there = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"experiments/{name}/config.py: {error}") from None
    for part in ("VARIANTS", "CHANGES", "get_config"):
        if part not in there:
            raise UserError(f"experiments/{name}/config.py defines no {part}; see its neighbours")
    return Experiment(
        name,
        there["VARIANTS"],
        there["CHANGES"],
        there["get_config"],
        there.get("STARTS_FROM", {}),
        there.get("CONFIGS", {}),
    )


def differences(config: Config, base: Config) -> dict[str, Any]:
    """Return the fields in which `config` differs from `base`, `section.field` to its value."""
    found: dict[str, Any] = {}
    # An order of its own, so that results that are there have the same options.
    first = ["model", "data", "optimizer"]
    places = {name: place for place, name in enumerate(first)}
    for field in sorted(dataclasses.fields(Config), key=lambda f: places.get(f.name, len(first))):
        new, old = getattr(config, field.name), getattr(base, field.name)
        if not dataclasses.is_dataclass(new):
            found |= {field.name: new} if new != old else {}
            continue
        for inner in dataclasses.fields(new):
            value = getattr(new, inner.name)
            if value != getattr(old, inner.name):
                found[f"{field.name}.{inner.name}"] = value
    return found


def options(config: Config, base: Config) -> list[str]:
    """Return the command line's options that turn `base` into `config`.

    They are what a variant is: one who types them after --config gets its run.
    """
    arguments: list[str] = []
    for name, value in differences(config, base).items():
        if isinstance(value, bool):
            arguments.append(f"--{name}" if value else "--" + name.replace(".", ".no-", 1))
        elif isinstance(value, tuple):
            arguments += [f"--{name}", *map(str, value)]
        else:
            arguments += [f"--{name}", str(value)]
    return arguments


def curve(run: Run, name: str) -> Curve:
    """Return a metric over the steps of a run, where it was logged as a finite number."""
    points = [(r["step"], r[name]) for r in metrics.read(run.workdir) if r.get(name) is not None]
    return [float(step) for step, _ in points], [float(value) for _, value in points]


def mean(values: Sequence[float]) -> float:
    """Return the mean; NaN if there are none."""
    return statistics.fmean(values) if values else math.nan


def spread(values: Sequence[float]) -> float:
    """Return the sample standard deviation; 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def plot_seeds(
    axis: Axes, results: Results, name: str, *, dodge: float = 0.0, **style: Any
) -> None:
    """Draw a curve of every run: a thin line a seed, a thick one the mean, a colour a variant.

    `dodge` sets variants apart by that share of x, where their points would hide each other.
    """
    for i, (variant, runs) in enumerate(results.items()):
        curves = [m.curves[name] for m in runs if name in m.curves]
        if not curves:
            continue
        factor = 1 + dodge * (i - (len(results) - 1) / 2)
        x = [factor * value for value in curves[0][0]]
        together = [y for there, y in curves if there == curves[0][0]]
        for y in together:
            axis.plot(x, y, color=f"C{i}", linewidth=0.7, alpha=0.5)
        average = [mean(values) for values in zip(*together, strict=True)]
        axis.plot(x, average, color=f"C{i}", linewidth=2.2, label=variant, **style)


def plot_numbers(axis: Axes, results: Results, name: str) -> None:
    """Draw a number of every run: a dot a seed, a bar the mean, a place a variant."""
    for i, runs in enumerate(results.values()):
        values = [m.numbers[name] for m in runs]
        axis.bar(i, mean(values), color=f"C{i}", alpha=0.4, width=0.7)
        axis.plot([i] * len(values), values, "o", color=f"C{i}", markersize=5)
    axis.set_xticks(range(len(results)), list(results))


def write_results(path: Path, record: dict[str, Any]) -> None:
    """Write results as JSON, with short floats and a list of numbers on one line."""
    text = json.dumps(_rounded(record), indent=1)
    text = re.sub(r"\[[^\[\]{}]*\]", lambda m: " ".join(m[0].split()), text)
    path.write_text(text.replace("[ ", "[").replace(" ]", "]") + "\n", encoding="utf-8")


def read_results(path: Path) -> Results:
    """Read back what `write_results` wrote of the runs."""
    variants = json.loads(path.read_text())["variants"]
    return {
        name: [
            Measured(seed["numbers"], {k: tuple(v) for k, v in seed["curves"].items()})
            for seed in variant["seeds"].values()
        ]
        for name, variant in variants.items()
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list | tuple) else value
