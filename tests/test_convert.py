from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_checkpoint as tiny
from safetensors.numpy import load_file

from gptoss_jax import loading
from gptoss_jax.errors import UserError
from gptoss_jax.loading.convert import convert


def same_tensors(folder: Path, expected: dict[str, np.ndarray]) -> None:
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == expected.keys()
    for name, x in found.items():
        assert x.dtype == expected[name].dtype and x.shape == expected[name].shape, name
        assert x.tobytes() == expected[name].tobytes(), name


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("layout", ["hf", "openai"])
def test_to_the_other_layout_and_back(tmp_path: Path, layout, packed) -> None:
    tree = tiny.make_tree(packed=packed, dtype="bfloat16" if packed else "float32")
    tiny.write(tmp_path / "a", tree, layout, shards=3)
    other = "openai" if layout == "hf" else "hf"
    convert(tmp_path / "a", tmp_path / "b", to=other)
    same_tensors(tmp_path / "b", tiny.tensors_of(tree, other))
    convert(tmp_path / "b", tmp_path / "c", to=layout, shard_bytes=100_000)
    same_tensors(tmp_path / "c", tiny.tensors_of(tree, layout))
    assert loading.load(tmp_path / "c")[0] == loading.load(tmp_path / "a")[0]


@pytest.mark.parametrize("layout", ["hf", "openai"])
def test_to_the_same_layout_gives_the_same_files(tmp_path: Path, layout) -> None:
    tiny.write(tmp_path / "a", tiny.make_tree(packed=True), layout)
    extra = {"hf": ("generation_config.json", "tokenizer.json"), "openai": ("dtypes.json",)}
    for name in extra[layout]:
        (tmp_path / "a" / name).write_text('{"x": 1}')
    convert(tmp_path / "a", tmp_path / "b", to=layout)
    files = {p.name: p.read_bytes() for p in (tmp_path / "a").iterdir()}
    assert {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()} == files


def test_experts_decoded_and_encoded(tmp_path: Path) -> None:
    tiny.write(tmp_path / "a", tiny.make_tree(packed=True, dtype="float32"), "hf")
    raw = json.loads((tmp_path / "a" / "config.json").read_text())
    convert(tmp_path / "a", tmp_path / "dense", to="hf", experts="dense")
    edited = json.loads((tmp_path / "dense" / "config.json").read_text())
    raw.pop("quantization_config")
    assert edited == raw
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    assert tensors["model.layers.0.mlp.experts.down_proj"].dtype.name == "bfloat16"
    assert tensors["lm_head.weight"].dtype == np.float32
    convert(tmp_path / "dense", tmp_path / "half", to="hf", dtype="float16")
    halves = load_file(tmp_path / "half" / "model.safetensors").values()
    assert {x.dtype.name for x in halves} == {"float16"}
    said = json.loads((tmp_path / "half" / "config.json").read_text())
    assert said == edited | {"torch_dtype": "float16"}
    convert(tmp_path / "dense", tmp_path / "packed", to="openai", experts="mxfp4")
    _, one = loading.load(tmp_path / "a", experts="dense")
    _, two = loading.load(tmp_path / "packed", experts="dense")
    for name in ("gate_up_weight", "down_weight"):  # other bytes may stand for the same values
        np.testing.assert_array_equal(
            one["layers"]["experts"][name], two["layers"]["experts"][name]
        )


def test_bad_sources_write_nothing(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True)
    tree["layers/router/bias"][2, 1] = np.inf
    tiny.write(tmp_path / "a", tree, "openai")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match=r"'block.2.mlp.gate.bias' has NaN or infinity"):
        convert(tmp_path / "a", tmp_path / "b", to="hf")
    tree = tiny.make_tree(packed=True)
    tree["layers/experts/down_weight.scales"][3, 4, 5, 1] = 255
    tiny.write(tmp_path / "c", tree, "openai")
    before = sorted([*before, tmp_path / "c", *(tmp_path / "c").iterdir()])
    for to in ("hf", "openai"):
        with pytest.raises(UserError, match=r"'block.3.mlp.mlp2_weight.scales' has scale byte 255"):
            convert(tmp_path / "c", tmp_path / "b", to=to)
    with pytest.raises(UserError, match="--step is for workdirs"):
        convert(tmp_path / "c", tmp_path / "b", to="hf", step=3)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_pattern_that_openai_cannot_say(tmp_path: Path) -> None:
    tiny.write(tmp_path / "a", tiny.make_tree(packed=False), "hf")
    file = tmp_path / "a" / "config.json"
    raw = json.loads(file.read_text()) | {"layer_types": ["full_attention"] * tiny.L}
    file.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="layer_pattern=full can't be expressed in OpenAI's"):
        convert(tmp_path / "a", tmp_path / "b", to="openai")
    assert not (tmp_path / "b").exists()


def test_the_command(tmp_path: Path) -> None:
    tree = tiny.make_tree(packed=True)
    tiny.write(tmp_path / "a", tree, "openai")

    def run(*args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "gptoss_jax.convert", *args]
        environment = os.environ | {"JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        return done.returncode, done.stderr

    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    assert run(a, b, "--to", "hf") == (0, "")
    same_tensors(tmp_path / "b", tiny.hf_tensors(tree))
    code, text = run(a, b, "--to", "hf")
    assert code == 2 and text == f"error: {b}: is there already and not empty; give another name\n"
    code, text = run(a, b, "--to", "gguf")
    assert code == 2 and text.startswith("error: argument --to: invalid choice: 'gguf'")
    assert text.count("\n") == 1
