"""Checkpoints: what is saved comes back, which are kept, and what is wrong with bad ones."""

from __future__ import annotations

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import checkpoint
from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from gptoss_jax.errors import UserError
from gptoss_jax.optimizer import make_optimizer
from gptoss_jax.train_step import init_state
from gptoss_jax.types import MXFP4, TrainState

CONFIG = Config(name="t", data=DataConfig(train=("a.jsonl",)))
PRINT = {"files": [{"name": "a.jsonl", "size": 3}], "settings": {"train.seed": 0}}


def make_state(step: int = 0) -> TrainState:
    packed = MXFP4(jnp.full((5, 2, 16), 9, jnp.uint8), jnp.full((5, 2), 120, jnp.uint8))
    params = {
        "embedding": {"weight": jnp.arange(21.0).reshape(7, 3)},
        "layers": {"x": {"bias": jnp.ones((3,), jnp.bfloat16), "down_weight": packed}},
    }
    state = init_state(None, make_optimizer(OptimizerConfig(), 5), params, seed=2)
    return state.replace(step=jnp.int32(step))


def save(manager, state, **more):
    defaults = {"config": CONFIG, "data_state": {"row": 3}, "fingerprint": PRINT}
    checkpoint.save(manager, state, **(defaults | more))


@pytest.fixture
def workdir(tmp_path):
    """A run with checkpoints of steps 2 and 4."""
    with checkpoint.open_manager(tmp_path) as manager:
        for step in (2, 4):
            save(manager, make_state(step))
    return tmp_path


def test_what_is_saved_comes_back(workdir):
    want = make_state(4)
    state, record = checkpoint.restore(workdir, make_state(0))
    assert jax.tree.structure(state) == jax.tree.structure(want)
    chex.assert_trees_all_equal(state.params, want.params)
    chex.assert_trees_all_equal(state.opt_state, want.opt_state)
    chex.assert_trees_all_equal_dtypes(state.params, want.params)
    assert int(state.step) == 4
    assert jax.random.uniform(state.rng) == jax.random.uniform(want.rng)
    assert record == checkpoint.Record(4, CONFIG, {"row": 3}, PRINT)
    assert int(checkpoint.restore(workdir, make_state(0), step=2)[0].step) == 2


def test_abstract_states_will_do(workdir):
    abstract = jax.eval_shape(make_state)
    chex.assert_trees_all_equal(
        checkpoint.restore(workdir, abstract)[0].params, make_state().params
    )


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    state = TrainState(jnp.int32(1), {"w": jnp.arange(2e6)}, {"m": jnp.ones(9)}, jax.random.key(0))
    go_on = jax.jit(
        lambda s: s.replace(params=jax.tree.map(lambda p: p * 0 - 1, s.params)), donate_argnums=0
    )
    with checkpoint.open_manager(tmp_path) as manager:
        save(manager, state)
        for _ in range(3):
            state = go_on(state)
    read, _ = checkpoint.restore(tmp_path, state)
    np.testing.assert_array_equal(read.params["w"], np.arange(2e6, dtype=np.float32))


def test_newest_and_best_are_kept(tmp_path):
    losses = [None, 3.0, 2.0, None, 4.0, None, 3.5]
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        for step, loss in enumerate(losses, 1):
            save(manager, make_state(step), held_out_loss=loss)
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    assert checkpoint.best_step(tmp_path) == (3, 2.0)


def test_a_run_killed_while_saving_leaves_the_last_whole_one(workdir):
    broken = workdir / "checkpoints" / "6.orbax-checkpoint-tmp"
    (broken / "params").mkdir(parents=True)
    assert checkpoint.read_record(workdir).step == 4
    with checkpoint.open_manager(workdir) as manager:
        save(manager, make_state(6))
    assert checkpoint.steps(workdir) == [2, 4, 6] and not broken.exists()
    chex.assert_trees_all_equal(
        checkpoint.restore(workdir, make_state())[0].params, make_state().params
    )


def test_missing_checkpoints(tmp_path, workdir):
    with pytest.raises(UserError, match="there is no checkpoint in it"):
        checkpoint.read_record(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no checkpoint of step 3; there are 2, 4"):
        checkpoint.restore(workdir, make_state(), step=3)


@pytest.mark.parametrize("item", ["params", "opt_state"])
def test_arrays_cut_short(workdir, item):
    files = [p for p in (workdir / "checkpoints/4" / item).rglob("d/*") if p.is_file()]
    for file in files:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=f"its {item} is cut short or damaged") as caught:
        checkpoint.restore(workdir, make_state())
    assert "checkpoints/4" in str(caught.value) and "\n" not in str(caught.value)
    assert str(caught.value).endswith("remove that folder to go on from step 2")


def test_missing_items_and_damaged_records(workdir):
    folder = workdir / "checkpoints/4"
    (folder / "params").rename(folder / "gone")
    with pytest.raises(UserError, match="has no params: it is not whole"):
        checkpoint.restore(workdir, make_state())
    record = folder / "record/metadata"
    whole = record.read_text()
    record.write_text(whole[:50])
    with pytest.raises(UserError, match="its record can't be read"):
        checkpoint.read_record(workdir)
    record.write_text(json.dumps(json.loads(whole) | {"schema": 7}))
    with pytest.raises(UserError, match="is of schema 7, this version reads 1"):
        checkpoint.read_record(workdir)
    changed = json.loads(whole)
    changed["config"]["model"]["num_layrs"] = 3
    record.write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"unknown field model.num_layrs; did you mean num_layers"):
        checkpoint.read_record(workdir)


def change(**sections):
    return dataclasses.replace(
        CONFIG,
        **{k: dataclasses.replace(getattr(CONFIG, k), **v) for k, v in sections.items()},
    )


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"num_layers": 3}}, "another model: model.num_layers 24 -> 3"),
        ({"model": {"param_dtype": "float32"}}, "model.param_dtype bfloat16 -> float32"),
        ({"optimizer": {"b2": 0.9}}, "another optimizer: optimizer.b2 0.95 -> 0.9"),
        ({"train": {"z_loss": 0.5}}, "another optimizer: train.z_loss 0.0 -> 0.5"),
        (
            {"model": {"window": 9}, "optimizer": {"eps": 0.5}},
            "another model and optimizer: model.window 128 -> 9, optimizer.eps 1e-08 -> 0.5",
        ),
    ],
)
def test_another_run_is_refused_by_what_differs(sections, message):
    record = checkpoint.Record(4, CONFIG, {}, PRINT)
    with pytest.raises(UserError) as caught:
        checkpoint.check_same_run(record, change(**sections), data_changes=[], workdir="w")
    assert message in str(caught.value) and str(caught.value).startswith("w holds a run of")


def test_data_changes_are_refused_and_the_rest_may_change():
    record = checkpoint.Record(4, CONFIG, {}, PRINT)
    with pytest.raises(UserError, match=r"another data: data file a\.jsonl is gone"):
        checkpoint.check_same_run(
            record, CONFIG, data_changes=["data file a.jsonl is gone"], workdir="w"
        )
    free = change(
        train={"steps": 9, "log_every": 7, "eval_every": 3, "keep": 1, "on_nan": "skip"},
        model={"remat": "full", "layer_pattern": "bf" * 12},
        data={"train": ("/moved/a.jsonl",)},
    )
    checkpoint.check_same_run(record, free, data_changes=[], workdir="w")


def test_load_params_reads_the_model_of_the_run(tmp_path):
    from gptoss_jax.model import Transformer

    config = ModelConfig(
        num_layers=2, d_model=24, num_heads=6, num_kv_heads=2, head_dim=10, num_experts=5,
        active_experts=2, d_expert=14, vocab_size=40, param_dtype="float32",
    )  # fmt: skip
    shapes = Transformer(config).abstract_params()
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), s.dtype), shapes)
    state = TrainState(jnp.int32(3), params, (), jax.random.key(0))
    with checkpoint.open_manager(tmp_path) as manager:
        save(manager, state, config=Config(model=config, train=TrainConfig(steps=3)))
    got, read = checkpoint.load_params(tmp_path)
    assert got == config
    chex.assert_trees_all_equal(read, params)
