"""The metrics of a run: JSON lines, TensorBoard files, W&B, and a picture of the curves."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs.headlines import losses_of
from gptoss_jax.runs.tensorboard import Board
from gptoss_jax.runs.tracking import Tracker

FILE = "metrics.jsonl"
SAMPLES = "samples.jsonl"
ANSWERS = "answers.jsonl"  # answers that GRPO sampled: see `objectives/reinforcement/rollouts.py`
CURVES = "curves.png"


# The groups of TensorBoard and W&B; what is in none of them is in "train".
_GROUPS = {
    "router": {
        "load_entropy", "load_entropy_min", "dead_experts", "load_max", "dropped", "balance_loss",
        "z_loss",
    },
    "speed": {"tokens_per_second", "flops_per_second", "mfu", "step_seconds"},
    "eval": {"exact_match"},
}  # fmt: skip


class MetricsLog:
    """Appends records to `metrics.jsonl`, `samples.jsonl` and TensorBoard's files in a workdir.

    With `project` it sends them to Weights & Biases, too.
    """

    def __init__(
        self,
        workdir: str | Path,
        *,
        step: int | None = None,
        project: str | None = None,
        config: dict[str, Any] | None = None,
    ) -> None:
        """Open the log of a run that continues after `step`, and remove later records from it.

        Without a step the log starts empty. `config` is what W&B shows as the run's config.

        Raises:
            UserError: W&B refuses, or can't be reached.
        """
        folder = Path(workdir)
        _keep_until(folder / FILE, step)
        if (folder / SAMPLES).is_file():
            _keep_until(folder / SAMPLES, step)
        self._file = (folder / FILE).open("ab", buffering=0)  # a killed run loses no record
        self._samples = folder / SAMPLES
        purge_step = 0 if step is None else step + 1
        self._board = Board(folder / "tensorboard", purge_step=purge_step)
        self._tracker: Tracker | None = None
        if project is not None:
            self._tracker = Tracker(
                project, workdir=folder, config=config or {}, fresh=step is None
            )

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Append one record, without values that are None or not finite (JSON has no NaN).

        Numbers go to TensorBoard and W&B too, by the names of `tagged`.
        """
        values = {k: v for k, v in values.items() if v is not None}
        values = {k: v for k, v in values.items() if isinstance(v, list) or math.isfinite(v)}
        line = (json.dumps({"step": step, **values}) + "\n").encode()
        while line:  # a disk that is almost full may take only a part
            line = line[self._file.write(line) :]
        numbers = tagged(values)
        for tag, value in numbers.items():
            self._board.add(tag, value, step=step)
        if self._tracker is not None:
            self._tracker.write(step, numbers)

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Append the model's answers, if there are any, to `samples.jsonl`, one record each.

        A record is {"step", "question", "expected", "answer", "right"}: see `held_out.evaluate`.
        """
        if samples:
            with self._samples.open("a") as file:
                file.writelines(json.dumps({"step": step, **s}) + "\n" for s in samples)

    def close(self) -> None:
        """Flush and close all files."""
        self._file.close()
        self._board.close()
        if self._tracker is not None:
            self._tracker.close()


class NoLog:
    """The log of every process but the first: it writes nothing."""

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Do nothing."""

    def write_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def open_log(
    workdir: str | Path, project: str | None, config: dict[str, Any], *, step: int | None
) -> MetricsLog | NoLog:
    """Open the log of a run on the first process; every other gets one that writes nothing.

    `project` is the run's `train.wandb`. The other arguments and errors are those of `MetricsLog`.
    """
    if not processes.is_first():
        return NoLog()
    return MetricsLog(workdir, step=step, project=project, config=config)


def tagged(values: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a record under grouped names: train/loss, eval/loss, router/z_loss.

    Sources of a mixture stay as they are, source/NAME/loss. A list [L][E], such as the load of the
    experts, gives the largest entry of each layer.
    """
    numbers: dict[str, float] = {}
    for name, value in values.items():
        if isinstance(value, list):
            largest = {f"router/{name}_max/layer_{i}": max(row) for i, row in enumerate(value)}
            numbers |= largest
        elif name.startswith("source/"):
            numbers[name] = value
        elif name.startswith("held_out_"):
            numbers[f"eval/{name.removeprefix('held_out_')}"] = value
        else:
            group = next((g for g, names in _GROUPS.items() if name in names), "train")
            numbers[f"{group}/{name}"] = value
    return numbers


def read(workdir: str | Path, file: str = FILE) -> list[dict[str, Any]]:
    """Read the records of a run, or its samples, up to the first line that is cut short."""
    path = Path(workdir) / file
    records: list[dict[str, Any]] = []
    if path.is_file():
        for line in path.read_text(errors="replace").splitlines():
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return records


def _keep_until(path: Path, step: int | None) -> None:
    """Rewrite a file of records with those up to `step`; without a step, with none."""
    records = [] if step is None else read(path.parent, path.name)
    kept = [r for r in records if r["step"] <= step]
    new = path.with_suffix(".tmp")
    new.write_text("".join(json.dumps(r) + "\n" for r in kept))
    os.replace(new, path)


def plot(workdir: str | Path) -> Path:
    """Draw a run's curves from its records into `curves.png`, and return that path."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    records = read(workdir)
    figure = Figure(figsize=(15, 7))
    # Fixed margins, because layout="constrained" takes as long as drawing all the rest.
    figure.subplots_adjust(0.06, 0.07, 0.98, 0.955, wspace=0.38, hspace=0.3)
    losses, answers, load, rates, routing, speed = figure.subplots(2, 3).flat

    def line(axis: Any, name: str, *, label: str | None = None, **style: Any) -> None:
        points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
        points = [(step, value) for step, value in points if math.isfinite(value)]
        if points:
            axis.plot(*zip(*points, strict=True), label=label or name.replace("_", " "), **style)

    what = losses_of(records)
    line(losses, "loss", color="tab:blue", alpha=0.6, linewidth=1)
    if what.training == what.held_out:
        losses.set(ylim=(0, None))
        line(losses, "held_out_loss", color="tab:orange", marker="o", markersize=4)
    losses.set(title=f"loss, {what.training}", xlabel="step")
    _plot_answers({name for record in records for name in record}, answers, line)
    line(rates, "learning_rate", color="tab:red")
    rates.set(title="learning rate and gradient norm", xlabel="step", ylabel="learning rate")
    norms = rates.twinx()
    line(norms, "grad_norm", color="tab:gray", alpha=0.5, linewidth=1)
    norms.set(ylabel="gradient norm", yscale="log")
    line(routing, "load_entropy", label="load entropy", color="tab:purple")
    line(routing, "load_entropy_min", label="of the worst layer", color="tab:purple", alpha=0.45)
    routing.set(title="routing", xlabel="step", ylabel="load entropy (1: even)", ylim=(0, 1.02))
    dead = routing.twinx()
    line(dead, "dead_experts", color="tab:gray", alpha=0.6, linewidth=1, drawstyle="steps-mid")
    dead.set(ylabel="dead experts, all layers", ylim=(0, max(4.0, dead.get_ylim()[1])))
    dead.yaxis.set_major_locator(MaxNLocator(integer=True))
    line(speed, "tokens_per_second", color="tab:cyan", linewidth=1)
    speed.set(title="tokens a second", xlabel="step", ylim=(0, None))
    loads = [r["expert_load"] for r in records if "expert_load" in r]
    if loads:
        image = load.imshow(loads[-1], aspect="auto", vmin=0, cmap="viridis")
        for axis in (load.xaxis, load.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=load)
    load.set(title="share of tokens, last step", xlabel="expert", ylabel="layer")
    for axis, other in ((losses, None), (rates, norms), (routing, dead)):
        lines = [*axis.lines, *(other.lines if other else ())]
        if lines:
            (other or axis).legend(handles=lines, loc="best")  # on top of both
    path = Path(workdir) / CURVES
    figure.savefig(path, dpi=110)
    return path


def _plot_answers(names: set[str], axis: Any, line: Callable[..., None]) -> None:
    """Draw how good the answers are, by `line(axis, name, **style)`: `names` are the numbers."""
    if "reward_accuracy" in names:
        line(axis, "reward_accuracy", color="tab:green", alpha=0.6, linewidth=1)
        line(axis, "held_out_reward_accuracy", color="tab:green", marker="o", markersize=4)
        axis.set(title="pairs whose chosen answer has the larger reward", ylim=(-0.02, 1.02))
    elif "reward" in names:
        line(axis, "reward", color="tab:green")
        axis.set(title="reward, mean over a step's answers")
    else:
        line(axis, "exact_match", color="tab:green", marker="o", markersize=4)
        axis.set(title="held-out questions answered exactly", ylim=(-0.02, 1.02))
    axis.set(xlabel="step")
