"""What an objective is: the functions that training asks it for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from gptoss_jax.objectives.token_loss import LossSums
from gptoss_jax.types import Batch, Params, TrainState

Loss = Callable[[Any, Params, Batch], LossSums]  # of (model, parameters, batch)
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
    """What a run optimises; each objective is a file that has `objective(config) -> Objective`."""

    open_batches: Callable[..., Any]  # (rows=) the training data, as `data.train_batches` gives it
    first_batches: Callable[[int], list[Batch]]  # that many, whole; of questions without answers
    make_prepare: Callable[[Any], Prepare]  # of the model
    loss: Loss
    total: Callable[[Batch], Float[Array, ""]]  # what `LossSums.weight` of a whole batch will be
    held_out_loss: Loss  # the same function for equal configs, so that it is compiled once
    has_perplexity: bool = True  # whether the held-out loss is the mean nll of a token
    # Whether the model without its adapters is the reference that the model is compared with.
    compares_with_base: bool = False
    # From the shapes of a batch of tokens to those of a prepared batch: for planning.
    complete: Callable[[Batch], Batch] = lambda batch: batch


def spread_batch(state: TrainState, batch: Batch, spread: Spread) -> tuple[Batch, dict[str, float]]:
    """Prepare a batch that needs nothing but to be spread over the mesh: a `Prepare`."""
    del state
    return spread(batch), {}
