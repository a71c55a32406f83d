"""Start a run from PEFT's adapters (`init_adapters`)."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from gptoss_jax.config import Config, LoRAConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.model import MakeModel, Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.parameters import patterns, table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params
from gptoss_jax.weights import peft


def read(config: Config) -> tuple[LoRAConfig, Params] | None:
    """Read the adapters of `init_adapters` with `weights.peft.read`; None if it is not set.

    Raises:
        UserError: the folder can't be read, or its adapters belong to another base or differ from
            `model.lora`.
    """
    if config.init_adapters is None:
        return None
    own, tree = peft.read(config.init_adapters, config.model)
    options = _options(config, own)
    if options:
        raise UserError(
            f"--init-adapters {config.init_adapters} has adapters of {describe(own)}, and "
            f"model.lora has others: give {' '.join(options)}"
        )
    return own, tree


def describe(own: LoRAConfig) -> str:
    """Return the targets, rank, alpha and rslora as text."""
    return (
        f"{' '.join(own.targets)}, rank {own.rank}, alpha {own.alpha:g}"
        f"{', rslora' if own.rslora else ''}"
    )


def put(
    config: Config, params: Params | None, own: Params, *, make_model: MakeModel = Transformer
) -> Params:
    """Return parameters with adapters: those in `own`, and new ones for the rest.

    Adapters that `own` lacks get the first values of any new run. These are adapters of other
    weights and of other layers, and unused ranks: those are zero in both A and B, so they would
    stay zero. The model computes the same function as with `own` alone.

    Args:
        config: The config of the run; `model` has the mesh's padding.
        params: Parameters without adapters; None: random ones from the seed.
        own: Adapters from `read`, as numpy arrays.

    Raises:
        UserError: the parameters already have adapters.
    """
    model, seed = config.model, config.train.seed
    if params is None:
        params = init_params(make_model(model), seed=seed)
    elif lora_adapters.ROOT in params:
        raise UserError(
            f"--init {config.init} has adapters, and --init-adapters {config.init_adapters} others:"
            " give one of them"
        )
    key = jax.random.fold_in(jax.random.key(seed), 1)  # as `adapters.add`
    new = flatten(jax.jit(partial(lora_adapters.init, config=model))(key))
    given = flatten(own)
    for path in {path.rpartition("/")[0] for path in given}:
        a, b = (given[f"{path}/{part}"] for part in "ab")
        new[f"{path}/a"] = _filled(a, b, new[f"{path}/a"], stacked=table.row(path).in_layers)
        new[f"{path}/b"] = jnp.asarray(b)
    return {**params, lora_adapters.ROOT: nest(new)}


def _filled(a: np.ndarray, b: np.ndarray, new: Any, *, stacked: bool) -> Float[Array, "..."]:
    """Replace ranks of A that are all zero in both A and B with those of `new`, layer by layer."""
    lead = a.shape[:1] if stacked else (1,)
    rank = a.shape[-1]
    there = a.reshape(*lead, -1, rank).any(1) | b.reshape(*lead, rank, -1).any(2)  # [L, r]
    shape = (*(lead if stacked else ()), *(1,) * (a.ndim - 1 - stacked), rank)
    return jnp.where(there.reshape(shape), a, new)


def _options(config: Config, own: LoRAConfig) -> list[str]:
    """Return the options that make `model.lora` fit the adapters; [] if it already does."""
    mine, options = config.model.lora, []
    given = Transformer(config.model).abstract_params()
    adaptable = lora_adapters.adaptable()
    leaves = {path: leaf for path, leaf in flatten(given).items() if path in adaptable}
    even = np.ones((config.model.num_layers, config.model.num_experts))

    def chosen(of: LoRAConfig) -> dict[str, np.ndarray]:
        if not of.targets:
            return {path: np.zeros(1, bool) for path in leaves}
        texts = lora_adapters.target_patterns(dataclasses.replace(config.model, lora=of))
        return patterns.selected("model.lora.targets", texts, leaves, load=even)

    have, need = chosen(mine), chosen(own)
    if any(np.any(need[path] & ~np.broadcast_arrays(have[path], need[path])[0]) for path in need):
        options.append(f"--model.lora.targets {' '.join(own.targets)}")
    if mine.rank != own.rank:
        options.append(f"--model.lora.rank {own.rank}")
    if mine.alpha != own.alpha:
        options.append(f"--model.lora.alpha {own.alpha:g}")
    if mine.rslora != own.rslora:
        options.append(f"--model.lora.{'' if own.rslora else 'no-'}rslora")
    return options
