"""Where PEFT keeps the adapter of each weight, and how A and B are arranged there.

A module has A as [r, inputs] and B as [outputs, r]. Their names contain the module's name:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight             q, k, v, o
    base_model.model.model.layers.3.mlp.router.lora_A.weight                   router
    base_model.model.model.layers.3.mlp.experts.lora_A.weight                  down, or gate_up
    base_model.model.model.layers.3.mlp.experts.base_layer.lora_A.weight       gate_up beside down
    base_model.model.lm_head.lora_A.weight                                     unembedding

In transformers the weights of the router and of the experts are bare parameters, so PEFT's config
names them in `target_parameters` (PEFT 0.17 and later; `ParamWrapper` in its tuners/lora/layer.py).
Two parameters of one module are wrapped one inside the other: gate_up, declared first, is inside.

A stack of E experts is one parameter [E, inputs, outputs]. Its A is [E r, inputs], where all ranks
of an expert follow one another. Its B is [outputs, r E], where the expert changes fastest. Outputs
of gate_up alternate between gate and up, as in transformers' weights.

PEFT 0.19.1 and later take the parameter as [E, outputs, inputs] where transformers' module does not
say `is_transposed` (transformers 4). What they call A and B are then B and A: "mirrored".
"""

from __future__ import annotations

import math

import numpy as np

from gptoss_jax.config import ModelConfig
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.parameters import table

_EXPERTS = "model.layers.{n}.mlp.experts"
_GATE_UP, _DOWN = "layers/experts/gate_up_weight", "layers/experts/down_weight"
_PARAMETERS = ("layers/router/weight", _GATE_UP, _DOWN)


def names() -> dict[str, str]:
    """Return weight -> the name by which PEFT's config knows it, with {n} for the layer.

    It is the name of a module, or of a parameter (`is_parameter`). Weights that PEFT's layout has
    no place for, or another one, are not in it: the embedding.
    """
    found = {}
    for path in lora_adapters.adaptable():
        name = table.row(path).tensor("hf") or ""
        if is_parameter(path):
            found[path] = name
        elif name.endswith(".weight") and not table.row(path).lookup:
            found[path] = name.removesuffix(".weight")
    return found


def is_parameter(path: str) -> bool:
    """Return whether PEFT adapts the weight as a parameter of a module, not as a module."""
    return path in _PARAMETERS


def is_stack(path: str) -> bool:
    """Return whether the weight is a stack of experts."""
    return path in (_GATE_UP, _DOWN)


def module(path: str, layer: int | None, *, both: bool = False) -> str:
    """Return the module that holds PEFT's A and B of a weight.

    `both` says whether gate_up and down are both adapted in this layer.
    """
    if is_stack(path):
        return _EXPERTS.format(n=layer) + (".base_layer" if both and path == _GATE_UP else "")
    name = names()[path].format(n=layer)
    return name.rpartition(".")[0] if is_parameter(path) else name


def to_peft(path: str, part: str, leaf: np.ndarray) -> np.ndarray:
    """Return A (`part` "a") or B ("b") of one layer in PEFT's arrangement: see the module."""
    if is_stack(path):  # a [E, inputs, r], b [E, r, *outputs]
        ranks_first = leaf.swapaxes(1, 2).reshape(-1, leaf.shape[1])
        flat = ranks_first if part == "a" else leaf.T.reshape(-1, leaf.shape[1] * leaf.shape[0])
    elif part == "a":  # [*inputs, r]
        flat = leaf.reshape(-1, leaf.shape[-1]).T
    else:  # [r, *outputs]
        flat = leaf.reshape(leaf.shape[0], -1).T
    return np.ascontiguousarray(flat)


def from_peft(
    path: str, a: np.ndarray, b: np.ndarray, model: ModelConfig, *, mirrored: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Return A and B of one layer in our arrangement, from PEFT's: see `to_peft`.

    The rank is the pair's own. `mirrored`: see the module.
    """
    row = table.row(path)
    size = row.all_sizes(model)
    inputs, outputs = ([size[x] for x in letters] for letters in (row.inputs, row.outputs))
    if not is_stack(path):
        return a.T.reshape(*inputs, -1), b.T.reshape(-1, *outputs)
    count = model.num_experts
    if mirrored:  # b [inputs, r E], a [E r, outputs]; gate and up alternate in the last axis
        own_a = b.reshape(*inputs, -1, count).transpose(2, 0, 1)
        own_b = a.reshape(count, -1, *reversed(outputs))
        return own_a, own_b.swapaxes(2, 3) if len(outputs) > 1 else own_b
    own_a = a.reshape(count, -1, *inputs).swapaxes(1, 2)
    return own_a, b.reshape(*reversed(outputs), -1, count).T


def sides(path: str, model: ModelConfig) -> tuple[int, int]:
    """Return the lengths of a weight's inputs and of its outputs."""
    row = table.row(path)
    size = row.all_sizes(model)
    inputs, outputs = (math.prod(size[x] for x in part) for part in (row.inputs, row.outputs))
    return inputs, outputs


def stacks_of(a: np.ndarray, b: np.ndarray, model: ModelConfig) -> dict[bool, str]:
    """Return mirrored -> the stack of experts that A and B of a module of experts can belong to.

    Their shapes always tell gate_up from down. They do not tell whether they are mirrored where the
    weight is as long as it is wide, as down is in the published models.
    """
    found: dict[bool, str] = {}
    for path in (_GATE_UP, _DOWN):
        inputs, outputs = sides(path, model)
        for mirrored in (False, True):
            if (a.shape[1], b.shape[0]) == ((outputs, inputs) if mirrored else (inputs, outputs)):
                found[mirrored] = path
    return found
