"""What a config trains by, as one value: the pieces that `train.py` puts together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import optax

from gptoss_jax.config import Config
from gptoss_jax.lora import select
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.objectives import Objective, make_objective
from gptoss_jax.parallel import sharding
from gptoss_jax.training import setup
from gptoss_jax.types import Params, TrainState


class Program(NamedTuple):
    """Nothing is computed before its functions are called."""

    model: Transformer
    factors: Params
    optimizer: optax.GradientTransformation
    objective: Objective
    prepare: Any
    begin: Callable[[Params | None], TrainState]  # from parameters, or None: random ones
    step: Any
    abstract_state: Callable[[], TrainState]


def make_program(
    config: Config, *, load: Any = None, make_model: MakeModel = Transformer
) -> Program:
    """Make what a config trains by; `load` is what [top4] of the patterns goes by."""
    model, objective = make_model(sharding.padded(config.model)), make_objective(config)
    factors = select.masks(model.abstract_params(), model.config, config.optimizer, load=load)
    optimizer = setup.optimizer_of(config, factors)
    given: Any = (config, model, optimizer)
    return Program(
        model,
        factors,
        optimizer,
        objective,
        objective.make_prepare(model),
        partial(setup.first_state, *given, factors=factors),
        setup.make_step(*given, objective, factors=factors),
        partial(setup.abstract_state, *given, factors=factors),
    )
