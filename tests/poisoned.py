"""Training on data of which some batches are poisoned, and that kills itself: for test_faults.

As a program: python tests/poisoned.py '{"garbage": [5], "nan": [], "without": [], "kill": 7}' ARGS,
where `kill` counts the batches taken, those taken again included.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

import numpy as np

from gptoss_jax import data, train

_real = data.train_batches


class Poisoned:
    """Batches of which some, counted from 1, are bad or missing."""

    def __init__(self, inner: Any, plan: dict[str, Any]) -> None:
        self._inner, self._plan, self._at, self._taken = inner, plan, 0, 0
        self.source_names = inner.source_names
        self.close = inner.close

    def __next__(self) -> Any:
        self._taken += 1
        if self._taken == self._plan.get("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        while True:
            batch, self._at = next(self._inner), self._at + 1
            if self._at not in self._plan.get("without", ()):
                break
        if self._at in self._plan.get("nan", ()):
            batch = batch.replace(weights=batch.weights * np.float32(np.nan))
        if self._at in self._plan.get("garbage", ()):
            wrong = np.random.default_rng(self._at).integers(0, 300, batch.targets.shape)
            batch = batch.replace(targets=wrong.astype(batch.targets.dtype))
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"inner": self._inner.get_state(), "at": self._at}

    def set_state(self, state: dict[str, Any], **how: Any) -> None:
        self._inner.set_state(state["inner"], **how)
        self._at = state["at"]


def main(plan: dict[str, Any], args: list[str]) -> None:
    """Train on poisoned data."""
    data.train_batches = lambda *args, **more: Poisoned(_real(*args, **more), plan)
    try:
        train.main(args)
    finally:
        data.train_batches = _real


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), sys.argv[2:])
