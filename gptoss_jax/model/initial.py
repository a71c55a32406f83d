"""Random parameters to begin with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.parallel import mesh, sharding
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params


def init_params(model: Any, *, seed: int = 0) -> Params:
    """Make random parameters; the same seed gives the same ones, on a mesh each in its shards."""
    key = jax.random.split(jax.random.key(seed))[0]

    def init(key: Any) -> Params:
        with mesh.alone():
            params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return sharding.constrain_tree(params)

    return jax.jit(init)(key)


def add_missing(model: Any, params: Params, *, seed: int = 0) -> Params:
    """Add the parameters that a model has and a tree lacks, as `init_params` makes them.

    So a model with parameters of its own starts from weights that have none. Adapters are left to
    `lora.adapters.add`.
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

    return nest(there | flatten(jax.jit(init)(key)))
