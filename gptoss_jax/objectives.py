"""config.objective -> what a run optimises: its loss, its data, and what is made before each step.

Each objective is a file beside `loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from gptoss_jax import data
from gptoss_jax.config import Config
from gptoss_jax.loss import LossSums, loss_fn
from gptoss_jax.train_step import trained_weight
from gptoss_jax.types import Batch, Params, TrainState

Spread = Callable[[Batch], Batch]  # from the rows that this process has to global arrays


class Prepare(Protocol):
    """What becomes of a batch of the data before a step.

    Runs on the host, on all processes alike, with the state that the step begins with (which it
    leaves as it is). Returns the step's batch, as global arrays, and numbers for the log.
    """

    def __call__(
        self, state: TrainState, batch: Any, spread: Spread
    ) -> tuple[Batch, dict[str, float]]:
        """Prepare one batch."""
        ...


class Objective(NamedTuple):
    """What a run optimises."""

    loss: Callable[[Any, Params, Batch], LossSums]  # of (model, parameters, batch)
    total: Callable[[Batch], Float[Array, ""]]  # what `LossSums.weight` of a whole batch will be
    prepare: Prepare
    # From the shapes of a batch of tokens to those of what `prepare` returns: for planning.
    complete: Callable[[Batch], Batch]


def make_objective(config: Config, model: Any, *, num_sources: int = 0) -> Objective:
    """Make the objective of a config, for the model that it trains.

    Raises:
        UserError: what the objective needs is not there.
    """
    penalties = {"balance_loss": config.train.balance_loss, "z_loss": config.train.z_loss}
    sft = partial(loss_fn, **penalties, num_sources=num_sources)
    return Objective(sft, trained_weight, _as_it_is, lambda batch: batch)


def open_batches(config: Config, *, rows: tuple[int, int]) -> Any:
    """Open the training data as the objective takes them: as `data.train_batches` does.

    Raises:
        UserError: bad data, or data of another kind.
    """
    return data.train_batches(config, rows=rows)


def _as_it_is(state: TrainState, batch: Batch, spread: Spread) -> tuple[Batch, dict[str, float]]:
    del state
    return spread(batch), {}
