"""The loss-spike policy: which steps are spikes, and which batches are left out because of them.

With `train.on_spike="rewind"` a run goes back from a spike to its last checkpoint and on from there
without the batch that showed it. What is remembered for that goes into each checkpoint, so that a
run that was interrupted sees the same spikes and leaves out the same batches.
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

LEAST = 10  # losses that a median is taken of; fewer where spike_window is less


@dataclass(frozen=True)
class Spike:
    """A step whose loss is no number or far too high."""

    step: int
    batch: int  # of the data's batches, counted from 1
    why: str


class SpikeGuard:
    """Counts batches, leaves out those that showed a spike, and finds spikes.

    `rewinds` is how often the run went back, `skipped` the batches left out.
    """

    def __init__(self, config: TrainConfig, state: dict[str, Any], *, step: int) -> None:
        """Go on from the `state` of a checkpoint of `step`; {} is that of a run without any."""
        self._config = config
        self.is_on = config.on_spike == "rewind"
        self.rewinds: int = state.get("rewinds", 0)
        self.skipped: list[int] = list(state.get("skipped", []))
        self._go_on(state, step)

    def _go_on(self, state: dict[str, Any], step: int) -> None:
        # Without the policy a run takes as many batches as it makes steps.
        self._taken: int = state.get("taken", step)
        self._recent: list[float] = list(state.get("recent", []))
        self._unread: list[int] = []  # batches of the steps that `find` has not seen

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: JSON-able, of the steps that `find` has seen."""
        return {
            "taken": self._taken,
            "recent": self._recent,
            "rewinds": self.rewinds,
            "skipped": self.skipped,
        }

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Take the next batch that is not to be left out."""
        while True:
            batch = next(batches)
            self._taken += 1
            if self._taken not in self.skipped:
                self._unread.append(self._taken)
                return batch

    def find(self, done: Sequence[StepMetrics], *, step: int) -> Spike | None:
        """Look at the steps since the last call, of which `step` is the last; return a first spike.

        A spike is a loss or gradient norm that is not finite, or a loss above `spike_factor` times
        the median of the `spike_window` losses before it, once there are 10 (or `spike_window`).
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
        """Whether `train.max_rewinds` allows one more."""
        return self.rewinds < self._config.max_rewinds

    def rewind(self, spike: Spike, state: dict[str, Any], *, step: int) -> None:
        """Go on from the `state` of the checkpoint of `step`, from now on without a batch.

        The count of rewinds and the batches left out stay: that checkpoint may be older than they.
        """
        self.rewinds += 1
        self.skipped = sorted({*self.skipped, spike.batch})
        self._go_on(state, step)
