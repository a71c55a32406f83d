"""Pack the experts of a model that trains for MXFP4 (`ModelConfig.qat`)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.lora.adapters import scaled
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.lora import LowRank, fold
from gptoss_jax.parameters import table
from gptoss_jax.types import MXFP4, Params, Relaid

_MATRICES = [row.name for row in table.rows() if row.packable]


def pack(model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Return the model with its experts in MXFP4, their adapters folded in.

    All other weights stay as they are. For a model with `qat`, the result computes the same
    function without quantising in every pass; for another model, it is quantisation after training.
    The scales are those of least error. Experts that are already packed and have no adapter keep
    their bytes. `params` may have only some of the experts' weights (`Sampler.renew`): those are
    packed. Layers are packed one at a time. On a mesh, a packed weight is sharded like the weight
    that it is made from.
    """
    experts = dict(params["layers"]["experts"])
    for name in _MATRICES:
        if name in experts:
            adapter = scaled(adapters(params), name, model.lora.scale)
            experts[name] = _pack(experts[name], adapter)
    new = {**params, "layers": {**params["layers"], "experts": experts}}
    if adapters(params):
        rest = {k: part for k, part in params["lora"]["layers"].items() if k != "experts"}
        new["lora"] = {**params["lora"], "layers": rest}
    return packed(model), new


def packed(model: ModelConfig) -> ModelConfig:
    """Return the config of the model that `pack` returns."""
    return dataclasses.replace(model, experts="mxfp4", qat=False)


def adapters(params: Params) -> Params:
    """Return the experts' adapters, which `pack` folds in, by the names of their weights."""
    return params.get("lora", {}).get("layers", {}).get("experts", {})


def _pack(weight: Any, adapter: LowRank | None) -> Any:
    """Pack a stack [L, ...] or a tuple of L weights, with their adapters folded in."""
    if adapter is None and isinstance(
        weight[0] if isinstance(weight, tuple) else weight, MXFP4 | Relaid
    ):
        return weight
    count = len(weight) if isinstance(weight, tuple) else weight.shape[0]
    layers = [
        _pack_layer(weight[i], adapter and jax.tree.map(lambda x, i=i: x[i], adapter))
        for i in range(count)
    ]
    if isinstance(weight, tuple):
        return tuple(layers)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


@jax.jit
def _pack_layer(weight: Any, adapter: LowRank | None) -> MXFP4:
    if adapter is not None:
        weight = fold(weight, adapter, experts=True)
    return mxfp4.encode(weight, scale_rule="least_error")
