"""`convert --for PROGRAM` warns of what a program does not serve, and of nothing else."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny_checkpoint as tiny

from gptoss_jax import convert
from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError
from gptoss_jax.weights import serving

PUBLISHED = ModelConfig()
YARN, AMX = "truncate", "AMX"
CASES = [
    # Changes of the published model, its layout and experts; then what each program is told.
    ({}, "hf", "mxfp4", {"vllm": [AMX], "llama.cpp": [YARN], "mlx": [YARN]}),
    ({}, "hf", "dense", {"vllm": [], "llama.cpp": [YARN], "mlx": [YARN, "MXFP4 only"]}),
    ({"rope_factor": 1.0}, "hf", "mxfp4", {"vllm": [AMX], "llama.cpp": [], "mlx": []}),
    ({"rope_factor": 1.0, "num_layers": 25}, "hf", "mxfp4", {"llama.cpp": [], "mlx": []}),
    ({"layer_pattern": "5:1"}, "hf", "dense",
     {"vllm": ["(here 5:1)"], "llama.cpp": ["(here 5:1)", YARN], "mlx": [YARN, "MXFP4"]}),
    ({"layer_pattern": "bf" * 12}, "hf", "dense", {"vllm": []}),  # the same, spelled out
    ({"layer_pattern": "full"}, "hf", "dense", {"vllm": ["layer_types"]}),
    ({"layer_pattern": "full"}, "hf", "mxfp4", {"mlx": ["needs a banded and a full", YARN]}),
    ({"swiglu_limit": 6.5}, "hf", "dense",
     {"vllm": ["(here 6.5)"], "llama.cpp": ["(here 6.5)", YARN], "mlx": ["6.5", YARN, "MXFP4"]}),
    ({"rms_eps": 1e-6}, "hf", "dense", {"vllm": ["(here 1e-06)"], "llama.cpp": [YARN]}),
    ({"vocab_size": 1024}, "hf", "dense", {"vllm": [], "llama.cpp": ["1024 tokens", YARN]}),
    ({"vocab_size": 200_019}, "hf", "dense", {"llama.cpp": [YARN]}),  # trimmed, OpenAI's ids
    ({}, "openai", "dense", {"vllm": ["--to hf"], "llama.cpp": ["--to hf", YARN]}),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "layout", "form", "told"), CASES)
def test_each_program_is_warned_of_what_it_does_not_serve(changes, layout, form, told) -> None:
    export = serving.Export(dataclasses.replace(PUBLISHED, **changes), layout, form)
    for program, says in told.items():
        lines = serving.warnings(program, export)
        assert len(lines) == len(says), (program, lines)
        for line, part in zip(lines, says, strict=True):
            assert line.startswith(program) and part in line and "\n" not in line


@pytest.mark.parametrize(
    ("history", "date", "warns"),
    [
        ("harmony", "today", False),
        ("harmony", "record", False),
        ("harmony", "none", True),
        ("harmony", "2031-02-03", True),
        ("template", "today", True),
    ],
)
def test_vllm_writes_prompts_by_rules_of_its_own(history, date, warns) -> None:
    export = serving.Export(PUBLISHED, "hf", "dense", history=history, date=date)
    lines = serving.warnings("vllm", export)
    assert [f"data.date {date} and data.history {history}" in line for line in lines] == [
        True
    ] * warns
    assert not any("data.date" in line for line in serving.warnings("llama.cpp", export))


def test_the_command_warns_and_writes(tmp_path: Path, capsys) -> None:
    assert convert._PROGRAMS == serving.PROGRAMS
    tiny.write(tmp_path / "a", tiny.make_tree(packed=True), "hf")
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--to=hf"]
    convert.main(["--for", "llama.cpp,mlx", *command, "--for", "vllm", "--experts", "bf16"])
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["llama.cpp"] * 2 + ["mlx"] * 3 + ["vllm"]
    assert (tmp_path / "b" / "config.json").is_file()
    for bad in (["--for", "ollama"], ["--to=peft", "--for", "mlx"]):
        with pytest.raises(UserError, match="--for"):
            convert.main([*command, *bad])
