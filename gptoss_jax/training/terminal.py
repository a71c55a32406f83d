"""The terminal output of a run: progress while it trains, and a summary at its end."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import metrics, records, report
from gptoss_jax.training.spikes import Spike
from gptoss_jax.training.step import StepMetrics


class RunProgress:
    """Shows progress: a bar on a terminal, elsewhere about 20 plain lines in a run."""

    def __init__(self, console: Console, *, start: int, steps: int) -> None:
        self._console, self._steps = console, steps
        self._every = max(1, steps // 20)
        self._start, self._shown = start, start
        # Step and time from which the pace counts: the first record, which is after compilation.
        self._timed: tuple[int, float] | None = None
        self._alike_said = False
        # Not `console.is_terminal`: FORCE_COLOR, which Jupyter sets, makes it true of a pipe.
        self._has_bar = console.file.isatty()
        self._bar = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            console=console,
            disable=not self._has_bar,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start, text="compiling")
        self._bar.start()

    def step(self, step: int, values: dict[str, Any]) -> None:
        """Show a step's record: first what DPO and GRPO improve, then the loss."""
        parts = [
            f"{name.replace('_', ' ')} {values[name]:.3f}"
            for name in ("reward", "reward_accuracy", "reward_margin")
            if name in values
        ]
        if "groups_alike" in values:
            parts.append(f"groups alike {values['groups_alike']:.0%}")
        parts.append(f"loss {values['loss']:.4f}")
        if "tokens_per_second" in values:
            parts.append(f"{values['tokens_per_second']:,.0f} tokens/s")
        if values.get("mfu"):
            parts.append(f"MFU {values['mfu']:.1%}")
        if values.get("skipped_steps"):
            parts.append(f"skipped {values['skipped_steps']} (not finite)")
        if left := self._left(step):
            parts.append(f"left {left}")
        text = "  ".join(parts)
        self._bar.update(self._task, completed=step, text=text)
        due = step - self._shown >= self._every or step == self._steps or step == self._start + 1
        if not self._has_bar and due:
            self._shown = step
            self._line(f"step {step}/{self._steps}  {text}")
        if values.get("groups_alike") == 1 and not self._alike_said:
            self._alike_said = True
            self._line(
                f"step {step}: all answers to a question got the same reward, for every question, "
                "so this step teaches nothing. If most steps are so, ask questions that are "
                "answered well sometimes, give rewards more grades, or raise "
                "--objective.grpo.group_size"
            )

    def _left(self, step: int) -> str:
        """Return the time left at the pace since the first record; "" at that record."""
        now = time.perf_counter()
        if self._timed is None:
            self._timed = step, now
        first, then = self._timed
        return (
            duration((now - then) / (step - first) * (self._steps - step)) if step > first else ""
        )

    def say(self, step: int, scores: dict[str, Any]) -> None:
        """Print the scores of an evaluation as a line that stays on the screen."""
        loss = f"held-out loss {scores['held_out_loss']:.4f}"
        if "held_out_reward_accuracy" in scores:  # preference pairs: their loss is no likelihood
            text = f"step {step}/{self._steps}  held-out reward accuracy "
            text += f"{scores['held_out_reward_accuracy']:.3f}"
            text += f"  margin {scores['held_out_reward_margin']:.3f}  {loss}"
        else:
            text = f"step {step}/{self._steps}  {loss}"
            text += f"  perplexity {scores['held_out_perplexity']:,.2f}"
        if "exact_match" in scores:
            text += f"  exact match {scores['exact_match']:.3f}"
        self._line(text, style="bold")

    def go_back(self, step: int, text: str) -> None:
        """Print why the run goes back to an earlier step, and count from that step."""
        self._line(text, style="bold")
        self._start, self._shown, self._timed = step, step, (step, time.perf_counter())
        self._bar.update(self._task, completed=step, text="going on")

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _line(self, text: str, style: str | None = None) -> None:
        self._bar.console.print(text, style=style, soft_wrap=True)


def duration(seconds: float) -> str:
    """Format seconds as m:ss, or h:mm:ss."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def give_up(spike: Spike, workdir: Path, *, max_rewinds: int) -> None:
    """Print which step was one spike too many, and exit with 1."""
    _say_error(
        f"step {spike.step} is a spike: {spike.why}; the run went back "
        f"{max_rewinds} times already (train.max_rewinds); the newest checkpoint is of step "
        f"{records.steps(workdir)[-1]}"
    )
    sys.exit(1)


def fail(step: int, m: StepMetrics, workdir: Path) -> None:
    """Print at which step the loss or gradient was not finite, and exit with 1."""
    what = "loss" if not math.isfinite(m.loss) else "gradient"
    kept = records.steps(workdir)
    since = f"the newest checkpoint is of step {kept[-1]}" if kept else "there is no checkpoint"
    _say_error(
        f"the {what} is not finite at step {step} (loss {float(m.loss)}, gradient norm "
        f"{float(m.grad_norm)}); {since}; --train.on_nan skip leaves such steps out"
    )
    sys.exit(1)


def _say_error(text: str) -> None:
    if processes.is_first():
        print(f"error: {text}", file=sys.stderr)


def print_summary(console: Console, workdir: Path, *, seconds: float | None) -> None:
    """Write the report and the curves, and print where all files of the run are."""
    page, curves = report.write([workdir]), metrics.plot(workdir)
    kept, best = records.steps(workdir), records.best_step(workdir)
    record = records.newest_record(workdir)
    source = None if record is None else record.model_source
    own_model = "" if source is None else f" --config {source.file}"
    lines = {
        "report": page,
        "curves": curves,
        "metrics": workdir / metrics.FILE,
        "tensorboard": workdir / "tensorboard",
        "checkpoints": f"{workdir / records.FOLDER}, steps {', '.join(map(str, kept))}",
        "sample": f"python -m gptoss_jax.sample --checkpoint {workdir}{own_model} --prompt TEXT",
    }
    if (workdir / metrics.ANSWERS).is_file():
        lines["answers"] = workdir / metrics.ANSWERS
    lines["go on"] = "the same command, with a larger --train.steps once it is complete"
    if best:
        lines["best"] = f"step {best[0]}, held-out loss {best[1]:.4f}"
    if seconds is not None:
        lines["time"] = duration(seconds)
    console.print()
    for name, text in lines.items():
        console.print(f"{name:<12}{text}", soft_wrap=True)  # never break a path
