"""Declare a module's parameters by their rows in the table, and make their initial values."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptoss_jax.config import ModelConfig
from gptoss_jax.ops import mxfp4
from gptoss_jax.parallel import mesh, sharding
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import MXFP4, LayerOf, Params, Relaid


def declare(module: nn.Module, path: str, config: ModelConfig) -> Any:
    """Declare a module's parameter by its path in the tree, and return its value.

    Its row in the table of parameters gives the shape and the initial values, for one layer.

    Raises:
        ValueError: the path has no row, or its row says that this config's model lacks it.
    """
    row = table.row(path)
    if not row.exists(config):
        raise ValueError(f"{path}: its row in the table says that this model does not have it")
    if module.has_variable("params", row.name):
        value = module.get_variable("params", row.name)
        # Return it as it is, for an op to read; Linen would check the shapes of its arrays.
        if isinstance(value, Relaid | LayerOf) and value.shape == row.shape(config):
            return value
    return module.param(row.name, partial(_initial_value, row, config))


def _initial_value(row: table.Parameter, config: ModelConfig, key: Array) -> Array | MXFP4:
    """Return a parameter's initial value, for one layer.

    It is drawn without the padding of F, so that it is the same on any mesh.
    """
    init = {
        "normal": nn.initializers.normal(config.init_std),
        "zeros": nn.initializers.zeros,
        "ones": nn.initializers.ones,
    }[row.init]
    dtype = jnp.dtype(config.param_dtype)
    shape, real = (row.shape(c) for c in (config, dataclasses.replace(config, expert_padding=0)))
    value = init(key, real, jnp.float32 if row.packable else dtype)
    if shape != real:
        value = jnp.pad(value, [(0, n - m) for n, m in zip(shape, real, strict=True)])
    if row.packable and config.experts == "mxfp4":
        return mxfp4.encode(value)
    return value.astype(dtype)


def init_params(model: Any, *, seed: int = 0) -> Params:
    """Make random parameters, sharded on a mesh. The same seed gives the same values."""
    key = jax.random.split(jax.random.key(seed))[0]

    def init(key: Any) -> Params:
        with mesh.alone():
            params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return sharding.constrain_tree(params)

    return jax.jit(init)(key)


def add_missing(model: Any, params: Params, *, seed: int = 0, split: bool = False) -> Params:
    """Add the parameters that the model has and `params` lacks, with the values of `init_params`.

    So a model with extra parameters can start from weights without them. With `split`, each stack
    is a tuple with one array per layer. Adapters are added by `lora.adapters.add`.
    """
    there = flatten(params)
    wanted = [path for path in flatten(model.abstract_params()) if not path.startswith("lora/")]
    missing = [path for path in wanted if path not in there]
    if not missing:
        return params
    key = jax.random.split(jax.random.key(seed))[0]

    def init(key: Any) -> Params:
        with mesh.alone():
            made = flatten(model.init(key, jnp.zeros((1, 1), jnp.int32))["params"])
        return sharding.constrain_tree(nest({path: made[path] for path in missing}))

    made = flatten(jax.jit(init)(key))
    if split:
        made = {path: tuple(x) if path.startswith("layers/") else x for path, x in made.items()}
    return nest(there | made)
