"""LoRA: adapters added to a model, what of it is trained, and adapters folded back into it.

A low-rank product A B is learned beside a weight that stays as it is, packed or not (Hu et al.
2021, arXiv:2106.09685). `ModelConfig.lora` names the weights:

    q k v o, attention (these four), gate_up, down, experts (both), router, embedding, unembedding
    gate_up[3,7]  experts[0-3]  down[top4]      experts by index, or by load on the user's data
    layers[12-]/attention/*_weight              patterns of paths, as in `optimizer.only`

What has an adapter has one in every layer and for every expert, in one array; those of layers and
experts that are not chosen stay zero and get no update. Everything but adapters is frozen, unless
`optimizer.only` names it too. See `model/lora.py` for where they live.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.ops import mxfp4
from gptoss_jax.ops.lora import LowRank, dense
from gptoss_jax.parameters import patterns
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import MXFP4, Params, Relaid

ROOT = "lora"  # of the adapters' tree in the parameters


def needs_load(model: ModelConfig, optimizer: OptimizerConfig) -> bool:
    """Say whether experts are chosen by load, so that `masks` has to be given it.

    Raises:
        UserError: patterns that can't be read.
    """
    texts = list(adapters.target_patterns(model))
    return patterns.needs_load(optimizer) or patterns.chooses_by_load(texts)


def masks(
    params: Params,
    model: ModelConfig,
    optimizer: OptimizerConfig,
    *,
    load: Float[np.ndarray, "L E"] | None = None,
) -> Params:
    """Return the factor on the learning rate of each parameter: see `patterns.masks`.

    With adapters these alone are trained, where their targets choose layers and experts, and what
    `optimizer.only` names; where it names adapters, these alone of them. `freeze` and
    `learning_rates` hold for them, too, by their paths.

    Raises:
        UserError: as `patterns.masks`, of targets too; nothing that can be adapted by a target's
            name; a rank larger than a side of the weight.
    """
    if not model.lora.targets:
        return patterns.masks(params, optimizer, load=load)
    adapted = adapters.adapted(model)
    weights = {path: leaf for path, leaf in flatten(params).items() if path in adapters.AXES}
    chosen = patterns.selected(
        "model.lora.targets", adapters.target_patterns(model), weights, load=load
    )
    some = any(pattern.startswith(f"{ROOT}/") for pattern in optimizer.only)  # of the adapters
    only = optimizer.only if some else (f"{ROOT}/*", *optimizer.only)
    factors = flatten(patterns.masks(params, dataclasses.replace(optimizer, only=only), load=load))
    for path in adapted:
        for part in "ab":
            name = f"{ROOT}/{path}/{part}"
            where = chosen[path].reshape(_aligned(chosen[path].shape, path, part))
            factor = np.asarray(factors[name]) * where.astype(np.float32)
            if np.all(factor == factor.flat[0]):
                factors[name] = float(factor.flat[0])
            else:  # every layer by itself, for what `patterns.describe` says
                factors[name] = np.repeat(factor, model.num_layers // factor.shape[0], axis=0)
    if not any(np.any(factors[f"{ROOT}/{path}/{part}"]) for path in adapted for part in "ab"):
        raise UserError(
            "optimizer.freeze names all adapters: nothing is left of model.lora.targets"
        )
    return nest(factors)


def _aligned(shape: tuple[int, ...], path: str, part: str) -> tuple[int, ...]:
    """Return the shape of a mask of a weight, of layers and experts alone, for its adapter."""
    axes = adapters.AXES[path]
    stack = len(axes.stack)
    assert all(size == 1 for size in shape[stack:])
    return (*shape[:stack], *(1,) * (1 + len(axes.inputs if part == "a" else axes.outputs)))


def add(model: ModelConfig, params: Params, *, seed: int = 0) -> Params:
    """Return parameters with new adapters, if the model has any and they have none.

    The adapted model is the same function at first. The same seed gives the same adapters.

    Raises:
        UserError: parameters with adapters other than the model's.
    """
    wanted = jax.eval_shape(partial(adapters.init, config=model), jax.random.key(0))
    there = params.get(ROOT)
    if there is None:
        if not model.lora.targets:
            return params
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return {**params, ROOT: jax.jit(partial(adapters.init, config=model))(key)}
    shapes = [{k: x.shape for k, x in flatten(tree).items()} for tree in (there, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the weights to start from have adapters, and not those of model.lora: give the same "
            "model.lora, or merge them first (gptoss_jax.lora.select.merge)"
        )
    return params


def merge(model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Fold adapters into the weights: return the model without any, and its parameters.

    Each sum is formed in float32 and kept in the weight's dtype. Packed experts are decoded and
    encoded again with the scales of least error, in which updates that are small beside the steps
    of 4 bits are lost: decode them first (`decode_experts`) where that matters. A layer at a time.
    To write a model, give it to `gptoss_jax.save` with its adapters: it merges them piece by piece,
    and says what survives.

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
    """Return the model with dense experts in its `param_dtype`; others are as they were."""
    dtype = jnp.dtype(model.param_dtype)
    leaves = {
        path: mxfp4.decode(leaf, dtype) if isinstance(leaf, MXFP4) else leaf
        for path, leaf in flatten(params).items()
    }
    return dataclasses.replace(model, experts="dense"), nest(leaves)


def _merge(path: str, weight: Any, adapter: LowRank, *, scale: float) -> Any:
    if isinstance(weight, Relaid):
        raise UserError(f"{path} is in the layout {weight.layout!r} of kernels: load it without")
    if not adapters.AXES[path].stack:
        return _merge_one(weight, adapter, path, scale)
    layers = [
        _merge_one(weight[i], LowRank(adapter.a[i], adapter.b[i]), path, scale)
        for i in range(adapter.a.shape[0])
    ]
    return tuple(layers) if isinstance(weight, tuple) else jax.tree.map(_stack, *layers)


def _stack(*layers: jax.Array) -> jax.Array:
    return jnp.stack(layers)


@partial(jax.jit, static_argnums=(2, 3))
def _merge_one(weight: Any, adapter: LowRank, path: str, scale: float) -> Any:
    """Add to one layer's weight, or to one that has no layers."""
    axes = adapters.AXES[path]
    stack = axes.stack[1:]
    update = dense(LowRank(adapter.a, adapter.b * scale), experts=bool(stack))  # as `lora.scaled`
    order = [(stack + axes.inputs + axes.outputs).index(x) for x in stack + axes.weight]
    update = update.transpose(order)
    if isinstance(weight, MXFP4):
        return mxfp4.encode(mxfp4.decode(weight, jnp.float32) + update, scale_rule="least_error")
    return (weight.astype(jnp.float32) + update).astype(weight.dtype)
