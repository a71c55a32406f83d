"""The loss-spike policy: decide which steps are spikes, and which batches to leave out.

With `train.on_spike="rewind"` a run that meets a spike goes back to its last checkpoint, and
continues from there without the batch that caused the spike. Each checkpoint holds the state of the
policy, so that a resumed run sees the same spikes and leaves out the same batches.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gptoss_jax.config import TrainConfig
from gptoss_jax.training.step import StepMetrics
from gptoss_jax.types import Batch

LEAST = 10  # fewest losses that a median is taken of; spike_window if that is less


@dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm is not finite, or whose loss is far too high."""

    step: int
    batch: int  # index among the batches of the data, from 1
    why: str


class SpikeGuard:
    """Finds spikes, counts batches, and leaves out the batches that caused a spike.

    `rewinds` counts how often the run went back; `skipped` lists the batches that are left out.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any], *, step: int) -> None:
        """Continue from `state`, which the checkpoint of `step` holds; {} if there is none."""
        self._config = config
        self.is_on = config.on_spike == "rewind"
        self.rewinds: int = state.get("rewinds", 0)
        self.skipped: list[int] = list(state.get("skipped", []))
        self._restore(state, step)

    def _restore(self, state: dict[str, Any], step: int) -> None:
        # A run without the policy takes one batch per step.
        self._taken: int = state.get("taken", step)
        self._recent: list[float] = list(state.get("recent", []))
        self._unread: list[int] = []  # batches of steps that `find` has not seen yet

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, JSON-able, after the steps that `find` has seen."""
        return {
            "taken": self._taken,
            "recent": self._recent,
            "rewinds": self.rewinds,
            "skipped": self.skipped,
        }

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Return the next batch that is not left out."""
        while True:
            batch = next(batches)
            self._taken += 1
            if self._taken not in self.skipped:
                self._unread.append(self._taken)
                return batch

    def find(self, done: Sequence[StepMetrics], *, step: int) -> Spike | None:
        """Return the first spike among the steps `done` since the last call, or None.

        `step` is the last of them. A spike is a loss or gradient norm that is not finite, or a loss
        above `spike_factor` times the median of the `spike_window` losses before it, once there are
        10 such losses (or `spike_window`, if that is less).
        """
        taken, self._unread = self._unread, []
        if not self.is_on:
            return None
        first = step - len(done) + 1
        for i, (m, batch) in enumerate(zip(done, taken, strict=True)):
            why = self._why(float(m.loss), float(m.grad_norm))
            if why is not None:
                return Spike(first + i, batch, why)
            self._recent = [*self._recent, float(m.loss)][-self._config.spike_window :]
        return None

    def _why(self, loss: float, grad_norm: float) -> str | None:
        if not math.isfinite(loss):
            return f"its loss is {loss}"
        if not math.isfinite(grad_norm):
            return f"its gradient norm is {grad_norm}"
        if len(self._recent) < min(LEAST, self._config.spike_window):
            return None
        median = statistics.median(self._recent)
        if loss > self._config.spike_factor * median:
            return (
                f"its loss {loss:.4f} is over {self._config.spike_factor:g} times {median:.4f}, "
                f"the median of the {len(self._recent)} before it"
            )
        return None

    @property
    def may_rewind(self) -> bool:
        """Whether `train.max_rewinds` allows one more rewind."""
        return self.rewinds < self._config.max_rewinds

    def rewind(self, spike: Spike, state: dict[str, Any], *, step: int) -> None:
        """Continue from `state`, which the checkpoint of `step` holds, without the spike's batch.

        `rewinds` and `skipped` are kept, not restored: the checkpoint may be older than they are.
        """
        self.rewinds += 1
        self.skipped = sorted({*self.skipped, spike.batch})
        self._restore(state, step)
