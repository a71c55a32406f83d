from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_checkpoint as tiny

import gptoss_jax
from gptoss_jax import convert, loading, train, verify
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.weights import config_fields, config_io

FILE = Path("config.json")

# config.json of gpt-oss-20b as OpenAI published it, in both layouts.
REAL_HF = {
    "architectures": ["GptOssForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "layer_types": ["sliding_attention", "full_attention"] * 12,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": config_io.MODULES_NOT_CONVERTED,
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
    "vocab_size": 201088,
}
REAL_OPENAI = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}


def test_the_published_configs_are_the_default_model() -> None:
    assert config_io.from_json(FILE, REAL_HF) == (ModelConfig(), "mxfp4")
    assert config_io.from_json(FILE, REAL_OPENAI) == (ModelConfig(), None)


def test_what_is_written_says_what_was_published() -> None:
    written = config_io.to_json(ModelConfig(), "openai", form="mxfp4", dtype="bfloat16")
    assert written == REAL_OPENAI
    written = config_io.to_json(ModelConfig(), "hf", form="mxfp4", dtype="bfloat16")
    differs = {"experts_per_token", "router_aux_loss_coef", "transformers_version"}
    assert written.pop("torch_dtype") == "bfloat16"
    # Without a version below 4.57.3, transformers takes the tokenizer for a wrong one of Mistral's.
    assert written.pop("transformers_version") == "4.55.0"
    assert written == {name: x for name, x in REAL_HF.items() if name not in differs}


def test_rope_parameters_of_transformers_5() -> None:
    raw = dict(tiny.HF_CONFIG)
    block = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    config, form = config_io.from_json(FILE, raw | {"rope_parameters": block})
    assert form == "dense"
    assert config == config_io.from_json(FILE, tiny.HF_CONFIG)[0]
    default = {"rope_type": "default", "rope_theta": 5_000.0}
    config, _ = config_io.from_json(FILE, raw | {"rope_parameters": default})
    assert (config.rope_theta, config.yarn_factor) == (5_000.0, 1.0)


def test_layer_types_are_obeyed() -> None:
    b, f = "sliding_attention", "full_attention"
    for kinds, pattern in (([f, f, b, f], "ffbf"), ([b] * 4, "banded"), ([b, f] * 2, "1:1")):
        config, _ = config_io.from_json(FILE, tiny.HF_CONFIG | {"layer_types": kinds})
        assert config.layer_pattern == pattern
        assert config.layer_windows == tuple(tiny.W if kind == b else None for kind in kinds)
        assert config_io.to_json(config, "hf", form="dense", dtype="float32")["layer_types"] == (
            kinds
        )


def test_what_tools_write_about_themselves_is_passed_over() -> None:
    said = {
        "unsloth_version": "2026.1",
        "unsloth_fixed": True,
        "model_name": "unsloth/gpt-oss-20b",
        "_attn_implementation_autoset": True,
    }
    assert config_io.from_json(FILE, tiny.HF_CONFIG | said) == config_io.from_json(
        FILE, tiny.HF_CONFIG
    )


@pytest.mark.parametrize("experts", [24, 25, 28])
def test_other_numbers_of_experts_are_read(tmp_path: Path, experts: int) -> None:
    """Pruned models have them: their weights are written, read and packed."""
    config = dataclasses.replace(tiny.small_model()[0].config, num_experts=experts, num_layers=1)
    model = Transformer(config)
    shapes = model.abstract_params()
    params = jax.tree.map(lambda x: np.arange(x.size).reshape(x.shape).astype(x.dtype), shapes)
    gptoss_jax.save(tmp_path / "hf", model, params)
    read, back = gptoss_jax.load(tmp_path / "hf")
    assert read.config.num_experts == experts
    jax.tree.map(np.testing.assert_array_equal, back, params)


def rope(**fields) -> dict:
    return {"rope_scaling": tiny.ROPE | fields}


BAD = [
    ("hf", {"num_hidden_layer": 4}, "unknown field 'num_hidden_layer': did you mean num_hidden_"),
    ("hf", {"zzz": 4}, "unknown field 'zzz': if it changes nothing, remove it"),
    ("hf", {"model_type": "llama"}, "model_type is 'llama'"),
    (
        "hf",
        {"model_type": "gpt_oss_puzzle", "block_configs": []},
        "this is a gpt_oss_puzzle model: ",
    ),
    ("hf", {"architectures": ["GptOssForTokenClassification"]}, "this is a GptOssForTokenClassif"),
    ("hf", {"gptoss_jax_cut_vocabulary": 90}, "the vocabulary was cut to 90 tokens"),
    ("hf", {"hidden_size": "64"}, "hidden_size is '64': it must be a whole number"),
    ("hf", {"hidden_size": True}, "hidden_size is True: it must be a whole number"),
    ("hf", {"rms_norm_eps": None}, "rms_norm_eps is None: it must be a number"),
    ("hf", {"experts_per_token": 4}, "num_experts_per_tok is 3 but experts_per_token is 4"),
    ("hf", {"layer_types": ["full_attention"] * 3}, "layer_types must list 4 layers"),
    ("hf", {"layer_types": ["chunked"] * 4}, "layer_types has 'chunked'"),
    ("hf", {"hidden_act": "gelu"}, "hidden_act is not 'silu'"),
    ("hf", {"swiglu_alpha": 1.5}, "swiglu_alpha is not 1.702"),
    ("hf", {"attention_bias": False}, "attention_bias is not True"),
    ("hf", {"tie_word_embeddings": True}, "tie_word_embeddings is not False"),
    ("hf", {"quantization_config": {"quant_method": "fp8"}}, "quant_method must be mxfp4"),
    ("hf", {"initial_context_length": 999}, "initial_context_length is 999 but"),
    ("hf", rope(truncate=True), "rope_scaling.truncate must be false"),
    ("hf", rope(rope_type="linear"), "rope_scaling.rope_type must be yarn or default"),
    ("hf", rope(attention_factor=1.0), "rope_scaling.attention_factor is 1.0: only"),
    ("hf", rope(mscale=1.0), "unknown field rope_scaling.mscale"),
    ("hf", rope(factor="x"), "rope_scaling.factor is 'x'"),
    ("hf", {"rope_parameters": tiny.ROPE | {"factor": 4.0}}, "rope_scaling: rope_factor is 8.0"),
    ("hf", {"num_attention_heads": 7}, "model.num_heads (7) is no multiple"),
    ("openai", {"rope_ntk_gamma": 1}, "unknown field 'rope_ntk_gamma': did you mean rope_ntk_"),
    ("openai", {"head_dim": 9.5}, "head_dim is 9.5"),
    ("openai", {"experts_per_token": 6}, "model.active_experts (6) is more than"),
]


@pytest.mark.parametrize(("layout", "edit", "expected"), BAD, ids=[case[2] for case in BAD])
def test_a_bad_field_is_named(layout, edit, expected: str) -> None:
    raw = (tiny.HF_CONFIG if layout == "hf" else tiny.OPENAI_CONFIG) | edit
    with pytest.raises(UserError) as caught:
        config_io.from_json(FILE, raw)
    text = str(caught.value)
    assert text.startswith("config.json: ") and expected in text and "\n" not in text


@pytest.mark.parametrize(
    ("layout", "edit"),
    [
        ("hf", {"zzz": 4}),
        ("hf", {"num_hidden_layer": 4}),
        ("hf", rope(mscale=1.0)),
        ("hf", {"architectures": ["MyGptOss"]}),
        ("openai", {"zzz": {"a": 1}}),
    ],
)
def test_a_field_that_no_one_knows_is_passed_over_if_the_user_says_so(layout, edit) -> None:
    raw = tiny.HF_CONFIG if layout == "hf" else tiny.OPENAI_CONFIG
    with pytest.raises(UserError, match="to pass it over: --ignore-config") as caught:
        config_io.from_json(FILE, raw | edit)
    said = re.search(r"--ignore-config ([\w.]+)", str(caught.value))
    assert said is not None
    with config_fields.ignoring(["another", said[1]]):
        assert config_io.from_json(FILE, raw | edit) == config_io.from_json(FILE, raw)
    with pytest.raises(UserError), config_fields.ignoring([said[1]]):
        config_io.from_json(FILE, raw | edit | {"hidden_size": "64", "hidden_act": "gelu"})


def test_every_command_takes_fields_to_pass_over(tmp_path: Path, monkeypatch) -> None:
    tiny.write(tmp_path / "hf", tiny.make_tree(packed=True), "hf")
    file = tmp_path / "hf" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"zzz": 1, "yyy": 2}))
    fields = ["--ignore-config", "zzz", "--ignore-config", "yyy"]
    command = [str(tmp_path / "hf"), str(tmp_path / "out"), "--to=openai"]
    with pytest.raises(UserError, match="unknown field 'yyy'"):
        convert.main([*command, *fields[:2]])
    convert.main([*command, *fields])
    read, _ = loading.load(tmp_path / "hf", ignore_config=("zzz", "yyy"))
    assert read == loading.load(tmp_path / "out")[0]
    with pytest.raises(UserError, match="this is neither"):  # it has been read
        verify.main(["--checkpoint", str(tmp_path / "hf"), *fields])
    seen = []
    monkeypatch.setattr(
        train, "run", lambda *_, **__: seen.append(loading.read_config(file.parent))
    )
    args = ["--config", "tiny", "--workdir", str(tmp_path / "run"), "--ignore-config", "zzz", "yyy"]
    train.main(args)
    assert seen == [read.config]


@pytest.mark.parametrize("size", [288, 1_024, 200_012, 200_013, 200_019, 201_088])
def test_a_cut_vocabulary_says_so_and_a_resized_one_is_refused(size: int) -> None:
    config = ModelConfig(vocab_size=size)
    written = config_io.to_json(config, "hf", form="mxfp4", dtype="bfloat16")
    cut = size <= 200_012
    assert written.get(config_fields.CUT_VOCABULARY) == (size if cut else None)
    assert config_io.from_json(FILE, written)[0].vocab_size == size
    # transformers' resize_token_embeddings, to a multiple of 64 or to OpenAI's size.
    for rows in (size + 64, 201_152):
        resized = written | {"vocab_size": rows}
        if not cut:
            assert config_io.from_json(FILE, resized)[0].vocab_size == rows
            continue
        with pytest.raises(UserError, match=f"Resize it to {size} rows again"):
            config_io.from_json(FILE, resized)


@pytest.mark.parametrize("layout", ["hf", "openai"])
def test_a_missing_size_is_named(layout) -> None:
    raw = dict(tiny.HF_CONFIG if layout == "hf" else tiny.OPENAI_CONFIG)
    del raw["hidden_size"]
    with pytest.raises(UserError, match="hidden_size is missing"):
        config_io.from_json(FILE, raw)
    with pytest.raises(UserError, match="truncate must be false"):  # its default is true
        block = {name: x for name, x in tiny.ROPE.items() if name != "truncate"}
        config_io.from_json(FILE, tiny.HF_CONFIG | {"rope_scaling": block})


def test_files_that_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    for text, expected in (("{", "is no JSON"), ("[]", "is no JSON object")):
        file.write_text(text)
        with pytest.raises(UserError, match=expected):
            config_io.read_json(file)
    with pytest.raises(UserError, match="can't be read"):
        config_io.read_json(tmp_path / "nothing")
    with pytest.raises(UserError, match="is neither a Hugging Face gpt_oss config"):
        config_io.layout_of(file, json.loads("{}"))
