"""From a config to what trains it: the model, the optimizer, the first state, the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jaxtyping import Float

from gptoss_jax.config import Config
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters, select
from gptoss_jax.model import Transformer, host_embedding
from gptoss_jax.model.initial import init_params
from gptoss_jax.objectives import Objective, first_batches, make_objective
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters import patterns
from gptoss_jax.runs.workdir import write_text
from gptoss_jax.training import expert_load as load_of_experts
from gptoss_jax.training.layerwise_step import make_fused_step
from gptoss_jax.training.step import StepMetrics, init_state, make_train_step
from gptoss_jax.types import Batch, Params, TrainState

LOAD_FILE = "expert_load.json"


class Program(NamedTuple):
    """What a config trains by; nothing is computed before its functions are called."""

    model: Transformer
    factors: Params  # on the learning rate of each parameter, see `patterns.masks`
    optimizer: optax.GradientTransformation
    objective: Objective
    begin: Callable[[Params | None], TrainState]  # from parameters, or None: random ones
    step: Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]

    def abstract_state(self) -> TrainState:
        """Return the shapes of the first state, spread over the mesh that is set, if there is one.

        Raises:
            UserError: a parameter that the mesh does not divide.
        """
        state = jax.eval_shape(self.begin, None)
        mesh = jax.sharding.get_mesh()
        if mesh.empty:
            return state
        state = sharding.place(state, mesh)
        return host_embedding.place(state) if self.model.config.embedding_on_host else state

    def describe_trained(self) -> list[str]:
        """Return lines that say which parameters are trained, if not all are, and alike."""
        factors = jax.tree.leaves(self.factors)
        if all(np.all(factor == 1) for factor in factors):
            return []
        return ["trained", *patterns.describe(self.model.abstract_params(), self.factors)]


def make_program(
    config: Config, *, load: Float[np.ndarray, "L E"] | None = None, num_sources: int = 0
) -> Program:
    """Make the program of a config.

    `load` is what the patterns' [top4] go by (`expert_load`); `num_sources` that of a mixture.

    Raises:
        UserError: patterns of the optimizer's fields that say nothing about this model.
    """
    model = Transformer(sharding.padded(config.model))
    shapes = model.abstract_params()
    factors = select.masks(shapes, model.config, config.optimizer, load=load)
    frozen, averages = patterns.frozen_paths(factors), config.optimizer.ema > 0
    optimizer = make_optimizer(
        config.optimizer,
        config.train.steps,
        masks=factors,
        balance_bias=config.train.balance_bias,
        seed=config.train.seed,
    )
    objective = make_objective(config, model, num_sources=num_sources)
    complete = objective.complete
    common: dict[str, Any] = {"total": objective.total, "frozen_paths": frozen}
    if config.optimizer.fused:
        step = make_fused_step(model, optimizer, objective.loss, factors=factors, **common)
    else:
        step = make_train_step(
            model,
            optimizer,
            objective.loss,
            accumulate=config.optimizer.accumulate,
            on_nan=config.train.on_nan,
            ema=config.optimizer.ema,
            **common,
        )

    def begin(params: Params | None) -> TrainState:
        seed = config.train.seed
        if params is not None:
            params = adapters.add(model.config, params, seed=seed)
        return init_state(
            model, optimizer, params, seed=seed, frozen_paths=frozen, average=averages
        )

    if model.config.embedding_on_host:
        host_embedding.check(model.config, factors)
        step = host_embedding.Step(step)
        objective = objective._replace(
            prepare=host_embedding.looking_up(objective.prepare),
            complete=lambda batch: host_embedding.complete(model.config, complete(batch)),
        )
    return Program(model, factors, optimizer, objective, begin, step)


def check_patterns(config: Config) -> None:
    """Refuse patterns that say nothing about the model, before anything is read or measured."""
    shapes = Transformer(config.model).abstract_params()
    even = np.ones((config.model.num_layers, config.model.num_experts))
    select.masks(shapes, config.model, config.optimizer, load=even)


def expert_load(
    config: Config, params: Params | None, workdir: Path, *, resuming: bool
) -> Float[np.ndarray, "L E"] | None:
    """Return the load that patterns choose experts by; None if none does.

    Measured over the first `train.load_batches` batches of the data with the parameters that
    training begins with (None: random ones), but for `init_adapters`, and kept in the workdir by
    `keep_load`: a run that goes on has the same experts.

    Raises:
        UserError: the run goes on, and the file is not there or damaged.
    """
    if not select.needs_load(config.model, config.optimizer):
        return None
    shape = (config.model.num_layers, config.model.num_experts)
    if resuming:
        path = workdir / LOAD_FILE
        try:
            load = np.array(json.loads(path.read_text()), np.float64)
            if load.shape != shape:
                raise ValueError(f"its shape is {load.shape}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path}, by which the run's patterns chose experts, can't be read: {error}"
            ) from None
        return load
    model = Transformer(sharding.padded(config.model))
    if params is None:
        params = init_params(model, seed=config.train.seed)
    first = first_batches(config, config.train.load_batches)
    return load_of_experts.measure_load(model, params, first)


def keep_load(load: Float[np.ndarray, "L E"] | None, workdir: Path) -> None:
    """Write the load into the workdir, where `expert_load` finds it."""
    if load is not None:
        write_text(workdir / LOAD_FILE, json.dumps(load.tolist()) + "\n")
