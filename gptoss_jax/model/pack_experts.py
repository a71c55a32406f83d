"""From a model that trains for MXFP4 (`ModelConfig.qat`) to the packed one that it computes as."""

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
    """Return the model with its experts in MXFP4, their adapters folded in; the rest as it is.

    Of a model with `qat` it is the same function, without the work of quantising in every pass; of
    another it is what quantising after training gives. Scales are those of least error. Experts
    that are packed and have no adapter keep their bytes; of a part of the experts' weights
    (`Sampler.renew`) that part is packed. A layer at a time; over a mesh what is packed is spread
    as what it is of.
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
    """Return the model whose parameters `pack` gives."""
    return dataclasses.replace(model, experts="mxfp4", qat=False)


def adapters(params: Params) -> Params:
    """Return the experts' adapters, by the names of what they adapt: `pack` folds them in."""
    return params.get("lora", {}).get("layers", {}).get("experts", {})


def _pack(weight: Any, adapter: LowRank | None) -> Any:
    """Pack a stack [L, ...] or a tuple of L, with its adapter's."""
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
