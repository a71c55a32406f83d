"""Which fields of a config.json are passed over, and which are refused: they change the model."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from gptoss_jax.errors import UserError

ARCHITECTURE = "GptOssForCausalLM"
# Rows of the vocabulary that this package cut, in a config.json that it writes. A cut vocabulary
# has Harmony's special tokens at its end, so their ids follow from its size.
CUT_VOCABULARY = "gptoss_jax_cut_vocabulary"
# Models that began as GPT-OSS and are others: why they are not read.
_RELATED = {
    "gpt_oss_puzzle": "its layers have different numbers of experts and different windows",
}
# Fields of which we support one value only.
_FIXED = {
    "model_type": "gpt_oss",
    "hidden_act": "silu",
    "attention_bias": True,
    "attention_dropout": 0,
    "tie_word_embeddings": False,
    "swiglu_alpha": 1.702,
    "is_encoder_decoder": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# Fields that do not change what the model computes.
# fmt: off
_IGNORED = {
    "_name_or_path", "architectures", "auto_map", "bad_words_ids", "bos_token_id",
    "chunk_size_feed_forward", "decoder_start_token_id", "dtype", "eos_token_id",
    "finetuning_task", "id2label", "initializer_range", "is_decoder", "label2id",
    "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "prefix", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id",
    "task_specific_params", "tokenizer_class", "torch_dtype", "transformers_version",
    "model_name", "use_cache",
}
# fmt: on
# Beginnings of fields that programs write to say what they did, in families.
_IGNORED_FAMILIES = ("unsloth_", "_attn_implementation", "_unsloth_", "gptoss_jax_")
_passed_over: ContextVar[frozenset[str]] = ContextVar("passed_over", default=frozenset())


@contextmanager
def ignoring(fields: Collection[str]) -> Iterator[None]:
    """Pass over these unknown fields in every config.json that is read meanwhile.

    A command reads folders in several places (weights, a base, a teacher), and a user names the
    fields once: `--ignore-config`.
    """
    token = _passed_over.set(_passed_over.get() | frozenset(fields))
    try:
        yield
    finally:
        _passed_over.reset(token)


def check_kind(file: Path, raw: dict[str, Any]) -> None:
    """Refuse the config.json of a model that is not GPT-OSS, by what it is. Raises UserError."""
    kind = raw.get("model_type")
    if kind in _RELATED:
        raise UserError(f"{file}: this is a {kind} model: {_RELATED[kind]}, so it is not read")
    if kind != "gpt_oss":
        raise UserError(f"{file}: model_type is {kind!r}: only gpt_oss is read")
    built = raw.get("architectures") or [ARCHITECTURE]
    if ARCHITECTURE not in built and "architectures" not in _passed_over.get():
        raise UserError(
            f"{file}: this is a {' '.join(map(str, built))}, of model_type gpt_oss: only "
            f"{ARCHITECTURE} is read{_to_go_on('architectures')}"
        )


def check_vocabulary(file: Path, raw: dict[str, Any]) -> None:
    """Refuse an embedding that was resized after this package cut its vocabulary.

    The ids of Harmony's special tokens would be taken from the new size, and be wrong. Raises
    UserError.
    """
    cut, rows = raw.get(CUT_VOCABULARY), raw.get("vocab_size")
    if cut is not None and cut != rows:
        raise UserError(
            f"{file}: the vocabulary was cut to {cut} tokens ({CUT_VOCABULARY}), and vocab_size is "
            f"{rows}: the embedding was resized since, and Harmony's special tokens would get "
            f"wrong ids. Resize it to {cut} rows again"
        )


def refuse_unknown(file: Path, raw: dict[str, Any], known: set[str], *, hf: bool) -> None:
    """Refuse fields that are not in `known`, not about the model and not named by `ignoring`.

    `hf`: whether the layout is Hugging Face's. Raises UserError.
    """
    if hf:
        for name, value in _FIXED.items():
            if name in raw and raw.pop(name) != value:
                raise UserError(f"{file}: {name} is not {value!r}, the only value that is computed")
        known = known | {*_FIXED, *_IGNORED}
        raw = {
            name: value
            for name, value in raw.items()
            if name not in _IGNORED and not name.startswith(_IGNORED_FAMILIES)
        }
    for name in raw:
        near = difflib.get_close_matches(name, sorted(known), 1)
        hint = f"did you mean {near[0]}?" if near else "if it changes nothing, remove it"
        refuse_field(file, name, hint=f": {hint}")


def refuse_field(file: Path, name: str, *, shown: str = "", hint: str = "") -> None:
    """Refuse an unknown field, unless `ignoring` names it. Raises UserError."""
    if name not in _passed_over.get():
        raise UserError(f"{file}: unknown field {shown or repr(name)}{hint}{_to_go_on(name)}")


def _to_go_on(name: str) -> str:
    return f" (to pass it over: --ignore-config {name}, or ignore_config in Python)"
