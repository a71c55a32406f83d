"""What an objective is: the functions that training calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from gptoss_jax.objectives.token_loss import LossSums
from gptoss_jax.types import Batch, Params, TrainState

Loss = Callable[[Any, Params, Batch], LossSums]  # takes (model, parameters, batch)
Spread = Callable[[Batch], Batch]  # makes global arrays from the rows of this process


# Options of XLA for programs that compare two models. By default XLA leaves out a rounding to
# bfloat16 wherever it merges two operations, which depends on what surrounds them: two passes that
# compute the same then differ, and routers send near ties to other experts. With this option every
# value is rounded where the program says.
ROUND_AS_WRITTEN = {"xla_allow_excess_precision": False}


class Prepare(Protocol):
    """A function that prepares a batch of the data for a step.

    It runs on the host, in the same way in all processes, with the train state before the step,
    which it does not change. It returns the step's batch, as global arrays, and numbers to log.
    """

    def __call__(
        self, state: TrainState, batch: Any, spread: Spread
    ) -> tuple[Batch, dict[str, float]]:
        """Prepare one batch."""
        ...


class Objective(NamedTuple):
    """What a run optimises; each objective is a file that has `objective(config) -> Objective`."""

    open_batches: Callable[..., Any]  # (rows=) opens the training data, like `data.train_batches`
    # Returns the first n batches, with all rows; questions come without answers.
    first_batches: Callable[[int], list[Batch]]
    make_prepare: Callable[[Any], Prepare]  # takes the model
    loss: Loss
    total: Callable[[Batch], Float[Array, ""]]  # what `LossSums.weight` of a whole batch will be
    held_out_loss: Loss  # the same function for equal configs, so that it is compiled once
    has_perplexity: bool = True  # whether the held-out loss is the mean nll of a token
    # Whether the model without its adapters is the reference that the model is compared with.
    compares_with_base: bool = False
    # Whether it compares two models, so that its losses are compiled with ROUND_AS_WRITTEN.
    compares_models: bool = False
    # Turns the shapes of a batch of tokens into those of a prepared batch, for planning.
    complete: Callable[[Batch], Batch] = lambda batch: batch

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """XLA's options for the programs of the loss and of the held-out loss."""
        return ROUND_AS_WRITTEN if self.compares_models else None


def spread_batch(state: TrainState, batch: Batch, spread: Spread) -> tuple[Batch, dict[str, float]]:
    """Prepare a batch that only needs to be sharded over the mesh: a `Prepare`."""
    del state
    return spread(batch), {}
