"""Read and write adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

PEFT (Hugging Face's library) keeps two tensors for each adapted module or parameter of
transformers' model: see `peft_layout`. Adapters of the embedding are not read or written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.config import LoRAConfig, ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters as lora_adapters
from gptoss_jax.parameters import table
from gptoss_jax.parameters.tree import flatten, nest
from gptoss_jax.types import Params
from gptoss_jax.weights import config_io, peft_layout, safetensors_io

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that change the function in other ways than adding A B, or that change the base. Each
# has the value with which it does not.
_PLAIN = {
    "bias": "none", "use_dora": False, "use_qalora": False, "lora_bias": False,
    "fan_in_fan_out": False, "modules_to_save": None, "trainable_token_indices": None,
    "layer_replication": None, "alora_invocation_tokens": None, "velora_config": None,
    "monteclora_config": None, "use_bdlora": None, "arrow_config": None, "kasa_config": None,
}  # fmt: skip
# Tensors of the base that PEFT saves beside an adapted embedding or lm_head.
_OF_THE_BASE = re.compile(r".+\.(lm_head|embed_tokens)\.base_layer\.weight")
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def config_of(config: ModelConfig, *, base: str = "") -> dict[str, Any]:
    """Return adapter_config.json; `base` is the name or folder from which PEFT loads the model.

    Raises:
        UserError: there are adapters of weights that the layout has no place for.
    """
    layers = _adapted_layers(config)
    modules: list[str] = []
    parameters: list[str] = []
    for path, chosen in layers.items():
        names = parameters if peft_layout.is_parameter(path) else modules
        names += _config_names(path, chosen, config)
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
        "target_parameters": parameters or None,
        "task_type": "CAUSAL_LM",
        "use_rslora": config.lora.rslora,
    }


def tensors_of(config: ModelConfig, adapters: Params) -> dict[str, np.ndarray]:
    """Return PEFT's tensors by name, in float32, of the layers that `model.lora.targets` selects.

    Raises:
        UserError: there are adapters of weights that the layout has no place for.
    """
    leaves = flatten(adapters)
    layers = _adapted_layers(config)
    stacks = [of for path, of in layers.items() if peft_layout.is_stack(path)]
    out: dict[str, np.ndarray] = {}
    for path, chosen in layers.items():
        for part, letter in (("a", "A"), ("b", "B")):
            stack = np.asarray(leaves[f"{path}/{part}"], np.float32)
            for n in chosen:
                both = len(stacks) > 1 and all(n in of for of in stacks)
                module = peft_layout.module(path, n, both=both)
                leaf = stack if n is None else stack[n]
                out[f"{_PREFIX}{module}.lora_{letter}.weight"] = peft_layout.to_peft(
                    path, part, leaf
                )
    return out


def _adapted_layers(config: ModelConfig) -> dict[str, list[int | None]]:
    """Return weight -> the layers in which it has adapters; [None] for one outside the layers."""
    paths = lora_adapters.adapted(config)
    readable = _readable(config)
    for path in paths:
        if path not in readable:
            raise UserError(
                f"{path} ({_target_name(path)} of model.lora.targets) has adapters that PEFT's "
                "layout has no fixed place for: merge them into the model (--to hf or --to "
                f"openai), or tune only {', '.join(map(_target_name, readable))}"
            )
    chosen = lora_adapters.selected(config)
    layers: dict[str, list[int | None]] = {}
    for path in paths:
        layers[path] = [None]
        if table.row(path).in_layers:
            of_layer = chosen[path].any(tuple(range(1, chosen[path].ndim)))
            of_layer = np.broadcast_to(of_layer, config.num_layers)
            layers[path] = [int(n) for n in np.flatnonzero(of_layer)]
    return layers


def _readable(model: ModelConfig) -> list[str]:
    """Return the weights of this model whose adapters PEFT's layout has a place for.

    A stack of one expert is not among them: PEFT takes it for a matrix.
    """
    return [p for p in peft_layout.names() if model.num_experts > 1 or not peft_layout.is_stack(p)]


def _config_names(path: str, layers: list[int | None], config: ModelConfig) -> list[str]:
    """Return the entries of PEFT's target_modules or target_parameters for a weight."""
    name = peft_layout.names()[path]
    if layers != [None] and len(layers) < config.num_layers:
        return [name.removeprefix("model.").format(n=n) for n in layers]
    return [name.rpartition("{n}." if peft_layout.is_parameter(path) else ".")[2]]


def _target_name(path: str) -> str:
    return next(name for name, pattern in lora_adapters.names().items() if pattern == path)


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
    model = dataclasses.replace(model, expert_padding=0)
    pairs = _pairs(folder / WEIGHTS, model)
    rank = max(a.shape[-1] for a, _ in pairs.values())
    rslora, alpha = bool(raw.get("use_rslora")), _number(file, raw, "lora_alpha")
    config = LoRAConfig(rank=rank, alpha=alpha, rslora=rslora)
    there = {path for path, _ in pairs}
    own_paths = tuple(path for path in lora_adapters.adaptable() if path in there)
    full = dataclasses.replace(config, targets=own_paths)
    shapes = lora_adapters.shapes(dataclasses.replace(model, lora=full))
    adapters: dict[str, np.ndarray] = {}
    layers: dict[str, list[int]] = {}
    for (path, n), (a, b) in pairs.items():
        own, its_alpha = a.shape[-1], _of_pattern(raw, "alpha_pattern", path, n, alpha)
        its_scale = its_alpha / (own**0.5 if rslora else own)
        for part, x, shape in (("a", a, shapes[path].a), ("b", b, shapes[path].b)):
            leaf = adapters.setdefault(f"{path}/{part}", np.zeros(shape, np.float32))
            at = leaf if n is None else leaf[n]
            if part == "a":
                at[..., :own] = x
            else:  # the rank follows the experts, if there are any
                ranks = np.s_[:, :own] if peft_layout.is_stack(path) else np.s_[:own]
                at[ranks] = x * np.float32(its_scale / config.scale)
        layers.setdefault(path, []).append(0 if n is None else n)
    order = [path for path in lora_adapters.adaptable() if path in layers]
    targets = [_target(path, sorted(layers[path]), model.num_layers) for path in order]
    leaves = {f"{path}/{part}": adapters[f"{path}/{part}"] for path in order for part in "ab"}
    return dataclasses.replace(config, targets=tuple(targets)), nest(leaves)


def _target(path: str, layers: list[int], count: int) -> str:
    """Return the entry of `model.lora.targets` for a weight in these layers."""
    if not path.startswith("layers/") or len(layers) == count:
        return _target_name(path)
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
    """Return a weight's value from PEFT's patterns: that of the first that its name ends in."""
    name_of_weight = peft_layout.names()[path].format(n=n)
    for pattern, value in (raw.get(name) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name_of_weight):
            return float(value)
    return default


def _pairs(
    file: Path, model: ModelConfig
) -> dict[tuple[str, int | None], tuple[np.ndarray, np.ndarray]]:
    """Return (weight, layer) -> (A, B) in our arrangement, checked against the model's sizes."""
    places: dict[str, tuple[str, int | None]] = {}
    experts: dict[str, int] = {}
    for path in _readable(model):
        row = table.row(path)
        for n in range(model.num_layers) if row.in_layers else [None]:
            if n is not None and peft_layout.is_stack(path):
                experts |= {peft_layout.module(path, n, both=both): n for both in (False, True)}
            else:
                places[peft_layout.module(path, n)] = path, n
    found, of_experts = {}, {}
    for module, (a, b) in _tensors(file, {*places, *experts}, model).items():
        if module in experts:
            of_experts[module] = a, b
            continue
        where = places[module]
        inputs, outputs = peft_layout.sides(where[0], model)
        _check_sides(file, module, a=a, b=b, inputs=inputs, outputs=outputs)
        found[where] = peft_layout.from_peft(where[0], a, b, model)
    return found | _pairs_of_experts(file, of_experts, layers=experts, model=model)


def _pairs_of_experts(
    file: Path,
    tensors: dict[str, tuple[np.ndarray, np.ndarray]],
    *,
    layers: dict[str, int],
    model: ModelConfig,
) -> dict[tuple[str, int | None], tuple[np.ndarray, np.ndarray]]:
    """Return `_pairs` of experts; their shapes say which weight's they are, and if mirrored."""
    stacks = {module: peft_layout.stacks_of(*pair, model) for module, pair in tensors.items()}
    mirrored = any(False not in of for of in stacks.values())
    found = {}
    for module, (a, b) in tensors.items():
        if mirrored not in stacks[module] or a.shape[0] % model.num_experts:
            sizes = ", ".join(
                f"{peft_layout.sides(path, model)} of {_target_name(path)}"
                for path in _readable(model)
                if peft_layout.is_stack(path)
            )
            raise UserError(
                f"{file}: lora_A and lora_B of {module} have shapes {list(a.shape)} and "
                f"{list(b.shape)}, and the model's sides are {sizes}, with ranks for "
                f"{model.num_experts} experts: they are of another base"
            )
        where = stacks[module][mirrored], layers[module]
        if where in found:
            raise UserError(f"{file}: two adapters of {where[0]}, layer {where[1]}")
        found[where] = peft_layout.from_peft(where[0], a, b, model, mirrored=mirrored)
    return found


def _tensors(
    file: Path, modules: Collection[str], model: ModelConfig
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return module -> PEFT's A and B, matrices of one rank, of the modules that are read here."""
    parts: dict[str, dict[str, np.ndarray]] = {}
    for name, entry in safetensors_io.read_header(file).items():
        if _OF_THE_BASE.fullmatch(name):
            table = (model.vocab_size, model.d_model)
            if tuple(entry.shape) != table:
                raise UserError(
                    f"{file}: {name} is {list(entry.shape)}, and the model has {list(table)}: the "
                    "adapters are of a base with another vocabulary"
                )
            continue
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_([AB])(?:\.default)?\.weight", name)
        if match is None or match[1] not in modules:
            names = ", ".join(map(_target_name, _readable(model)))
            raise UserError(
                f"{file}: tensor {name!r} adapts nothing that is read here ({names} of "
                f"{model.num_layers} layers): is it of another base? Else merge it with PEFT "
                "(merge_and_unload) and convert the whole model"
            )
        if len(entry.shape) != 2:
            raise UserError(f"{file}: tensor {name!r} has shape {list(entry.shape)}: no matrix")
        x = entry.read_rows(0, entry.shape[0]).astype(np.float32)
        if not np.isfinite(x).all():
            raise UserError(f"{file}: tensor {name!r} has NaN or infinity")
        parts.setdefault(match[1], {})[match[2]] = x
    if not parts:
        raise UserError(f"{file}: there are no adapters in it")
    for module, pair in parts.items():
        if set(pair) != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
            raise UserError(f"{file}: lora_A and lora_B of {module} are not a pair of one rank")
    return {module: (pair["A"], pair["B"]) for module, pair in parts.items()}


def _check_sides(
    file: Path, module: str, *, a: np.ndarray, b: np.ndarray, inputs: int, outputs: int
) -> None:
    for letter, x, found, side in (("A", a, a.shape[1], inputs), ("B", b, b.shape[0], outputs)):
        if found != side:
            raise UserError(
                f"{file}: tensor '{_PREFIX}{module}.lora_{letter}.weight' has shape "
                f"{list(x.shape)}, and the model's side is {side}: it is of another base"
            )
