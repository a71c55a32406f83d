"""Read and write adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT (Hugging Face's library) keeps two tensors for each adapted module of transformers' model: A as
[rank, inputs] and B as [outputs, rank]. Their names contain the module's name:

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight      q, k, v, o
    base_model.model.model.layers.3.mlp.router.lora_A.weight            router
    base_model.model.lm_head.lora_A.weight                              unembedding

In transformers, the router's weight is a bare parameter, so the config names it in
`target_parameters` (PEFT 0.17 and later). Adapters of experts are not written, because the way PEFT
stores A and B of a stack of experts depends on the versions of PEFT and transformers. Adapters of
the embedding are not written either.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.config import LoRAConfig, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params
from gptoss_jax.weights import config_io, safetensors_io

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Weights that PEFT adapts as a parameter of a module, not as a module.
_PARAMETERS = {"layers/router/weight": "mlp.router.weight"}
# Settings that change the function in other ways than adding A B, or that change the base. Each
# has the value with which it does not.
_PLAIN = {
    "bias": "none", "use_dora": False, "use_qalora": False, "lora_bias": False,
    "fan_in_fan_out": False, "modules_to_save": None, "trainable_token_indices": None,
    "layer_replication": None, "alora_invocation_tokens": None, "velora_config": None,
    "monteclora_config": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
}  # fmt: skip
# Endings of tensors of the base that PEFT saves beside an adapted embedding or lm_head.
_OF_THE_BASE = (".base_layer.weight", ".base_layer.bias")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def _modules() -> dict[str, str]:
    """Return weight -> module of transformers' model, for the weights that PEFT has a place for."""
    names = {path: table.row(path).tensor("hf") or "" for path in lora_adapters.adaptable()}
    return {
        path: name.removesuffix(".weight")
        for path, name in names.items()
        if name.endswith(".weight") and not table.row(path).lookup
    }


def config_of(config: ModelConfig, *, base: str = "") -> dict[str, Any]:
    """Return adapter_config.json; `base` is the name or folder from which PEFT loads the model."""
    paths = lora_adapters.adapted(config)
    _refuse(paths)
    modules = [_modules()[path].rpartition(".")[2] for path in paths if path not in _PARAMETERS]
    return {
        "base_model_name_or_path": base or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": config.lora.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": config.lora.rank,
        "target_modules": modules,
        "target_parameters": [_PARAMETERS[path] for path in paths if path in _PARAMETERS] or None,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.lora.rslora,
    }


def tensors_of(config: ModelConfig, adapters: Params) -> dict[str, np.ndarray]:
    """Return PEFT's tensors by name, in float32.

    Raises:
        UserError: there are adapters of weights that the layout has no place for.
    """
    paths = lora_adapters.adapted(config)
    _refuse(paths)
    leaves = flatten(adapters)
    out: dict[str, np.ndarray] = {}
    for path in paths:
        module, stacked = _modules()[path], table.row(path).in_layers
        for part, letter in (("a", "A"), ("b", "B")):
            stack = np.asarray(leaves[f"{path}/{part}"], np.float32)
            for n, leaf in enumerate(stack if stacked else stack[None]):
                rank = config.lora.rank
                # [*inputs, r] -> [r, inputs]; [r, *outputs] -> [outputs, r]
                flat = leaf.reshape(-1, rank) if part == "a" else leaf.reshape(rank, -1)
                name = f"{_PREFIX}{module.format(n=n)}.lora_{letter}.weight"
                out[name] = np.ascontiguousarray(flat.T)
    return out


def _refuse(paths: list[str]) -> None:
    names = {path: name for name, path in lora_adapters.names().items()}
    for path in paths:
        if path not in _modules():
            raise UserError(
                f"{path} ({names[path]} of model.lora.targets) has adapters that PEFT's layout has "
                "no fixed place for: merge them into the model (--to hf or --to openai), or tune "
                f"only {', '.join(names[p] for p in _modules())}"
            )


def read(folder: str | Path, model: ModelConfig) -> tuple[LoRAConfig, Params]:
    """Read PEFT adapters for a model; return (`model.lora`, `params["lora"]`) with numpy arrays.

    If ranks or scales differ between modules, all get the largest rank, filled up with zeros, and
    one scale. Layers that PEFT did not adapt get zeros and are not among the targets.

    Raises:
        UserError: there is no such folder; the settings go beyond plain LoRA; or tensors are
            missing, are not finite, adapt modules that are not adapted here, or have the shapes of
            another base.
    """
    folder = Path(folder)
    file = folder / CONFIG
    if not file.is_file():
        raise UserError(f"{folder}: no {CONFIG} in it: is it a folder that PEFT saved?")
    raw = config_io.read_json(file)
    _check_config(file, raw)
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder}: no {WEIGHTS} in it: save the adapters as safetensors")
    pairs = _pairs(folder / WEIGHTS, model)
    rank = max(a.shape[0] for a, _ in pairs.values())
    rslora, alpha = bool(raw.get("use_rslora")), _number(file, raw, "lora_alpha")
    config = LoRAConfig(rank=rank, alpha=alpha, rslora=rslora)
    there = {path for path, _ in pairs}
    own_paths = tuple(path for path in lora_adapters.adaptable() if path in there)
    full = dataclasses.replace(config, targets=own_paths)
    shapes = lora_adapters.shapes(dataclasses.replace(model, lora=full, expert_padding=0))
    adapters: dict[str, np.ndarray] = {}
    layers: dict[str, list[int]] = {}
    for (path, n), (a, b) in pairs.items():
        own, its_alpha = a.shape[0], _of_pattern(raw, "alpha_pattern", path, n, alpha)
        its_scale = its_alpha / (own**0.5 if rslora else own)
        for part, x, shape in (("a", a.T, shapes[path].a), ("b", b.T, shapes[path].b)):
            leaf = adapters.setdefault(f"{path}/{part}", np.zeros(shape, np.float32))
            at = leaf if n is None else leaf[n]
            if part == "a":
                at.reshape(-1, rank)[:, :own] = x
            else:
                at.reshape(rank, -1)[:own] = x * np.float32(its_scale / config.scale)
        layers.setdefault(path, []).append(0 if n is None else n)
    order = [path for path in lora_adapters.adaptable() if path in layers]
    targets = [_target(path, sorted(layers[path]), model.num_layers) for path in order]
    leaves = {f"{path}/{part}": adapters[f"{path}/{part}"] for path in order for part in "ab"}
    return dataclasses.replace(config, targets=tuple(targets)), nest(leaves)


def _target(path: str, layers: list[int], count: int) -> str:
    """Return the entry of `model.lora.targets` for a weight in these layers."""
    if not path.startswith("layers/") or len(layers) == count:
        return next(name for name, pattern in lora_adapters.names().items() if pattern == path)
    return path.replace("layers", f"layers[{','.join(map(str, layers))}]", 1)


def _check_config(file: Path, raw: dict[str, Any]) -> None:
    if raw.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {raw.get('peft_type')!r}: only LORA is read")
    for name, plain in _PLAIN.items():
        if raw.get(name, plain) not in (plain, None, [], {}):
            raise UserError(
                f"{file}: {name} is {json.dumps(raw[name])}: only plain LoRA is read "
                f"({name} {json.dumps(plain)}); merge it with PEFT (merge_and_unload) and convert "
                "the whole model"
            )
    begins = str(raw.get("init_lora_weights", "")).lower()
    if begins.startswith(_CHANGES_THE_BASE):
        raise UserError(
            f"{file}: init_lora_weights is {begins!r}, which changes the base too: merge it with "
            "PEFT (merge_and_unload) and convert the whole model"
        )


def _number(file: Path, raw: dict[str, Any], name: str) -> float:
    value = raw.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < np.inf:
        raise UserError(f"{file}: {name} is {value!r}: it must be a positive number")
    return float(value)


def _of_pattern(raw: dict[str, Any], name: str, path: str, n: int | None, default: float) -> float:
    """Return a module's value from PEFT's patterns: that of the first that its name ends in."""
    module = _modules()[path].format(n=n)
    for pattern, value in (raw.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return default


def _pairs(
    file: Path, model: ModelConfig
) -> dict[tuple[str, int | None], tuple[np.ndarray, np.ndarray]]:
    """Return (weight, layer) -> (A, B) in PEFT's shapes, checked against the model's sizes."""
    modules: dict[str, tuple[str, int | None]] = {}
    for path, module in _modules().items():
        layers = range(model.num_layers) if "{n}" in module else [None]
        modules |= {module.format(n=n): (path, n) for n in layers}
    parts: dict[tuple[str, int | None], dict[str, np.ndarray]] = {}
    for name, entry in safetensors_io.read_header(file).items():
        if name.endswith(_OF_THE_BASE):
            continue
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None or match[1] not in modules:
            raise UserError(
                f"{file}: tensor {name!r} adapts nothing that is read here (q, k, v, o, router, "
                f"unembedding of {model.num_layers} layers): is it of another base? Else merge it "
                "with PEFT (merge_and_unload) and convert the whole model"
            )
        where, letter = modules[match[1]], match[2]
        row = table.row(where[0])
        size = row.all_sizes(model)
        side = math.prod(size[x] for x in (row.inputs if letter == "A" else row.outputs))
        axis = 1 if letter == "A" else 0
        if len(entry.shape) != 2 or entry.shape[axis] != side:
            raise UserError(
                f"{file}: tensor {name!r} has shape {list(entry.shape)}, and the model's side is "
                f"{side}: it is of another base"
            )
        x = entry.read_rows(0, entry.shape[0]).astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"{file}: tensor {name!r} has NaN or infinity")
        parts.setdefault(where, {})[letter] = x
    if not parts:
        raise UserError(f"{file}: there are no adapters in it")
    for (path, n), pair in parts.items():
        module = _modules()[path].format(n=n)
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{file}: lora_A and lora_B of {module} are not a pair of one rank")
    return {where: (pair["A"], pair["B"]) for where, pair in parts.items()}
