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
from gptoss_jax.parallel import padding
from gptoss_jax.parameters import table
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


def two_given(config: Config) -> UserError:
    """Return the error for a run whose --init has adapters of its own."""
    return UserError(
        f"--init {config.init} has adapters, and --init-adapters {config.init_adapters} others:"
        " give one of them"
    )


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
        raise two_given(config)
    key = jax.random.fold_in(jax.random.key(seed), 1)  # as `adapters.add`
    new = flatten(jax.jit(partial(lora_adapters.init, config=model))(key))
    given = flatten(padding.resize({lora_adapters.ROOT: own}, by=model.expert_padding)["lora"])
    for path in {path.rpartition("/")[0] for path in given}:
        a, b = (given[f"{path}/{part}"] for part in "ab")
        new[f"{path}/a"] = _filled(a, b, new[f"{path}/a"], lead=len(table.row(path).lead))
        new[f"{path}/b"] = jnp.asarray(b)
    return {**params, lora_adapters.ROOT: nest(new)}


def _filled(a: np.ndarray, b: np.ndarray, new: Any, *, lead: int) -> Float[Array, "..."]:
    """Replace ranks of A that are all zero in both A and B with those of `new`.

    The first `lead` axes are layers and experts: each has ranks of its own.
    """
    first, rank = a.shape[:lead], a.shape[-1]
    there = a.reshape(*first, -1, rank).any(-2) | b.reshape(*first, rank, -1).any(-1)
    shape = (*first, *(1,) * (a.ndim - 1 - lead), rank)
    return jnp.where(there.reshape(shape), a, new)


def _options(config: Config, own: LoRAConfig) -> list[str]:
    """Return the options that make `model.lora` fit the adapters; [] if it already does."""
    mine, options = config.model.lora, []
    have, need = (
        lora_adapters.selected(dataclasses.replace(config.model, lora=lora)) for lora in (mine, own)
    )
    if any(np.any(need[path] & ~np.broadcast_arrays(have[path], need[path])[0]) for path in need):
        options.append(f"--model.lora.targets {' '.join(own.targets)}")
    if mine.rank != own.rank:
        options.append(f"--model.lora.rank {own.rank}")
    if mine.alpha != own.alpha:
        options.append(f"--model.lora.alpha {own.alpha:g}")
    if mine.rslora != own.rslora:
        options.append(f"--model.lora.{'' if own.rslora else 'no-'}rslora")
    return options
