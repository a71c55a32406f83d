"""Adapters: where they are in the tree, their initial values, and how layers find them.

`params["lora"][<the weight's path>]` is the adapter of a weight: `a` maps the weight's inputs to
the rank r, and `b` maps the rank to the weight's outputs. The model adds scale * A B to the weight
(`LoRAConfig.scale`). The axes of W, A and B, where L is the stack of layers:

    layers/attention/q_weight     W [L,N,H,D]    a [L,D,r]     b [L,r,N,H]
    layers/experts/down_weight    W [L,E,D,F]    a [L,E,F,r]   b [L,E,r,D]
    embedding/weight              W [V,D]        a [V,r]       b [r,D]

The weight's row in the table of parameters says which of its axes are inputs, and how A and B are
sharded over a mesh (`Parameter.adapter`).
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.parameters import patterns, table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params

ROOT = "lora"  # the key of the adapters' tree in the parameters


def adaptable() -> list[str]:
    """Return the paths of weights that can take an adapter: those in layers first, then tables."""
    rows = [row for row in table.rows() if row.target]
    return [row.path for row in sorted(rows, key=lambda row: not row.in_layers)]


def names() -> dict[str, str]:
    """Return name -> path, for the names that LoRAConfig.targets accepts beside path patterns."""
    groups = {name: f"layers/{name}/*_weight" for name in ("attention", "experts")}
    return {str(table.row(path).target): path for path in adaptable()} | groups


def target_patterns(config: ModelConfig) -> dict[str, str]:
    """Return path pattern -> the target that the user wrote for it."""
    return {_as_pattern(text): text for text in config.lora.targets}


def _as_pattern(text: str) -> str:
    """Expand the name of a target: gate_up[3,7] is layers/experts[3,7]/gate_up_weight."""
    name, bracket, inside = text.partition("[")
    if name not in names():
        return text
    path, chosen = names()[name], bracket + inside
    return path.replace("experts", f"experts{chosen}") if "experts" in path else path + chosen


def adapted(config: ModelConfig) -> list[str]:
    """Return the paths of the weights that get an adapter, in the order of `adaptable`.

    Raises:
        UserError: a target names nothing that can be adapted, or the rank is larger than a side of
            a target's weight.
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


def selected(config: ModelConfig) -> dict[str, Bool[np.ndarray, "..."]]:
    """Return path -> a mask of what the targets select of each weight that can be adapted.

    The mask broadcasts to the weight: it can be False for layers and for experts. Of experts
    chosen by load ([top4]), which is not known here, it has the right number, and not which.
    """
    leaves = {
        path: jax.ShapeDtypeStruct(
            (config.num_layers,) * table.row(path).in_layers + table.row(path).shape(config),
            jnp.float32,
        )
        for path in adaptable()
    }
    if not config.lora.targets:
        return {path: np.zeros((1,) * leaf.ndim, bool) for path, leaf in leaves.items()}
    load = np.ones((config.num_layers, config.num_experts))
    return patterns.selected("model.lora.targets", target_patterns(config), leaves, load=load)


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
    """Make `params["lora"]`: B is zero, so that adapters add nothing yet, and A is normal.

    A's standard deviation is 1 / sqrt(inputs), so that x A has the variance of x. For the
    embedding, whose input is one of V ids, it is 1. Adapters are float32 whatever the model's
    dtype: they are small, bfloat16 loses an update of 1e-3 of a value, and the optimizer would keep
    a float32 copy anyway.
    """
    flat: dict[str, Array] = {}
    for path, shape in shapes(config).items():
        key, own = jax.random.split(key)
        row = table.row(path)
        sizes = row.all_sizes(config) | {"F": config.d_expert, "V": 1}
        std = 1 / math.sqrt(math.prod(sizes[x] for x in row.inputs))
        # Draw without the padding of F, so that A is the same on any mesh; the padding is zero.
        pads = [(0, config.expert_padding if x == "F" else 0) for x in row.adapter("a")[0]]
        real: Any = [n - pad for n, (_, pad) in zip(shape.a, pads, strict=True)]
        flat[f"{path}/a"] = jnp.pad(std * jax.random.normal(own, real, jnp.float32), pads)
        flat[f"{path}/b"] = jnp.zeros(shape.b, jnp.float32)
    return nest(flat)


def add(model: ModelConfig, params: Params, *, seed: int = 0) -> Params:
    """Add new adapters to `params`, if the model has adapters and `params` has none.

    At first the adapted model is the same function. The same seed gives the same adapters.

    Raises:
        UserError: `params` has adapters other than the model's.
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
    """Return `params["layers"]` with each module's adapters added under the name `lora`.

    Without `params["lora"]` there are no adapters, whatever the model's config says.
    """
    own = params.get("lora", {}).get("layers", {})
    return {
        name: {**module, "lora": own[name]} if name in own else module
        for name, module in params["layers"].items()
    }


def switched_off(params: Params) -> Params:
    """Return the parameters of the reference, the model without its adapters, inside a jit.

    Adapters stay where they are, and their B is zero. So the reference and the adapted model are
    the same operations on arrays of the same sharding, and XLA gives them the same kernels: without
    adapters it would add a bias in another kernel, for example. XLA does not see that B is zero.
    Adapters of a user's own kind, which are not A and B, are left out.
    """
    flat = flatten(params.get(ROOT, {}))
    if not all(path.endswith(("/a", "/b")) for path in flat):
        return {name: child for name, child in params.items() if name != ROOT}
    on = jax.lax.optimization_barrier(jnp.zeros((), bool))
    off = {k: jnp.where(on, x, 0) if k.endswith("/b") else x for k, x in flat.items()}
    return {**params, ROOT: nest(off)} if flat else params


def adapter(module: nn.Module, name: str, scale: float) -> LowRank | None:
    """Return the adapter of a weight in a layer's module, with B scaled; None without one."""
    if not module.has_variable("params", "lora"):
        return None
    return scaled(module.get_variable("params", "lora"), name, scale)


def scaled(adapters: Params, name: str, scale: float) -> LowRank | None:
    """Return the adapter of that name, with B scaled; None if there is none."""
    if name not in adapters:
        return None
    own = adapters[name]
    return LowRank(own["a"], own["b"]).times(scale)


def of_table(params: Any, name: str, model: Any) -> LowRank | None:
    """Return the adapter of the embedding or unembedding, with B scaled; None without one."""
    own = params.get("lora", {}).get(name, {})
    return scaled(own, "weight", model.config.lora.scale) if own else None
