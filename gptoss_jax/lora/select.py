"""LoRA: which weights get adapters, and what is trained.

An adapter is a trained low-rank product A B, added to a weight that stays as it is, packed or not
(Hu et al. 2021, arXiv:2106.09685). `ModelConfig.lora` names the weights:

    q k v o, attention (these four), gate_up, down, experts (both), router, embedding, unembedding
    gate_up[3,7]  experts[0-3]  down[top4]      experts by index, or by load on the user's data
    layers[12-]/attention/*_weight              patterns of paths, as in `optimizer.only`

An adapted weight has an adapter in every layer and for every expert, in one array. In layers and
experts that are not selected, B stays zero and adapters get no update. All other parameters are
frozen, unless `optimizer.only` names them too. `adapters` says where adapters are in the tree.
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
    """Return whether experts are selected by load, so that `masks` needs `load`.

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
    """Return the learning-rate factor of each parameter: see `patterns.masks`.

    In a model with adapters, only these are trained: the adapters, in the layers and experts that
    their targets select, and what `optimizer.only` names. If `only` names adapters, the other
    adapters are not trained. `freeze` and `learning_rates` apply to adapters too, by their paths.

    Raises:
        UserError: as `patterns.masks`, for targets too; a target that names nothing that can be
            adapted; a rank larger than a side of the weight.
    """
    if not model.lora.targets:
        return patterns.masks(params, optimizer, load=load)
    adapted = adapters.adapted(model)
    leaves, adaptable = flatten(params), adapters.adaptable()
    weights = {path: leaf for path, leaf in leaves.items() if path in adaptable}
    chosen = patterns.selected(
        "model.lora.targets", adapters.target_patterns(model), weights, load=load
    )
    names_adapters = any(pattern.startswith(f"{ROOT}/") for pattern in optimizer.only)
    only = optimizer.only if names_adapters else (f"{ROOT}/*", *optimizer.only)
    factors = flatten(patterns.masks(params, dataclasses.replace(optimizer, only=only), load=load))
    for path in adapted:
        for part in "ab":
            name = f"{ROOT}/{path}/{part}"
            where = chosen[path].reshape(_aligned(chosen[path].shape, path, part))
            factor = np.asarray(factors[name]) * where.astype(np.float32)
            if np.all(factor == factor.flat[0]):
                factors[name] = float(factor.flat[0])
            else:  # one entry per layer, for `patterns.describe`
                factors[name] = np.repeat(factor, model.num_layers // factor.shape[0], axis=0)
    if not any(np.any(factors[f"{ROOT}/{path}/{part}"]) for path in adapted for part in "ab"):
        raise UserError(
            "optimizer.freeze names all adapters: nothing is left of model.lora.targets"
        )
    return nest(factors)


def _aligned(shape: tuple[int, ...], path: str, part: str) -> tuple[int, ...]:
    """Return the shape in which a weight's mask, over layers and experts only, fits its adapter."""
    row = table.row(path)
    lead = len(row.lead)
    assert all(size == 1 for size in shape[lead:])
    return (*shape[:lead], *(1,) * (len(row.adapter(part)[0]) - lead))
