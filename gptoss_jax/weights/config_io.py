"""Convert between config.json of both layouts and ModelConfig; an unknown field is an error.

The Hugging Face layout has the fields of transformers' GptOssConfig. RoPE is `rope_scaling` beside
`rope_theta` (OpenAI published this form, and every server reads it) or `rope_parameters`
(transformers 5). We read both and write the first. The `original/` layout has the sixteen fields of
OpenAI's reference model. `config_fields` says which fields are ignored, because they cannot change
what the model computes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parameters import table
from gptoss_jax.weights import config_fields
from gptoss_jax.weights.names import Form, Layout

# The first release of transformers with gpt_oss, whose form of config.json we write. From a folder
# without a version, transformers 4.57 and later guess that its tokenizer may be Mistral's, with a
# wrong regex, and advise a flag that would change ours.
TRANSFORMERS_VERSION = "4.55.0"
MODULES_NOT_CONVERTED = [
    "model.layers.*.self_attn",
    "model.layers.*.mlp.router",
    "model.embed_tokens",
    "lm_head",
]
_SIZES = {
    "hf": {
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "active_experts",
        "intermediate_size": "d_expert",
        "sliding_window": "window",
        "max_position_embeddings": "context",
    },
    "openai": {
        "vocab_size": "vocab_size",
        "num_hidden_layers": "num_layers",
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_key_value_heads": "num_kv_heads",
        "head_dim": "head_dim",
        "num_experts": "num_experts",
        "experts_per_token": "active_experts",
        "intermediate_size": "d_expert",
        "sliding_window": "window",
        "initial_context_length": "initial_context",
    },
}
_ALIASES = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
_NUMBERS = {
    "hf": {"rms_norm_eps": "rms_eps", "swiglu_limit": "swiglu_limit"},
    "openai": {
        "swiglu_limit": "swiglu_limit",
        "rope_theta": "rope_theta",
        "rope_scaling_factor": "rope_factor",
        "rope_ntk_alpha": "rope_beta_slow",
        "rope_ntk_beta": "rope_beta_fast",
    },
}
_ROPE_HF = {
    "factor": "rope_factor",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "original_max_position_embeddings": "initial_context",
    "rope_theta": "rope_theta",
}


def read_json(file: Path) -> dict[str, Any]:
    """Read a file with a JSON object; raise UserError if it holds none."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: can't be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{file}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file}: is no JSON object")
    return value


def _number(file: Path, name: str, value: Any, *, whole: bool) -> Any:
    good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not good or not math.isfinite(value):
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{file}: {name} is {value!r}: it must be {kind}")
    return value if whole else float(value)


def layout_of(file: Path, raw: dict[str, Any]) -> Layout:
    """Say which layout a config.json belongs to; raise UserError if to neither."""
    if "model_type" in raw:
        config_fields.check_kind(file, raw)
        return "hf"
    if "num_experts" in raw and "experts_per_token" in raw:
        return "openai"
    raise UserError(
        f"{file}: is neither a Hugging Face gpt_oss config (no model_type) nor OpenAI's (no "
        "num_experts and experts_per_token)"
    )


def from_json(file: Path, raw: dict[str, Any]) -> tuple[ModelConfig, Form | None]:
    """Return the config, and the form of the experts that config.json states (None if it doesn't).

    Raises UserError that names the field if a field is missing, is unknown, has the wrong type,
    contradicts another field, or has a value that the model does not support. Unknown fields that
    `config_fields.ignoring` names are passed over.
    """
    layout = layout_of(file, raw)
    values: dict[str, Any] = {}
    raw = dict(raw)
    if layout == "hf":
        config_fields.check_vocabulary(file, raw)
        for alias, name in _ALIASES.items():
            if alias in raw:
                _agree(file, (name, raw.setdefault(name, raw[alias])), (alias, raw.pop(alias)))
    optional = {"sliding_window", "max_position_embeddings", "initial_context_length"}
    for name, ours in _SIZES[layout].items():
        if name in raw:
            values[ours] = _number(file, name, raw.pop(name), whole=True)
        elif name not in optional:
            raise UserError(f"{file}: {name} is missing")
    for name, ours in _NUMBERS[layout].items():
        if name in raw:
            values[ours] = _number(file, name, raw.pop(name), whole=False)
    form: Form | None = None
    if layout == "hf":
        form = "mxfp4" if _quantized(file, raw.pop("quantization_config", None)) else "dense"
        values |= _read_rope(file, raw)
        windows = _read_layer_types(file, raw.pop("layer_types", None), values["num_layers"])
        values["layer_pattern"] = windows
    else:
        factor = values.get("rope_factor", ModelConfig.rope_factor)
        values["context"] = int(values.get("initial_context", 4_096) * factor)
    _refuse_unknown(file, raw, layout)
    try:
        return ModelConfig(**values), form
    except UserError as error:
        raise UserError(f"{file}: {error}") from error


def _agree(file: Path, one: tuple[str, Any], other: tuple[str, Any]) -> None:
    if one[1] != other[1]:
        raise UserError(f"{file}: {one[0]} is {one[1]!r} but {other[0]} is {other[1]!r}")


def _refuse_unknown(file: Path, raw: dict[str, Any], layout: Layout) -> None:
    known = {*_SIZES[layout], *_NUMBERS[layout]}
    if layout == "hf":
        known |= {"layer_types", "rope_scaling", "rope_parameters", "rope_theta"}
        known |= {"quantization_config", "initial_context_length"}
    config_fields.refuse_unknown(file, raw, known, hf=layout == "hf")


def _quantized(file: Path, raw: Any) -> bool:
    if raw is None:
        return False
    if not isinstance(raw, dict) or raw.get("quant_method") != "mxfp4":
        raise UserError(f"{file}: quantization_config: quant_method must be mxfp4")
    kept = raw.get("modules_to_not_convert") or MODULES_NOT_CONVERTED
    if any("experts" in str(name) for name in kept):
        raise UserError(f"{file}: quantization_config.modules_to_not_convert names experts")
    return True


def _read_rope(file: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Take the RoPE fields of a Hugging Face config out of `raw`."""
    blocks = {}
    for name in ("rope_scaling", "rope_parameters"):
        block = raw.pop(name, None)
        if block is not None and not isinstance(block, dict):
            raise UserError(f"{file}: {name} is {block!r}: it must be an object")
        if block is not None:
            blocks[name] = _read_rope_block(file, name, dict(block))
    if len(blocks) == 2:
        one, other = blocks["rope_scaling"], blocks["rope_parameters"]
        for name in one.keys() & other.keys():
            _agree(
                file,
                (f"rope_scaling: {name}", one[name]),
                (f"rope_parameters: {name}", other[name]),
            )
    values: dict[str, Any] = {"rope_factor": 1.0}
    for block in blocks.values():
        values |= block
    for name, ours in (("rope_theta", "rope_theta"), ("initial_context_length", "initial_context")):
        if name in raw:
            value = _number(file, name, raw.pop(name), whole=ours == "initial_context")
            _agree(file, (name, value), (f"{name} in its RoPE block", values.get(ours, value)))
            values[ours] = value
    return values


def _read_rope_block(file: Path, where: str, block: dict[str, Any]) -> dict[str, Any]:
    kinds = {block.pop(name) for name in ("rope_type", "type") if name in block}
    if len(kinds) != 1 or (kind := kinds.pop()) not in ("yarn", "default"):
        raise UserError(f"{file}: {where}.rope_type must be yarn or default")
    values: dict[str, Any] = {}
    for name, ours in _ROPE_HF.items():
        if block.get(name) is not None:
            whole = ours == "initial_context"
            values[ours] = _number(file, f"{where}.{name}", block[name], whole=whole)
        block.pop(name, None)
    if kind == "default":
        values["rope_factor"] = 1.0
    elif "rope_factor" not in values:
        raise UserError(f"{file}: {where}.factor is missing")
    # In transformers, a missing value means true: the bounds of the ramp are rounded, which is
    # another model.
    elif block.pop("truncate", True) is not False:
        raise UserError(f"{file}: {where}.truncate must be false: rounded YaRN is not computed")
    factor = block.pop("attention_factor", None)
    usual = 0.1 * math.log(values["rope_factor"]) + 1.0
    if factor is not None and not math.isclose(factor, usual, rel_tol=1e-6):
        raise UserError(f"{file}: {where}.attention_factor is {factor}: only {usual} is computed")
    block.pop("truncate", None)
    for name, value in block.items():
        if value is not None:
            config_fields.refuse_field(file, f"{where}.{name}", shown=f"{where}.{name}")
    return values


def _read_layer_types(file: Path, types: Any, num_layers: int) -> str:
    if types is None:
        return "1:1"
    letters = {"sliding_attention": "b", "full_attention": "f"}
    if not isinstance(types, list) or len(types) != num_layers:
        raise UserError(f"{file}: layer_types must list {num_layers} layers (num_hidden_layers)")
    for kind in types:
        if kind not in letters:
            raise UserError(
                f"{file}: layer_types has {kind!r}: a layer is sliding_attention or full_attention"
            )
    pattern = "".join(letters[kind] for kind in types)
    if pattern == ("bf" * num_layers)[:num_layers]:
        return "1:1"
    if len(set(pattern)) == 1:
        return {"b": "banded", "f": "full"}[pattern[0]]
    return pattern


def refuse_inexpressible(config: ModelConfig, layout: Layout) -> None:
    """Raise UserError that names the field if `layout` cannot describe the model of `config`.

    Both layouts mean learned sinks, pre-norm, no QK-norm, and YaRN. (Sinks that are fixed at zero
    are written as zeros and read back as learned sinks: the function is the same.) The Hugging Face
    layout lists the kind of each layer, so it can describe any layer pattern; transformers obeys
    the list, but not every server does. `original/` has no such list: its layers are banded, full,
    banded, ..., with an RMSNorm epsilon of 1e-5.
    """
    where = {"hf": "the Hugging Face layout", "openai": "OpenAI's layout"}[layout]
    for name, usual in (("norm", "pre"), ("qk_norm", False)):
        value = getattr(config, name)
        if value != usual:
            raise UserError(f"model.{name}={value} can't be expressed in {where}")
    if config.sinks == "off":
        raise UserError(f"model.sinks=off can't be expressed in {where}: every head has a sink")
    for row in table.rows(config):
        if row.tensor(layout) is None:
            raise UserError(
                f"{row.path} can't be expressed in {where}: its row in the table of parameters "
                "names no tensor there"
            )
    if layout == "hf":
        return
    alternating = tuple(config.window if n % 2 == 0 else None for n in range(config.num_layers))
    if config.layer_windows != alternating:
        raise UserError(
            f"model.layer_pattern={config.layer_pattern} can't be expressed in {where}: its layers "
            "alternate; convert to hf"
        )
    if config.rms_eps != 1e-5:
        raise UserError(
            f"model.rms_eps={config.rms_eps} can't be expressed in {where}: it has 1e-5"
        )


def to_json(config: ModelConfig, layout: Layout, *, form: Form, dtype: str) -> dict[str, Any]:
    """Return the config.json of `config` in `layout`, for experts in `form` and floats in `dtype`.

    Raises UserError as `refuse_inexpressible` does.
    """
    refuse_inexpressible(config, layout)
    raw: dict[str, Any] = {name: getattr(config, ours) for name, ours in _SIZES[layout].items()}
    if layout == "openai":
        raw |= {name: getattr(config, ours) for name, ours in _NUMBERS["openai"].items()}
        raw["rope_scaling_factor"] = config.yarn_factor
        return raw
    end = special_ids(config.vocab_size)
    raw |= {
        "architectures": [config_fields.ARCHITECTURE],
        "model_type": "gpt_oss",
        "hidden_act": "silu",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.rms_eps,
        "swiglu_limit": config.swiglu_limit,
        "layer_types": [
            "full_attention" if window is None else "sliding_attention"
            for window in config.layer_windows
        ],
        "initial_context_length": config.initial_context,
        "rope_theta": config.rope_theta,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": config.yarn_factor,
            "beta_fast": config.rope_beta_fast,
            "beta_slow": config.rope_beta_slow,
            "original_max_position_embeddings": config.initial_context,
            "truncate": False,
        },
        "eos_token_id": end.get("return"),
        "pad_token_id": end.get("endoftext"),
        "output_router_logits": False,
        "use_cache": True,
        "torch_dtype": dtype,
        "transformers_version": TRANSFORMERS_VERSION,
    }
    if is_cut(config.vocab_size):
        raw[config_fields.CUT_VOCABULARY] = config.vocab_size
    return with_form(raw, form)


def with_form(raw: dict[str, Any], form: Form) -> dict[str, Any]:
    """Return a Hugging Face config.json changed to say that the experts are stored in `form`."""
    raw = {name: value for name, value in raw.items() if name != "quantization_config"}
    if form == "mxfp4":
        kept = list(MODULES_NOT_CONVERTED)
        raw["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    return dict(sorted(raw.items()))


def is_cut(vocab_size: int) -> bool:
    """Say whether a vocabulary of this size is a cut one, with special tokens at its end."""
    from gptoss_jax.harmony import tokenizer

    return tokenizer.MIN_VOCAB_SIZE <= vocab_size <= tokenizer.LAST_HARMONY_ID


def special_ids(vocab_size: int) -> dict[str, int]:
    """Return the ids of the tokens that begin, end or pad a text; empty if there are none.

    A smaller vocabulary keeps Harmony's special tokens at its end (see `tokenizer`).
    """
    from gptoss_jax.harmony import tokenizer

    if vocab_size < tokenizer.MIN_VOCAB_SIZE:
        return {}
    special = tokenizer.special_tokens(vocab_size)
    names = ("startoftext", "endoftext", "return", "call")
    return {name: special[f"<|{name}|>"] for name in names}


def generation_config(vocab_size: int) -> dict[str, Any]:
    """Return generation_config.json: sample, and stop at the ids of `tokenizer.stop_ids`."""
    ids = special_ids(vocab_size)
    return {
        "bos_token_id": ids.get("startoftext"),
        "do_sample": True,
        "eos_token_id": [ids[name] for name in ("return", "endoftext", "call") if name in ids],
        "pad_token_id": ids.get("endoftext"),
    }
