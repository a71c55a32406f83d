from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import small_model

from gptoss_jax import loading, weights
from gptoss_jax.config import Config, DataConfig
from gptoss_jax.errors import UserError
from gptoss_jax.loading import shards
from gptoss_jax.loading.convert import convert
from gptoss_jax.ops import mxfp4
from gptoss_jax.runs import checkpoints
from gptoss_jax.types import TrainState


def train(workdir: Path, model, params, *, steps: tuple[int, ...]) -> None:
    """Write checkpoints as a run does; the parameters of step n are n + 1 times `params`."""
    manager = checkpoints.open_manager(workdir, keep=5)
    config = Config(model=model.config, data=DataConfig(sequence_length=64))
    for step in steps:
        state = TrainState(
            step=jnp.asarray(step),
            params=jax.tree.map(lambda x, n=step: x * (n + 1), params),
            opt_state={"count": jnp.zeros(())},
            rng=jax.random.key(0),
        )
        checkpoints.save(manager, state, config=config, data_state={}, fingerprint={})
    manager.wait_until_finished()
    manager.close()


def same(one, other) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other
    )


def test_a_run_is_loaded_and_exported(tmp_path: Path) -> None:
    model, params = small_model(dtype="float32", param_dtype="float32")
    train(tmp_path / "run", model, params, steps=(1, 2))
    loaded, latest = loading.load(tmp_path / "run", dtype=jnp.float32)
    assert loaded.config == model.config
    same(latest, jax.tree.map(lambda x: x * 3, params))
    _, first = loading.load(tmp_path / "run", dtype=jnp.float32, step=1, split=True)
    assert isinstance(first["layers"]["router"]["bias"], tuple)
    np.testing.assert_array_equal(first["embedding"]["weight"], params["embedding"]["weight"] * 2)
    loaded, half = loading.load(tmp_path / "run")
    assert {x.dtype.name for x in jax.tree.leaves(half)} == {"bfloat16"} == {loaded.config.dtype}
    convert(tmp_path / "run", tmp_path / "hf", to="hf", step=1)
    same(loading.load(tmp_path / "hf", dtype=jnp.float32, split=True)[1], first)
    with pytest.raises(UserError, match="no checkpoint of step 7"):
        loading.load(tmp_path / "run", step=7)


def test_a_run_with_a_capacity_factor_is_loaded_without_one(tmp_path: Path) -> None:
    model, params = small_model(dtype="float32", param_dtype="float32", capacity_factor=1.25)
    train(tmp_path / "run", model, params, steps=(0,))
    loaded, back = loading.load(tmp_path / "run", dtype=jnp.float32)
    assert loaded.config.capacity_factor == 0 and loaded == model.dropless()
    same(back, params)


def test_a_run_that_no_layout_holds_is_loaded_still(tmp_path: Path) -> None:
    model, params = small_model(qk_norm=True, sinks="off", norm="post", layer_pattern="full")
    train(tmp_path / "run", model, params, steps=(0,))
    loaded, back = loading.load(tmp_path / "run", dtype=jnp.float32, experts="mxfp4")
    assert loaded.config.qk_norm and loaded.config.experts == "mxfp4"
    assert back["layers"]["attention"]["q_norm"].dtype == jnp.float32
    assert back["layers"]["experts"]["down_weight"].shape == (3, 5, 32, 64)
    with pytest.raises(UserError, match=r"model.\w+=\w+ can.t be expressed"):
        convert(tmp_path / "run", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


def test_a_name_on_the_hub(tmp_path: Path, monkeypatch) -> None:
    model, params = small_model()
    weights.save(tmp_path / "c", model, params)
    asked = []

    def download(name: str, **options) -> str:
        asked.append((name, options["ignore_patterns"]))
        return str(tmp_path / "c")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert loading.load("openai/gpt-oss-20b")[0].config == model.config
    assert asked == [("openai/gpt-oss-20b", ["original/*", "metal/*"])]

    def refuse(name: str, **options) -> str:
        raise OSError("no network\nat all")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(UserError, match=r"the hub did not give it: no network$"):
        loading.load("openai/gpt-oss-20b")


def test_progress_goes_to_stderr_for_large_checkpoints(tmp_path: Path, monkeypatch, capsys) -> None:
    model, params = small_model()
    weights.save(tmp_path / "c", model, params)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr("gptoss_jax.weights.sources._PROGRESS_FROM", 0)
    loading.load(tmp_path / "c")
    out, err = capsys.readouterr()
    assert out == "" and "loading c" in err
    weights.save(tmp_path / "d", model, params)
    out, err = capsys.readouterr()
    assert out == "" and "writing d" in err


def test_the_device_holds_a_run_once_that_is_loaded_in_another_layout(
    tmp_path: Path, monkeypatch
) -> None:
    model, params = small_model(experts="mxfp4", dtype="float32", param_dtype="float32")
    random = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(random.integers(100, 140, x.shape), x.dtype), params
    )
    train(tmp_path / "run", model, params, steps=(0,))
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    want = jax.tree.map(np.asarray, params)["layers"]["experts"]
    del params
    before = {id(x) for x in jax.live_arrays()}
    write, seen = shards.write, []

    def watched(leaf, piece, at):
        seen.append(sum(x.nbytes for x in jax.live_arrays() if id(x) not in before))
        return write(leaf, piece, at)

    monkeypatch.setattr(shards, "write", watched)
    _, relaid = loading.load(tmp_path / "run", dtype=jnp.float32, layout="planes")
    monkeypatch.undo()
    experts = relaid["layers"]["experts"]
    pieces = max(x.nbytes for x in jax.tree.leaves(experts)) / model.config.num_layers
    assert size <= max(seen) <= size + 2 * pieces
    for name in ("gate_up_weight", "down_weight"):
        assert experts[name].layout == "planes"
        same(mxfp4.restore(experts[name]), want[name])
