"""Fold adapters into the weights that they adapt."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.lora.adapters import ROOT
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.lora import LowRank, fold
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import MXFP4, Params, Relaid


def merge(model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Fold adapters into the weights; return the model without adapters, and its parameters.

    Each sum is computed in float32 and stored in the weight's dtype. Packed experts are decoded,
    then encoded again with the scales of least error. That loses updates that are small compared
    with the steps of 4-bit values: where this matters, first decode the experts (`decode_experts`).
    Layers are folded one at a time. To write a model to disk, give it to `gptoss_jax.save` with its
    adapters: `save` merges them piece by piece, and says how much of them survives.

    Raises:
        UserError: there are no adapters, or a weight is in a layout for kernels.
    """
    if ROOT not in params:
        raise UserError("there are no adapters to merge: these parameters have no lora")
    flat = flatten({name: child for name, child in params.items() if name != ROOT})
    for path in adapters.adapted(model):
        own = params[ROOT]
        for name in path.split("/"):
            own = own[name]
        flat[path] = _merge(path, flat[path], LowRank(own["a"], own["b"]), scale=model.lora.scale)
    plain = dataclasses.replace(model, lora=type(model.lora)())
    return plain, nest(flat)


def decode_experts(model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Return the model with packed experts decoded to its `param_dtype`; the rest is unchanged."""
    dtype = jnp.dtype(model.param_dtype)
    leaves = {
        path: mxfp4.decode(leaf, dtype) if isinstance(leaf, MXFP4) else leaf
        for path, leaf in flatten(params).items()
    }
    return dataclasses.replace(model, experts="dense"), nest(leaves)


def _merge(path: str, weight: Any, adapter: LowRank, *, scale: float) -> Any:
    if isinstance(weight, Relaid):
        raise UserError(
            f"{path} is in the kernel layout {weight.layout!r}: load the weights without a layout"
        )
    if not table.row(path).in_layers:
        return _merge_one(weight, adapter, path, scale)
    layers = [
        _merge_one(weight[i], LowRank(adapter.a[i], adapter.b[i]), path, scale)
        for i in range(adapter.a.shape[0])
    ]
    if isinstance(weight, tuple):
        return tuple(layers)
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


@partial(jax.jit, static_argnums=(2, 3))
def _merge_one(weight: Any, adapter: LowRank, path: str, scale: float) -> Any:
    """Fold an adapter into one layer's weight, or into a weight outside the layers."""
    row = table.row(path)
    total = fold(weight, adapter.times(scale), experts="E" in row.lead, lookup=row.lookup)
    return mxfp4.encode(total, scale_rule="least_error") if isinstance(weight, MXFP4) else total
