"""What is said of the experts' load, measuring it, and what training does about it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import make_program
from tiny_training import TINY, write_chats

from gptoss_jax import train
from gptoss_jax.config import Config, DataConfig, ModelConfig, OptimizerConfig, command_line
from gptoss_jax.data import eval_batches
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.runs import metrics
from gptoss_jax.training import held_out
from gptoss_jax.training.expert_load import load_stats, measure_load
from gptoss_jax.types import Batch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from experiments import common  # noqa: E402
from gptoss_jax.loading import checkpoint  # noqa: E402

SMALL = ModelConfig(
    vocab_size=53,
    num_layers=3,  # of one kind: they compile as one
    d_model=16,
    num_heads=2,
    num_kv_heads=1,
    head_dim=6,
    num_experts=5,
    active_experts=2,
    d_expert=24,
    layer_pattern="full",
    context=64,
    init_std=0.3,
    dtype="float32",
    param_dtype="float32",
)


def batch(rows: int, length: int, *, seed: int) -> Batch:
    """Random tokens, all of them trained; the last row ends in padding, of another length each."""
    ids = np.random.default_rng(seed).integers(0, 53, (rows, length + 1)).astype(np.int32)
    segments = np.ones((rows, length), np.int32)
    segments[-1, length // 2 + 2 * seed :] = 0
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return Batch(ids[:, :-1], ids[:, 1:], segments.astype(np.float32), segments, positions)


def test_load_stats_of_loads_known_by_hand():
    even, one, half = [0.25] * 4, [0, 0, 1, 0], [0.5, 0, 0, 0.5]
    stats = load_stats(np.array([even, one, half]))
    assert stats["dead_experts"] == 5 and isinstance(stats["dead_experts"], int)
    assert stats["load_max"] == 4
    np.testing.assert_allclose(stats["load_entropy"], (1 + 0 + 0.5) / 3)
    assert stats["load_entropy_min"] == 0
    uneven = load_stats(np.array([[0.1, 0.9]]))
    np.testing.assert_allclose(
        uneven["load_entropy"], -(0.1 * np.log2(0.1) + 0.9 * np.log2(0.9)), rtol=1e-12
    )
    assert load_stats(np.array([even]))["load_entropy"] == pytest.approx(1)
    # Shares that were rounded, or summed over steps, say the same.
    assert load_stats(7 * np.array([even, one, half])) == pytest.approx(stats)


@pytest.mark.filterwarnings("error")
def test_load_stats_of_one_expert_and_of_no_load():
    assert load_stats(np.ones((2, 1))) == {
        "load_entropy": 1, "load_entropy_min": 1, "dead_experts": 0, "load_max": 1,
    }  # fmt: skip
    nothing = load_stats(np.zeros((2, 3)))
    assert nothing["dead_experts"] == 6 and np.isnan(nothing["load_entropy"])


def test_measured_load_is_that_of_counting():
    # Half of the pairs would be dropped: what is measured is what is asked for.
    model = Transformer(dataclasses.replace(SMALL, capacity_factor=0.5))
    rng = np.random.default_rng(5)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), model.abstract_params())
    batches = [batch(2, 12, seed=0), batch(2, 12, seed=1), batch(2, 12, seed=2)]
    counts = np.zeros((3, 5))
    run = jax.jit(
        lambda tokens, segments: model.dropless().forward(
            params, tokens, segment_ids=segments, capture=("expert_ids",)
        )
    )
    for b in batches:
        ids = np.asarray(run(b.tokens, b.segment_ids).captured["expert_ids"])
        for layer in range(3):
            counts[layer] += np.bincount(ids[layer][b.segment_ids != 0].ravel(), minlength=5)
    load = measure_load(model, params, iter(batches))
    assert load.shape == (3, 5) and load.dtype == np.float64
    np.testing.assert_allclose(load, counts / counts.sum(axis=1, keepdims=True), rtol=1e-6)
    assert load_stats(load)["load_entropy"] < 0.999  # uneven, so that it can be wrong


def test_load_of_no_token_is_refused():
    model = Transformer(SMALL)
    with pytest.raises(UserError, match="not one token in the data") as caught:
        measure_load(model, {}, [])
    assert "\n" not in str(caught.value)


def test_chosen_experts_of_chosen_layers_are_trained_alone():
    """By index in the outer layers, by load in the middle one."""
    load = np.random.default_rng(0).permuted(np.tile([0.1, 0.3, 0.2, 0.25, 0.15], (3, 1)), axis=1)
    trained = np.zeros((3, 5), bool)
    trained[np.ix_([0, 2], [1, 3, 4])] = True
    trained[1] = load[1] >= 0.25
    patterns = ("layers[0,2]/experts[1,3-4]/*", "layers[1]/experts[top2]/*")
    config = Config(
        model=SMALL,
        data=DataConfig(sequence_length=12),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=0, only=patterns),
    )
    program = make_program(config, load=load)
    state = program.begin(None)
    before = jax.device_get(state.params)
    for seed in range(3):  # every expert gets some of the rows
        state, _ = program.step(state, batch(4, 12, seed=seed))
    after = jax.device_get(state.params)
    for name, old in before["layers"].pop("experts").items():
        new = after["layers"]["experts"].pop(name)
        moved = np.any((old != new).reshape(3, 5, -1), axis=-1)
        np.testing.assert_array_equal(moved, trained, err_msg=name)
    del after["layers"]["experts"]
    chex.assert_trees_all_equal(before, after)


@pytest.mark.slow
def test_a_run_with_capacity_drops_in_training_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    chats = str(write_chats(tmp_path / "a.jsonl", 12))
    options = ["--data.train", chats, "--data.held_out", chats, "--model.capacity_factor", "0.5"]
    options += ["--train.steps", "2", "--train.eval_every", "2", "--train.eval_questions", "0"]
    options += ["--train.log_every", "2", "--workdir", str(tmp_path / "run")]
    train.main([*TINY, *options])
    records = metrics.read(tmp_path / "run")
    (step,) = [r for r in records if "loss" in r]
    assert 0.45 < step["dropped"] < 0.9 and "load_entropy" in step
    config = command_line.from_json((tmp_path / "run" / "config.json").read_text())
    assert config.model.capacity_factor == 0.5
    dropless = Transformer(dataclasses.replace(config.model, capacity_factor=0.0))
    params = checkpoint.load_params(tmp_path / "run")[1]
    scores, _ = held_out.evaluate(
        dropless, params, eval_batches(config), questions=[], config=config
    )
    assert scores["held_out_loss"] == pytest.approx(records[-1]["held_out_loss"], rel=1e-6)
    with pytest.raises(UserError, match=r"model\.capacity_factor 0\.5 -> 0\.0"):
        train.main([*TINY, *options, "--train.steps", "3", "--model.capacity_factor", "0"])


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["none", "balance_loss", "balance_bias"])
def test_balancing_prevents_a_collapse(variant, tmp_path, monkeypatch):
    """As in experiments/balancing: without any it collapses, and each method keeps it even."""
    monkeypatch.chdir(ROOT)
    experiment = common.load("balancing")
    base = experiment.get_config(experiment.variants[0])
    options = common.options(experiment.get_config(variant), base)
    options += ["--data.held_out", "--train.steps", "80", "--workdir", str(tmp_path)]
    train.main(["--config", experiment.config_file(variant), *options])
    records = metrics.read(tmp_path)
    entropies = {r["step"]: r["load_entropy"] for r in records if "load_entropy" in r}
    assert len(entropies) == 8
    if variant == "none":
        assert np.mean([h for step, h in entropies.items() if step > 50]) < 0.5, entropies
        assert list(entropies.values())[-1] < 0.5, entropies
    else:
        assert min(entropies.values()) > 0.9, entropies
