"""Supervised fine-tuning (SFT): the likelihood of the tokens that `data.train_on` names.

The data are chats, plain texts (continued pre-training), or a mixture of both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from gptoss_jax import data
from gptoss_jax.config import Config
from gptoss_jax.objectives.objective import Objective, spread_batch
from gptoss_jax.objectives.token_loss import loss_fn, trained_weight
from gptoss_jax.types import Batch


def objective(config: Config) -> Objective:
    """Return the objective of a config whose `objective.name` is sft."""
    sources = len(config.data.train) if config.data.weights else 0
    return Objective(
        open_batches=partial(data.train_batches, config),
        first_batches=partial(first_batches, config),
        make_prepare=lambda model: spread_batch,
        loss=partial(loss_fn, **router_losses(config), num_sources=sources),
        total=trained_weight,
        held_out_loss=loss_fn,
    )


def router_losses(config: Config) -> dict[str, Any]:
    """Return the coefficients of the routers' losses, which every objective's loss takes."""
    return {"balance_loss": config.train.balance_loss, "z_loss": config.train.z_loss}


def first_batches(config: Config, count: int) -> list[Batch]:
    """Return the training data's first batches, with all rows. Raises UserError for bad data."""
    batches = data.train_batches(config)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()
