"""Adapters: where they live in the tree, how they begin, and how layers find them.

A weight is adapted by `params["lora"][<the weight's path>]`, which holds `a`, from the weight's
inputs to the rank r, and `b`, from there to its outputs. What is added to the weight is
scale * A B (`LoRAConfig.scale`). The axes of the two, L the stack of layers:

    weight                       its axes     a            b
    layers/attention/q_weight    [L,N,H,D]    [L,D,r]      [L,r,N,H]
    layers/attention/k_weight    [L,K,H,D]    [L,D,r]      [L,r,K,H]
    layers/attention/v_weight    [L,K,H,D]    [L,D,r]      [L,r,K,H]
    layers/attention/o_weight    [L,D,N,H]    [L,N,H,r]    [L,r,D]
    layers/router/weight         [L,E,D]      [L,D,r]      [L,r,E]
    layers/experts/gate_up_weight [L,E,2,F,D] [L,E,D,r]    [L,E,r,2,F]
    layers/experts/down_weight   [L,E,D,F]    [L,E,F,r]    [L,E,r,D]
    embedding/weight             [V,D]        [V,r]        [r,D]
    unembedding/weight           [V,D]        [D,r]        [r,V]

On a mesh the experts' E is over `expert` and their F over `tensor`, as those of what they adapt;
N of q and o is over `tensor`; everything else is small, and the same on all devices.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.ops.lora import LowRank
from gptoss_jax.parameters import patterns
from gptoss_jax.parameters.tree import nest
from gptoss_jax.types import Params


class Axes(NamedTuple):
    """Dimension letters of an adapted weight; `C` is the axis of gate and up, of 2."""

    stack: str  # what `a`, `b` and the weight all begin with
    inputs: str
    outputs: str
    weight: str  # the weight's own, without the stack


AXES: dict[str, Axes] = {
    "layers/attention/q_weight": Axes("L", "D", "NH", "NHD"),
    "layers/attention/k_weight": Axes("L", "D", "KH", "KHD"),
    "layers/attention/v_weight": Axes("L", "D", "KH", "KHD"),
    "layers/attention/o_weight": Axes("L", "NH", "D", "DNH"),
    "layers/router/weight": Axes("L", "D", "E", "ED"),
    "layers/experts/gate_up_weight": Axes("LE", "D", "CF", "CFD"),
    "layers/experts/down_weight": Axes("LE", "F", "D", "DF"),
    "embedding/weight": Axes("", "V", "D", "VD"),
    "unembedding/weight": Axes("", "D", "V", "VD"),
}
# What LoRAConfig.targets may name beside patterns of the paths above.
NAMES: dict[str, str] = {
    "q": "layers/attention/q_weight",
    "k": "layers/attention/k_weight",
    "v": "layers/attention/v_weight",
    "o": "layers/attention/o_weight",
    "attention": "layers/attention/*_weight",
    "gate_up": "layers/experts/gate_up_weight",
    "down": "layers/experts/down_weight",
    "experts": "layers/experts/*_weight",
    "router": "layers/router/weight",
    "embedding": "embedding/weight",
    "unembedding": "unembedding/weight",
}


def target_patterns(config: ModelConfig) -> dict[str, str]:
    """Return the targets as patterns of paths, each with what was written for it."""
    return {_as_pattern(text): text for text in config.lora.targets}


def _as_pattern(text: str) -> str:
    """Spell out a name, as gate_up[3,7]: layers/experts[3,7]/gate_up_weight."""
    name, bracket, inside = text.partition("[")
    if name not in NAMES:
        return text
    path, chosen = NAMES[name], bracket + inside
    return path.replace("experts", f"experts{chosen}") if "experts" in path else path + chosen


def adapted(config: ModelConfig) -> list[str]:
    """Return the paths of the weights that get an adapter, in the order of `AXES`.

    Raises:
        UserError: a target that names nothing that can be adapted, or a rank larger than a side of
            what it adapts.
    """
    known = ", ".join(NAMES)
    paths = patterns.named(
        "model.lora.targets",
        target_patterns(config),
        list(AXES),
        otherwise=f"it names nothing that can be adapted: there are {known}, and patterns of paths",
    )
    sizes = _sizes(config)
    for path in paths:
        axes = AXES[path]
        side = min(math.prod(sizes[x] for x in part) for part in (axes.inputs, axes.outputs))
        if config.lora.rank > side:
            raise UserError(
                f"model.lora.rank is {config.lora.rank}, and {path}, which model.lora.targets "
                f"names, has a side of {side}: choose a smaller rank, or leave it out"
            )
    return paths


def shapes(config: ModelConfig) -> dict[str, LowRank]:
    """Return path -> the shapes of its adapter, for the paths of `adapted`."""
    sizes, rank = _sizes(config), (config.lora.rank,)

    def of(letters: str) -> tuple[int, ...]:
        return tuple(sizes[x] for x in letters)

    found: dict[str, Any] = {}
    for path in adapted(config):
        axes = AXES[path]
        a = of(axes.stack) + of(axes.inputs) + rank
        found[path] = LowRank(a, of(axes.stack) + rank + of(axes.outputs))  # pyright: ignore[reportArgumentType]
    return found


def init(key: Array, config: ModelConfig) -> Params:
    """Make `params["lora"]`: B zeros, so that nothing is adapted yet, and A normal.

    A's standard deviation is 1 / sqrt(inputs), so that x A has the variance of x; of the
    embedding, whose input is one of V, 1. In float32 whatever the model's dtype: they are few,
    an update of 1e-3 of a value is lost in bfloat16, and the optimizer would keep a copy anyway.
    """
    flat: dict[str, Array] = {}
    sizes = _sizes(config) | {"F": config.d_expert, "V": 1}
    for path, shape in shapes(config).items():
        key, own = jax.random.split(key)
        axes = AXES[path]
        std = 1 / math.sqrt(math.prod(sizes[x] for x in axes.inputs))
        # Made without the padding of F, so that it is the same on any mesh; that stays zero.
        letters = axes.stack + axes.inputs + "r"
        pads = [(0, config.expert_padding if x == "F" else 0) for x in letters]
        real: Any = [n - pad for n, (_, pad) in zip(shape.a, pads, strict=True)]
        flat[f"{path}/a"] = jnp.pad(std * jax.random.normal(own, real, jnp.float32), pads)
        flat[f"{path}/b"] = jnp.zeros(shape.b, jnp.float32)
    return nest(flat)


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
    return LowRank(own["a"], own["b"] * scale)


def of_table(params: Any, name: str, model: Any) -> LowRank | None:
    """Return a model's adapter of the embedding or the unembedding; None if it has none."""
    own = params.get("lora", {}).get(name, {})
    return scaled(own, "weight", model.config.lora.scale) if own else None


def _sizes(config: ModelConfig) -> dict[str, int]:
    c = config
    return {
        "L": c.num_layers, "D": c.d_model, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim,
        "E": c.num_experts, "F": c.d_expert + c.expert_padding, "V": c.vocab_size, "C": 2,
    }  # fmt: skip
