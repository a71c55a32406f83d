"""Make the parts of a training run from its config: optimizer, step, first state, expert load.

`train.py` calls these functions in order. Planning calls them too, for other hardware.
"""

from __future__ import annotations

import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import optax
from jaxtyping import Float

from gptoss_jax import data
from gptoss_jax.config import Config, dates
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters, select
from gptoss_jax.model import Transformer, host_embedding
from gptoss_jax.model.initial import add_missing, init_params
from gptoss_jax.objectives import Objective
from gptoss_jax.optimizer import make_optimizer, split_trainable
from gptoss_jax.optimizer.matrix_views import has_matrix_for_muon
from gptoss_jax.parallel import sharding
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.parameters import patterns
from gptoss_jax.runs import records
from gptoss_jax.runs.records import Record
from gptoss_jax.runs.workdir import write_text
from gptoss_jax.training import expert_load
from gptoss_jax.training.layerwise_step import make_layerwise_step
from gptoss_jax.training.step import StepMetrics, init_state, make_train_step
from gptoss_jax.types import Batch, Params, TrainState

LOAD_FILE = "expert_load.json"


class Step(Protocol):
    """A jitted training step, which donates the state and returns the next one."""

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Take the step."""
        ...

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """Lower the step for arrays or their shapes, as the `lower` of a jitted function does."""
        ...


def with_day(config: Config) -> Config:
    """Return the config of a run with the day of `data.date=today`: the one on which it began."""
    if config.data.date != "today":
        return config
    record = records.newest_record(config.run_folder)
    recorded = record.config.data.date if record else None
    day = processes.from_first(lambda: dates.begin(config.data.date, recorded))
    return dataclasses.replace(config, data=dataclasses.replace(config.data, date=day))


def with_steps(config: Config, record: Record | None) -> Config:
    """Return the config with the `train.steps` that `train.epochs` makes, if that is set.

    A run that resumes (`record`) with the epochs that it began with keeps its steps, and so its
    schedule.
    """
    epochs = config.train.epochs
    if not epochs:
        return config
    if record is not None and record.config.train.epochs == epochs:
        steps = record.config.train.steps
    else:
        # An exact number of steps must not become one more by rounding.
        steps = max(1, math.ceil(epochs * data.steps_per_epoch(config) - 1e-6))
    return dataclasses.replace(config, train=dataclasses.replace(config.train, steps=steps))


def check_mesh(config: Config, mesh: jax.sharding.Mesh) -> None:
    """Refuse a mesh that leaves a process out, or over which the batch does not divide.

    Raises:
        UserError: with the sizes.
    """
    there = {device.process_index for device in mesh.devices.flat}
    if len(there) < processes.count():
        raise UserError(
            f"{processes.count()} processes have {jax.device_count()} devices, but the mesh uses "
            f"{mesh.size}: --mesh.fsdp -1 uses all"
        )
    rows = config.data.batch_size // config.optimizer.accumulate
    sharding.check_batch(rows, config.data.sequence_length, mesh)


def check_same_data(fingerprint: dict[str, Any]) -> None:
    """Refuse data that differ between processes. Raises UserError."""
    first = processes.from_first(lambda: fingerprint)
    differences = data.differences(first, fingerprint)

    def check() -> None:
        if differences:
            raise UserError(
                f"process {processes.index()} has other data than process 0: "
                f"{', '.join(differences[:3])}"
            )

    processes.together(check)


def optimizer_of(config: Config, factors: Params) -> optax.GradientTransformationExtraArgs:
    """Make the optimizer of a config. `factors` are what `lora.select.masks` returns."""
    return make_optimizer(
        config.optimizer,
        config.train.steps,
        masks=factors,
        balance_bias=config.train.balance_bias,
        seed=config.train.seed,
    )


def make_step(
    config: Config,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    objective: Objective,
    *,
    factors: Params,
) -> Step:
    """Make the step of a config: by `layerwise_step.py` if it is fused, else by `step.py`.

    Raises:
        UserError: `optimizer.fused` on a mesh of several devices, or an embedding table on the
            host that is trained.
    """
    common: dict[str, Any] = {
        "total": objective.total,
        "compiler_options": objective.compiler_options,
        "frozen_paths": patterns.frozen_paths(factors),
    }
    if config.optimizer.fused:
        step: Any = make_layerwise_step(model, optimizer, objective.loss, factors=factors, **common)
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
    if model.config.embedding_on_host:
        step = host_embedding.Step(step, model.config, factors)
    return step


def first_state(
    config: Config,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    params: Params | None,
    *,
    factors: Params,
) -> TrainState:
    """Make the state before the first step, from `params`, or from random parameters if None.

    It initialises the adapters, and the parameters of the user's own model, that `params` lacks.
    """
    if params is not None:
        params = add_missing(model, params, seed=config.train.seed)
        params = adapters.add(model.config, params, seed=config.train.seed)
    return init_state(
        model,
        optimizer,
        params,
        seed=config.train.seed,
        frozen_paths=patterns.frozen_paths(factors),
        average=config.optimizer.ema > 0,
    )


def abstract_state(
    config: Config,
    model: Transformer,
    optimizer: optax.GradientTransformation,
    *,
    factors: Params,
) -> TrainState:
    """Return the shapes of the first state, sharded over the current mesh if there is one.

    Raises:
        UserError: the mesh does not divide an axis of a parameter.
    """
    make = partial(first_state, config, model, optimizer, factors=factors)
    state = jax.eval_shape(make, None)
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return state
    state = sharding.place(state, mesh)
    return host_embedding.place(state) if model.config.embedding_on_host else state


def describe_trained(model: Transformer, factors: Params) -> list[str]:
    """Return lines that say which parameters are trained; none if all are, at the same rate."""
    if all(np.all(factor == 1) for factor in jax.tree.leaves(factors)):
        return []
    return ["trained", *patterns.describe(model.abstract_params(), factors)]


def describe_muon(config: Config, model: Transformer, factors: Params) -> list[str]:
    """Return a line if optimizer.name is muon and Muon updates nothing; else none.

    Such a run goes on with AdamW: adapters and the other parameters that Muon leaves to it are
    often tuned alone, and AdamW suits them.
    """
    trained, _ = split_trainable(model.abstract_params(), patterns.frozen_paths(factors))
    if config.optimizer.name != "muon" or has_matrix_for_muon(trained):
        return []
    return [
        "optimizer AdamW, though optimizer.name is muon: Muon updates the matrices of attention "
        "and dense experts, and this run trains none of them (adapters, router, embedding, "
        "unembedding, norms and biases get AdamW)"
    ]


def check_patterns(config: Config, model: Transformer) -> None:
    """Refuse patterns that match nothing in the model, before anything is read or measured."""
    even = np.ones((config.model.num_layers, config.model.num_experts))
    select.masks(model.abstract_params(), config.model, config.optimizer, load=even)


def load_for_patterns(
    config: Config,
    model: Transformer,
    objective: Objective,
    params: Params | None,
    *,
    workdir: Path,
    resuming: bool,
) -> Float[np.ndarray, "L E"] | None:
    """Return the experts' load if a pattern chooses experts by it, else None.

    A new run measures it over the first `train.load_batches` batches, with the parameters that
    training starts from (`params`, or random ones if None), without `init_adapters`. `keep`
    stores it in the workdir, where a run that resumes reads it, to train the same experts.

    Raises:
        UserError: the run resumes, and the file is missing or damaged.
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
    if params is None:
        params = init_params(model, seed=config.train.seed)
    return expert_load.measure_load(
        model, params, objective.first_batches(config.train.load_batches)
    )


def keep(config: Config, load: Float[np.ndarray, "L E"] | None, workdir: Path) -> None:
    """Write what a run needs to go on later: the load, and which records its data has."""
    if load is not None:
        write_text(workdir / LOAD_FILE, json.dumps(load.tolist()) + "\n")
    if processes.is_first():
        data.keep_records(config, workdir)


def continue_data(batches: Any, record: Record, fingerprint: dict[str, Any]) -> None:
    """Move the batches to where a checkpoint was, on the data of now."""
    changed = data.differences(record.fingerprint, fingerprint)
    batches.set_state(record.data_state, changed=bool(changed))
