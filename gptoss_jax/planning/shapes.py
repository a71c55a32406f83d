"""Make the training step of a config and its arguments as shapes, without allocating arrays.

This module also computes the sizes of such trees in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import Config
from gptoss_jax.lora import select
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.objectives import make_objective
from gptoss_jax.parallel import sharding
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.runs import model_source
from gptoss_jax.training import setup
from gptoss_jax.training.layerwise_step import largest_part
from gptoss_jax.types import Batch, Params, TrainState


@dataclass(frozen=True)
class Shapes:
    """The training step of a config, and its arguments as shapes."""

    model: Transformer
    factors: Params  # the factor on each parameter's learning rate
    step: setup.Step
    state: TrainState  # sharded over the mesh that is set, if there is one
    batch: Batch


def shapes(config: Config, make_model: MakeModel = Transformer) -> Shapes:
    """Return the step that a config trains with, and its arguments as shapes.

    Raises:
        UserError: patterns of `optimizer` do not fit the model, or `make_model` builds no model.
    """
    c, sources = config.model, len(config.data.train) if config.data.weights else 0
    # It is not known which experts have the highest load, but it is known how many are chosen.
    load = np.full((c.num_layers, c.num_experts), 1 / c.num_experts)
    model_source.source_of(make_model, config.model)  # raises if `make_model` builds no model
    model, objective = make_model(sharding.padded(config.model)), make_objective(config)
    factors = select.masks(model.abstract_params(), model.config, config.optimizer, load=load)
    optimizer = setup.optimizer_of(config, factors)
    step: Any = setup.make_step(config, model, optimizer, objective, factors=factors)
    state = setup.abstract_state(config, model, optimizer, factors=factors)
    size = (config.data.batch_size, config.data.sequence_length)
    ids = jax.ShapeDtypeStruct(size, jnp.int32)
    weights = jax.ShapeDtypeStruct(size, jnp.float32)
    of_rows = jax.ShapeDtypeStruct(size[:1], jnp.int32) if sources else None
    batch = Batch(ids, ids, weights, ids, ids, of_rows)  # pyright: ignore[reportArgumentType]
    batch = objective.complete(batch)
    if model.config.embedding_on_host:
        batch = step.with_rows(batch)
    return Shapes(model, factors, step, state, batch)


def checkpoint_bytes(state: TrainState, *, left_out: Collection[str] = ()) -> int:
    """Return the bytes of a checkpoint: parameters, optimizer state, averaged parameters.

    `left_out` are the paths of frozen parameters, which are in the base. Frozen adapters count all
    the same: a checkpoint holds them (`frozen_base.measure`).
    """
    kept = [
        leaf
        for path, leaf in flatten(state.params).items()
        if path not in left_out or path.startswith("lora/")
    ]
    return tree_bytes((kept, state.opt_state, state.ema))


def gradient_bytes(config: Config, each: dict[str, int]) -> int:
    """Return the bytes of gradients in memory at once, given those of each parameter by path."""
    if config.optimizer.fused:
        return largest_part(each, num_layers=config.model.num_layers)
    return sum(each.values())


def tree_bytes(tree: Any) -> int:
    """Return the bytes of all leaves as whole arrays, however they are sharded."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
