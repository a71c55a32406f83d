"""What fields of the optimizer come to, in whole runs on a model that compiles in seconds."""

from __future__ import annotations

import json
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program
from tiny_training import TINY, write_chats

from gptoss_jax import train
from gptoss_jax.config import command_line
from gptoss_jax.errors import UserError
from gptoss_jax.loading import checkpoint, resume
from gptoss_jax.runs import metrics
from gptoss_jax.training import held_out, setup
from gptoss_jax.training.step import averaged_params

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return [str(write_chats(folder / f"{name}.jsonl", 40, seed=i)) for i, name in enumerate("ab")]


def run(workdir: Path, *options: str) -> Path:
    """Train four steps without evaluating; the last checkpoint is of step 4."""
    few = ["--train.steps", "4", "--train.checkpoint_every", "2", "--init", "random"]
    train.main([*TINY, *few, "--data.held_out", "--workdir", str(workdir), *options])
    return workdir


def losses(workdir: Path) -> list[float]:
    return [r["loss"] for r in metrics.read(workdir) if "loss" in r]


@pytest.mark.slow
def test_experts_chosen_by_load_are_trained_alone_and_stay_the_same(tmp_path, chats, capsys):
    options = ["--data.train", chats[0], "--optimizer.only", "layers[1]/experts[top2]/*"]
    whole = run(tmp_path / "whole", *options)
    shown = capsys.readouterr().out
    load = np.array(json.loads((whole / setup.LOAD_FILE).read_text()))
    top = sorted(np.argsort(-load[1])[:2].tolist())
    assert "2 of 4 experts" in shown, shown

    config = command_line.from_json((whole / "config.json").read_text())
    first = make_program(config, load=load).begin(None).params
    last = checkpoint.load_params(whole)[1]
    chosen = np.zeros((2, 4), bool)
    chosen[1, top] = True
    for name in ("gate_up_weight", "gate_up_bias", "down_weight", "down_bias"):
        before, after = first["layers"]["experts"][name], last["layers"]["experts"][name]
        moved = np.any(np.asarray(before != after).reshape(2, 4, -1), axis=-1)
        np.testing.assert_array_equal(moved, chosen, err_msg=name)
    del first["layers"]["experts"], last["layers"]["experts"]
    chex.assert_trees_all_equal(first, last)

    # Gone on from the middle, where the load would be another one: the file decides.
    half = run(
        tmp_path / "half", *options, "--train.steps", "2", "--optimizer.schedule", "constant"
    )
    full = run(tmp_path / "full", *options, "--optimizer.schedule", "constant")
    run(half, *options, "--optimizer.schedule", "constant")
    assert losses(half) == losses(full)
    (half / setup.LOAD_FILE).write_text("[[1, 2]]")
    with pytest.raises(UserError, match=r"expert_load\.json.*can't be read: its shape is \(1, 2\)"):
        run(half, *options, "--optimizer.schedule", "constant", "--train.steps", "5")


@pytest.mark.slow
def test_averaged_parameters_are_what_is_evaluated(tmp_path, chats, monkeypatch):
    seen = []
    real = held_out.evaluate

    def spy(model, params, batches, **rest):
        seen.append(jax.device_get(params))
        return real(model, params, batches, **rest)

    monkeypatch.setattr(held_out, "evaluate", spy)
    options = [
        "--data.train",
        chats[0],
        "--optimizer.ema",
        "0.5",
        "--model.param_dtype",
        "bfloat16",
    ]
    options += ["--train.eval_questions", "0", "--optimizer.freeze", "embedding/*"]
    workdir = run(tmp_path / "run", *options, "--data.held_out", chats[1])
    config = command_line.from_json((workdir / "config.json").read_text())
    made = make_program(config)
    state, _ = resume.restore(workdir, jax.eval_shape(made.begin, None))
    assert "embedding" not in state.ema
    assert {x.dtype for x in jax.tree.leaves(state.ema)} == {jnp.dtype("float32")}
    average = averaged_params(state)
    chex.assert_trees_all_equal(seen[-1], jax.device_get(average))
    assert np.any(average["unembedding"]["weight"] != state.params["unembedding"]["weight"])
    chex.assert_trees_all_equal(average["embedding"], state.params["embedding"])
    # It is also what a run gives out.
    chex.assert_trees_all_equal(checkpoint.load_params(workdir)[1], average)


@pytest.mark.slow
def test_each_source_of_a_mixture_is_logged(tmp_path, chats):
    options = ["--data.train", f"one={chats[0]}", f"two={chats[1]}", "--data.weights", "3", "1"]
    whole = run(tmp_path / "whole", *options)
    half = run(tmp_path / "half", *options, "--train.steps", "2")
    run(half, *options)
    for workdir in (whole, half):
        records = [r for r in metrics.read(workdir) if "loss" in r]
        tokens = np.array(
            [[r[f"source/{name}/tokens"] for name in ("one", "two")] for r in records]
        )
        assert np.all(np.diff(tokens, axis=0) >= 0)
        assert tokens[-1].sum() == sum(r["tokens"] for r in records)
        assert abs(tokens[-1, 0] / tokens[-1].sum() - 0.75) < 0.15  # of 8 rows
        assert all(r.get("source/one/loss", 5) > 4 for r in records)
    assert losses(whole)[:2] == losses(half)[:2]
    last = [[r for r in metrics.read(w) if "loss" in r][-1] for w in (whole, half)]
    assert last[0]["source/two/tokens"] == last[1]["source/two/tokens"]


def test_patterns_are_checked_before_anything_is_written(tmp_path, chats):
    with pytest.raises(UserError, match=r"optimizer\.freeze has 'embeding/\*'"):
        run(tmp_path / "no", "--data.train", chats[0], "--optimizer.freeze", "embeding/*")
    with pytest.raises(UserError, match=r"train\.balance_bias moves layers/router/bias"):
        run(
            *(tmp_path / "no", "--data.train", chats[0]),
            *("--optimizer.freeze", "layers/router/*", "--train.balance_bias", "0.01"),
        )
    assert not (tmp_path / "no").exists()
