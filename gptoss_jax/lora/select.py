"""LoRA: which weights get adapters, and what is trained.

A low-rank product A B is learned beside a weight that stays as it is, packed or not (Hu et al.
2021, arXiv:2106.09685). `ModelConfig.lora` names the weights:

    q k v o, attention (these four), gate_up, down, experts (both), router, embedding, unembedding
    gate_up[3,7]  experts[0-3]  down[top4]      experts by index, or by load on the user's data
    layers[12-]/attention/*_weight              patterns of paths, as in `optimizer.only`

What has an adapter has one in every layer and for every expert, in one array; those of layers and
experts that are not chosen stay zero and get no update. Everything but adapters is frozen, unless
`optimizer.only` names it too. See `adapters` for where they live.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float

from gptoss_jax.config import ModelConfig, OptimizerConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.lora.adapters import ROOT
from gptoss_jax.parameters import patterns, table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params


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
    leaves, adaptable = flatten(params), adapters.adaptable()
    weights = {path: leaf for path, leaf in leaves.items() if path in adaptable}
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
    row = table.row(path)
    lead = len(row.lead)
    assert all(size == 1 for size in shape[lead:])
    return (*shape[:lead], *(1,) * (len(row.adapter(part)[0]) - lead))
