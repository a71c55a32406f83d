"""config.objective -> what a run optimises: its loss, its data, and what is made before each step.

Each objective is a file beside `loss.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Float

from gptoss_jax import data
from gptoss_jax.config import Config, ModelConfig
from gptoss_jax.config.objective import ObjectiveConfig
from gptoss_jax.errors import UserError
from gptoss_jax.objectives import distill, dpo
from gptoss_jax.objectives.distill import distill_loss
from gptoss_jax.objectives.dpo import dpo_loss
from gptoss_jax.objectives.grpo import grpo_loss
from gptoss_jax.objectives.reinforcement import rollouts
from gptoss_jax.objectives.reinforcement.rollouts import Rollouts
from gptoss_jax.objectives.token_loss import LossSums, loss_fn, trained_weight
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
    if config.objective.name == "dpo":
        dpo.check(config)
        loss = partial(dpo_loss, dpo=config.objective.dpo, **penalties)
        return Objective(loss, dpo.total_pairs, _as_it_is, lambda batch: batch)
    if config.objective.name == "distill":
        loss = partial(distill_loss, distill=config.objective.distill, **penalties)
        teacher = distill.Teacher(config)
        return Objective(loss, trained_weight, teacher, teacher.complete)
    if config.objective.name == "grpo":
        rollouts.check(config)
        loss = partial(grpo_loss, grpo=config.objective.grpo, **penalties)
        return Objective(loss, trained_weight, Rollouts(config, model), rollouts.complete)
    sft = partial(loss_fn, **penalties, num_sources=num_sources)
    return Objective(sft, trained_weight, _as_it_is, lambda batch: batch)


def open_batches(config: Config, *, rows: tuple[int, int]) -> Any:
    """Open the training data as the objective takes them: as `data.train_batches` does.

    Raises:
        UserError: bad data, or data of another kind.
    """
    if config.objective.name == "dpo":
        dpo.check(config)
    if config.objective.name == "distill":
        distill.check(config)
    if config.objective.name == "grpo":
        return rollouts.open_questions(config)
    return data.train_batches(config, rows=rows)


def first_batches(config: Config, count: int) -> list[Batch]:
    """Return the first batches of the training data, whole: of questions, without answers.

    Raises:
        UserError: as `open_batches`.
    """
    if config.objective.name == "grpo":
        return rollouts.unanswered(config, count)
    batches = data.train_batches(config)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def check_start(config: Config, stored: ModelConfig) -> None:
    """Refuse to begin with the adapters of another run where the reference leaves these out, too.

    The run would be held to what was there before that other run, and seem to be as it should.

    Args:
        config: Of a run that begins.
        stored: The model that --init holds.

    Raises:
        UserError: it has adapters, and `objective.reference` does not say that this is meant.
    """
    name, kl = config.objective.name, config.objective.grpo.kl
    compares = name == "dpo" or (name == "grpo" and kl > 0)
    if compares and stored.lora.targets and config.objective.reference == "start":
        raise UserError(
            f"--init {config.init} has adapters, and the reference of objective.name {name} is the "
            "model without any, so not what this run starts from: merge them (python -m "
            f"gptoss_jax.convert {config.init} OUT --to hf) and give --init OUT, or take the model "
            "below them as the reference with --objective.reference base"
        )


def held_out_loss(objective: ObjectiveConfig) -> Callable[[Any, Params, Batch], LossSums]:
    """Return what held-out data is judged by: of pairs the loss of the pairs, else the nll."""
    return partial(dpo_loss, dpo=objective.dpo) if objective.name == "dpo" else loss_fn


def _as_it_is(state: TrainState, batch: Batch, spread: Spread) -> tuple[Batch, dict[str, float]]:
    del state
    return spread(batch), {}
