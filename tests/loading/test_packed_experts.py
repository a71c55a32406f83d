"""Dense experts are packed to MXFP4 without loss, or only when a user says that rounding is meant.

A loss here is silent: small updates of experts round back to the weights that were tuned.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_checkpoint as tiny
from tiny_training import TINY, write_chats

import gptoss_jax
from gptoss_jax import convert, loading, train
from gptoss_jax.config import (
    Config,
    DataConfig,
    LoRAConfig,
    MeshConfig,
    ModelConfig,
    command_line,
)
from gptoss_jax.errors import UserError
from gptoss_jax.loading import checkpoint
from gptoss_jax.lora import adapters
from gptoss_jax.model import Transformer
from gptoss_jax.ops import mxfp4
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.runs import checkpoints
from gptoss_jax.runs.frozen_base import Base
from gptoss_jax.types import TrainState

MATRICES = ("gate_up_weight", "down_weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Write packed weights, their bf16 export, and that export with one value tuned a little."""
    folder = tmp_path_factory.mktemp("stages")
    tiny.write(folder / "packed", tiny.make_tree(packed=True), "openai")
    convert.main([str(folder / "packed"), str(folder / "bf16"), "--to=hf", "--experts=bf16"])
    model, params = gptoss_jax.load(folder / "bf16")
    down = params["layers"]["experts"]["down_weight"]
    value = down[tiny.L - 1, tiny.E - 1, 3, 5]
    params["layers"]["experts"]["down_weight"] = down.at[tiny.L - 1, tiny.E - 1, 3, 5].set(
        value * 1.02 + 1e-4
    )
    gptoss_jax.save(folder / "tuned", model, params)
    return folder


def random(tree):
    """Return normal numpy arrays of the shapes and dtypes in a tree."""
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: np.asarray(rng.normal(size=x.shape), x.dtype), tree)


def with_adapters(config: ModelConfig, params, *targets: str):
    """Return a model with random adapters of `targets`, and its parameters."""
    config = dataclasses.replace(config, lora=LoRAConfig(targets=targets, rank=2))
    made = jax.eval_shape(lambda: adapters.init(jax.random.key(0), config=config))
    return Transformer(config), {**params, "lora": random(made)} if targets else params


def refused(*ways_out: str, says: str = r"changes [\d.e-]+% of them .* by [\d.e-]+% of their norm"):
    """Expect an error with the share that is lost and each way out."""
    return pytest.raises(UserError, match=".*".join([says, *(re.escape(way) for way in ways_out)]))


@pytest.mark.parametrize("sizes", [None, MeshConfig(data=2)])
def test_one_tuned_value_is_enough_to_refuse(folders: Path, sizes) -> None:
    mesh = None if sizes is None else meshes.make(sizes, jax.devices()[:2])
    with refused("--model.experts dense", "--model.requantise (requantise=True)"):
        gptoss_jax.load(folders / "tuned", mesh, experts="mxfp4")
    _, params = gptoss_jax.load(folders / "tuned", mesh, experts="mxfp4", requantise=True)
    _, kept = gptoss_jax.load(folders / "packed", mesh, jnp.float32, "dense")
    for name in MATRICES:
        got = mxfp4.decode(params["layers"]["experts"][name])
        np.testing.assert_array_equal(got, kept["layers"]["experts"][name])


def test_a_run_finds_its_base_as_it_packed_it(folders: Path) -> None:
    """It was meant, or came before the check; checksums say whether the values are the same."""
    model = dataclasses.replace(loading.read_config(folders / "tuned"), experts="mxfp4")
    base = Base(str(folders / "tuned"), folder=str(folders / "tuned"))
    params = checkpoint._read_base(base, model, folders / "tuned", Transformer)
    assert params["layers"]["experts"]["down_weight"].blocks.dtype == jnp.uint8


def test_what_mxfp4_holds_is_packed_without_a_word(folders: Path, tmp_path: Path) -> None:
    _, want = gptoss_jax.load(folders / "packed", dtype=jnp.float32, experts="dense")
    convert.main([str(folders / "bf16"), str(tmp_path / "again"), "--to=hf", "--experts=mxfp4"])
    for folder in (folders / "bf16", tmp_path / "again"):
        _, params = gptoss_jax.load(folder, experts="mxfp4")
        for name in MATRICES:
            got = mxfp4.decode(params["layers"]["experts"][name])
            np.testing.assert_array_equal(got, want["layers"]["experts"][name])


def test_an_export_is_refused_too_with_and_without_adapters(folders: Path, tmp_path: Path) -> None:
    command = [str(folders / "tuned"), str(tmp_path / "out"), "--to=hf", "--experts=mxfp4"]
    with refused("--experts bf16", "model.qat", "--force (force=True)"):
        convert.main(command)
    model, params = gptoss_jax.load(folders / "tuned", dtype=jnp.float32)
    # The update is so large that most of it survives.
    adapted, params = with_adapters(model.config, params, "experts")
    with refused("--experts bf16", "--force (force=True)"):
        gptoss_jax.save(tmp_path / "out", adapted, params, experts="mxfp4")
    assert not (tmp_path / "out").exists()
    convert.main([*command, "--force"])
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    assert max(tensor["error"] for tensor in report["tensors"]) > 0


def test_the_next_stage_and_its_dry_run_refuse(tmp_path: Path, capsys) -> None:
    chats = write_chats(tmp_path / "a.jsonl", 8)
    args = [*TINY, "--model.num_layers", "1", "--model.layer_pattern", "b"]
    args += ["--data.sequence_length", "192", "--data.train", str(chats), "--data.held_out"]
    model = Transformer(command_line.load(args).model)
    gptoss_jax.save(tmp_path / "tuned", model, random(model.abstract_params()))
    args += ["--init", str(tmp_path / "tuned"), "--model.experts", "mxfp4"]
    args += ["--workdir", str(tmp_path / "run"), "--train.steps", "1"]
    for extra in ([], ["--dry_run"]):
        with refused("--model.experts dense", "--model.requantise"):
            train.main([*args, *extra])
        assert not (tmp_path / "run").exists()
        assert capsys.readouterr().out == ""
    config = command_line.load([*args, "--model.requantise"])
    with jax.set_mesh(meshes.make(config.mesh)) as mesh:
        params = train._load_init(config, mesh, Transformer, step=None)
    assert params["layers"]["experts"]["down_weight"].blocks.dtype == jnp.uint8


@pytest.mark.parametrize(("targets", "lossless"), [(("q",), True), (("down",), False)])
def test_a_run_that_trained_for_mxfp4_is_packed_as_it_computed(
    tmp_path: Path, targets, lossless
) -> None:
    """Unless adapters of experts are added before rounding: packed alone, the base is another."""
    plain, ones = tiny.small_model(dtype="float32", param_dtype="float32", qat=True)
    model, params = with_adapters(plain.config, random(ones), *targets)
    manager = checkpoints.open_manager(tmp_path / "run", keep=1)
    config = Config(model=model.config, data=DataConfig(sequence_length=64))
    params = jax.tree.map(jnp.asarray, params)
    state = TrainState(jnp.asarray(1), params, {"count": jnp.zeros(())}, jax.random.key(0))
    checkpoints.save(manager, state, config=config, data_state={}, fingerprint={})
    manager.close()
    if not lossless:
        with refused("requantise=True"):
            gptoss_jax.load(tmp_path / "run", experts="mxfp4")
        return
    _, packed = gptoss_jax.load(tmp_path / "run", dtype=jnp.float32, experts="mxfp4")
    for name in MATRICES:
        want = mxfp4.encode(params["layers"]["experts"][name], scale_rule="least_error")
        np.testing.assert_array_equal(packed["layers"]["experts"][name].blocks, want.blocks)
