"""Make a record of the log from the metrics of steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gptoss_jax import chips
from gptoss_jax.config import Config
from gptoss_jax.model.flops import step_flops
from gptoss_jax.training import expert_load
from gptoss_jax.training.step import StepMetrics


class StepRecorder:
    """Turns the metrics of the steps since the last record into one record.

    Rates, shares and the objective's numbers are over all these steps; other values are those of
    the last step. For each source of a mixture it counts the tokens since the run began.
    """

    def __init__(
        self,
        config: Config,
        sources: Sequence[str],
        *,
        log: list[dict[str, Any]],
        devices: int = 1,
    ) -> None:
        """Continue the counts of `log`, the records so far. `devices` is the number of devices."""
        self._config, self._sources = config, tuple(sources)
        self._peak = chips.peak_flops(config.train.peak_tflops, devices=devices)
        self._totals = {}
        for name in self._sources:
            for what in ("tokens", "trained"):
                key = f"source/{name}/{what}"
                self._totals[key] = max((r[key] for r in log if key in r), default=0.0)

    def record(
        self,
        done: list[StepMetrics],
        reported: Sequence[dict[str, float]] = (),
        *,
        seconds: float | None,
    ) -> dict[str, Any]:
        """Return the record of the steps `done`.

        `seconds` is the time that the steps took, or None if it has no meaning (compilation).
        `reported` has the objective's numbers about each batch. These, and what the objective
        measured in the steps, are averaged over the steps.
        """
        m = done[-1]
        tokens = np.array([float(x.tokens) for x in done])
        shares = tokens / max(tokens.sum(), 1)
        load = np.einsum("s,sLE->LE", shares, [x.router.load.astype(np.float64) for x in done])
        values: dict[str, Any] = {
            "loss": float(m.loss),
            "grad_norm": float(m.grad_norm),
            "learning_rate": float(m.learning_rate),
            "trained_tokens": float(m.trained),
            "tokens": float(m.tokens),
            "balance_loss": float(np.mean(m.router.balance_loss)),
            "z_loss": float(np.mean(m.router.z_loss)),
            **expert_load.load_stats(load),
            "expert_load": np.round(load, 5).tolist(),
        }
        if self._config.model.capacity_factor:
            dropped = [float(np.mean(x.router.dropped)) for x in done]
            values["dropped"] = float(shares @ dropped)
        skipped = sum(not bool(x.finite) for x in done)
        if skipped:
            values["skipped_steps"] = skipped
        for each in ([x.extra for x in done], reported):
            names = {name: None for values_of in each for name in values_of}
            values |= {
                name: _overall(name, [float(v[name]) for v in each if name in v]) for name in names
            }
        values |= self._by_source(done)
        if seconds is not None:
            values |= self._rates(done, seconds)
        return values

    def _by_source(self, done: list[StepMetrics]) -> dict[str, float]:
        values: dict[str, float] = {}
        sums = [x.by_source for x in done if x.by_source is not None]
        for i, name in enumerate(self._sources):
            nll, weight, tokens = (
                sum(float(getattr(s, what)[i]) for s in sums)
                for what in ("nll", "weight", "tokens")
            )
            if weight:
                values[f"source/{name}/loss"] = nll / weight
            for what, more in (("tokens", tokens), ("trained", weight)):
                key = f"source/{name}/{what}"
                self._totals[key] += more
                values[key] = self._totals[key]
        return values

    def _rates(self, done: list[StepMetrics], seconds: float) -> dict[str, Any]:
        flops = sum(
            step_flops(
                self._config.model,
                tokens=float(x.tokens),
                trained=float(x.trained),
                sequence_length=self._config.data.sequence_length,
            )
            for x in done
        )
        return {
            "tokens_per_second": sum(float(x.tokens) for x in done) / seconds,
            "flops_per_second": flops / seconds,
            "mfu": flops / seconds / self._peak if self._peak else None,
            "step_seconds": seconds / len(done),
        }


def _overall(name: str, values: list[float]) -> float:
    """Return the mean of the values that are not NaN, or their maximum if the name ends in _max.

    Without any such value return NaN.
    """
    known = [x for x in values if not np.isnan(x)]
    if not known:
        return float("nan")
    return max(known) if name.endswith("_max") else float(np.mean(known))
