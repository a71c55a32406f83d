"""Random parameters to begin with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.parallel import mesh, sharding
from gptoss_jax.types import Params


def init_params(model: Any, *, seed: int = 0) -> Params:
    """Make random parameters; the same seed gives the same ones, on a mesh each in its shards."""
    key = jax.random.split(jax.random.key(seed))[0]

    def init(key: Any) -> Params:
        with mesh.alone():
            params = model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        return sharding.constrain_tree(params)

    return jax.jit(init)(key)
