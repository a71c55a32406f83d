"""What a config trains by, as shapes: nothing is allocated. And how large such trees are."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptoss_jax.config import Config
from gptoss_jax.parameters.tree import flatten
from gptoss_jax.training.layerwise_step import largest_part
from gptoss_jax.training.program import Program, make_program
from gptoss_jax.types import Batch, TrainState


@dataclass(frozen=True)
class Shapes:
    """What a config trains by, and what goes into its step, as shapes."""

    program: Program
    state: TrainState
    batch: Batch


def shapes(config: Config) -> Shapes:
    """Return the step that a config trains with, and its arguments as shapes.

    Raises:
        UserError: patterns of `optimizer` that do not fit the model.
    """
    c, sources = config.model, len(config.data.train) if config.data.weights else 0
    # Which experts have the highest load is not known, but how many are chosen is.
    load = np.full((c.num_layers, c.num_experts), 1 / c.num_experts)
    program = make_program(config, load=load, num_sources=sources)
    size = (config.data.batch_size, config.data.sequence_length)
    ids = jax.ShapeDtypeStruct(size, jnp.int32)
    weights = jax.ShapeDtypeStruct(size, jnp.float32)
    of_rows = jax.ShapeDtypeStruct(size[:1], jnp.int32) if sources else None
    batch = Batch(ids, ids, weights, ids, ids, of_rows)  # pyright: ignore[reportArgumentType]
    batch = program.objective.complete(batch)
    return Shapes(program, jax.eval_shape(program.begin, None), batch)


def checkpoint_bytes(state: TrainState, *, left_out: Collection[str] = ()) -> int:
    """Return the bytes of what a checkpoint holds: parameters, optimizer, averaged parameters.

    `left_out` are the paths of parameters that are in a base, adapters though frozen not among them
    (`frozen_base.measure`).
    """
    kept = [
        leaf
        for path, leaf in flatten(state.params).items()
        if path not in left_out or path.startswith("lora/")
    ]
    return tree_bytes((kept, state.opt_state, state.ema))


def gradient_bytes(config: Config, each: dict[str, int]) -> int:
    """Return the bytes of gradients that there are at once, of those of each parameter by path."""
    if config.optimizer.fused:
        return largest_part(each, num_layers=config.model.num_layers)
    return sum(each.values())


def tree_bytes(tree: Any) -> int:
    """Return the bytes of all leaves, wherever they are."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))
