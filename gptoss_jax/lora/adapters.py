"""Adapters: where they live in the tree, how they begin, and how layers find them.

A weight is adapted by `params["lora"][<the weight's path>]`, which holds `a`, from the weight's
inputs to the rank r, and `b`, from there to its outputs. What is added to the weight is
scale * A B (`LoRAConfig.scale`). The axes of the two, L the stack of layers:

    layers/attention/q_weight     W [L,N,H,D]    a [L,D,r]     b [L,r,N,H]
    layers/experts/down_weight    W [L,E,D,F]    a [L,E,F,r]   b [L,E,r,D]
    embedding/weight              W [V,D]        a [V,r]       b [r,D]

Which axes of a weight are its inputs, and what of A and B is spread over a mesh, its row in the
table of parameters says (`Parameter.adapter`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.parameters import patterns, table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params

ROOT = "lora"  # of the adapters' tree in the parameters


def adaptable() -> list[str]:
    """Return the paths that can take an adapter: in the layers first, then the tables."""
    rows = [row for row in table.rows() if row.target]
    return [row.path for row in sorted(rows, key=lambda row: not row.in_layers)]


def names() -> dict[str, str]:
    """Return what LoRAConfig.targets may name beside patterns of paths, and the paths."""
    groups = {name: f"layers/{name}/*_weight" for name in ("attention", "experts")}
    return {str(table.row(path).target): path for path in adaptable()} | groups


def target_patterns(config: ModelConfig) -> dict[str, str]:
    """Return the targets as patterns of paths, each with what was written for it."""
    return {_as_pattern(text): text for text in config.lora.targets}


def _as_pattern(text: str) -> str:
    """Spell out a name, as gate_up[3,7]: layers/experts[3,7]/gate_up_weight."""
    name, bracket, inside = text.partition("[")
    if name not in names():
        return text
    path, chosen = names()[name], bracket + inside
    return path.replace("experts", f"experts{chosen}") if "experts" in path else path + chosen


def adapted(config: ModelConfig) -> list[str]:
    """Return the paths of the weights that get an adapter, in the order of `adaptable`.

    Raises:
        UserError: a target that names nothing that can be adapted, or a rank larger than a side of
            what it adapts.
    """
    known = ", ".join(names())
    paths = patterns.named(
        "model.lora.targets",
        target_patterns(config),
        adaptable(),
        otherwise=f"it names nothing that can be adapted: there are {known}, and patterns of paths",
    )
    for path in paths:
        row = table.row(path)
        sizes = row.all_sizes(config)
        side = min(math.prod(sizes[x] for x in part) for part in (row.inputs, row.outputs))
        if config.lora.rank > side:
            raise UserError(
                f"model.lora.rank is {config.lora.rank}, and {path}, which model.lora.targets "
                f"names, has a side of {side}: choose a smaller rank, or leave it out"
            )
    return paths


def shapes(config: ModelConfig) -> dict[str, LowRank]:
    """Return path -> the shapes of its adapter, for the paths of `adapted`."""
    found: dict[str, LowRank] = {}
    for path in adapted(config):
        row = table.row(path)
        sizes = row.all_sizes(config) | {"r": config.lora.rank}
        parts: Any = (tuple(sizes[x] for x in row.adapter(part)[0]) for part in "ab")
        found[path] = LowRank(*parts)
    return found


def init(key: Array, config: ModelConfig) -> Params:
    """Make `params["lora"]`: B zeros, so that nothing is adapted yet, and A normal.

    A's standard deviation is 1 / sqrt(inputs), so that x A has the variance of x; of the
    embedding, whose input is one of V, 1. In float32 whatever the model's dtype: they are few,
    an update of 1e-3 of a value is lost in bfloat16, and the optimizer would keep a copy anyway.
    """
    flat: dict[str, Array] = {}
    for path, shape in shapes(config).items():
        key, own = jax.random.split(key)
        row = table.row(path)
        sizes = row.all_sizes(config) | {"F": config.d_expert, "V": 1}
        std = 1 / math.sqrt(math.prod(sizes[x] for x in row.inputs))
        # Made without the padding of F, so that it is the same on any mesh; that stays zero.
        pads = [(0, config.expert_padding if x == "F" else 0) for x in row.adapter("a")[0]]
        real: Any = [n - pad for n, (_, pad) in zip(shape.a, pads, strict=True)]
        flat[f"{path}/a"] = jnp.pad(std * jax.random.normal(own, real, jnp.float32), pads)
        flat[f"{path}/b"] = jnp.zeros(shape.b, jnp.float32)
    return nest(flat)


def add(model: ModelConfig, params: Params, *, seed: int = 0) -> Params:
    """Return parameters with new adapters, if the model has any and they have none.

    The adapted model is the same function at first. The same seed gives the same adapters.

    Raises:
        UserError: parameters with adapters other than the model's.
    """
    wanted = jax.eval_shape(partial(init, config=model), jax.random.key(0))
    there = params.get(ROOT)
    if there is None:
        if not model.lora.targets:
            return params
        key = jax.random.fold_in(jax.random.key(seed), 1)
        return {**params, ROOT: jax.jit(partial(init, config=model))(key)}
    shapes = [{k: x.shape for k, x in flatten(tree).items()} for tree in (there, wanted)]
    if shapes[0] != shapes[1]:
        raise UserError(
            "the weights to start from have adapters, and not those of model.lora: give the same "
            "model.lora, or merge them first (gptoss_jax.lora.fold.merge)"
        )
    return params


def join(params: Any) -> Params:
    """Return `params["layers"]` with each module's adapters in it, as `lora`.

    Where there is no `params["lora"]`, there are none, whatever the model's config says.
    """
    own = params.get("lora", {}).get("layers", {})
    return {
        name: {**module, "lora": own[name]} if name in own else module
        for name, module in params["layers"].items()
    }


def adapter(module: nn.Module, name: str, scale: float) -> LowRank | None:
    """Return the adapter of a weight of a layer's module, its B scaled; None if it has none."""
    if not module.has_variable("params", "lora"):
        return None
    return scaled(module.get_variable("params", "lora"), name, scale)


def scaled(adapters: Params, name: str, scale: float) -> LowRank | None:
    """Return the adapter of a name, its B scaled; None if there is none."""
    if name not in adapters:
        return None
    own = adapters[name]
    return LowRank(own["a"], own["b"]).times(scale)


def of_table(params: Any, name: str, model: Any) -> LowRank | None:
    """Return a model's adapter of the embedding or the unembedding; None if it has none."""
    own = params.get("lora", {}).get(name, {})
    return scaled(own, "weight", model.config.lora.scale) if own else None
