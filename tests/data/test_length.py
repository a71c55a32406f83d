"""How many steps a pass over the data takes, and runs whose length is given in epochs."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from tiny_training import TINY, write_chats

from gptoss_jax import data, train
from gptoss_jax.config import command_line
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.windows import Windows
from gptoss_jax.errors import UserError
from gptoss_jax.runs import metrics, records
from gptoss_jax.training import setup

ROOT = Path(__file__).parents[2]
PLACE = TINY.index("--train.steps")
TINY = [*TINY[:PLACE], *TINY[PLACE + 2 :]]  # the steps are what these tests give


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def chats(tmp_path):
    return ["--data.train", str(write_chats(tmp_path / "a.jsonl", 40))]


def load(*options: str):
    return command_line.load([*TINY, "--data.held_out", *options])


def test_an_epoch_trains_each_record_once(chats):
    config = load(*chats, "--data.pack_window", "16")
    windows = Windows(open_examples(config), seed=config.train.seed)
    rows = [row for w in range(windows.per_round) for row in windows[w]]
    assert sum(len(row) for row in rows) == 40
    assert data.steps_per_epoch(config) == len(rows) / 2
    assert setup.with_steps(config, None) is config
    config = setup.with_steps(load(*chats, "--train.epochs", "2"), None)
    each = data.steps_per_epoch(config)
    assert 2 * each <= config.train.steps < 2 * each + 1
    (line,) = data.describe_length(config)
    assert line.startswith(f"length    {config.train.steps:,} steps: about ")


def test_pairs_share_rows_and_questions_are_asked_in_rounds(tmp_path):
    (tmp_path / "p.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"{i}?", "chosen": "yes", "rejected": "no"}) + "\n"
            for i in range(9)
        )
    )
    dpo = ["--objective.name", "dpo", "--model.lora.targets", "attention"]
    config = load("--data.train", str(tmp_path / "p.jsonl"), *dpo, "--data.sequence_length", "512")
    windows = Windows(open_examples(config), seed=config.train.seed)
    assert data.steps_per_epoch(config) == len(windows[0]) / 2 >= 2
    chats = write_chats(tmp_path / "q.jsonl", 12)
    grpo = "--objective.name grpo --objective.grpo.group_size 2 --objective.grpo.updates 3"
    config = load("--data.train", str(chats), *grpo.split(), "--data.batch_size", "8")
    assert data.steps_per_epoch(config) == 12 / 4 * 3


def test_data_that_fill_less_than_a_batch_are_said(tmp_path):
    chats, long = write_chats(tmp_path / "few.jsonl", 2), ["--data.sequence_length", "512"]
    config = load("--data.train", str(chats), "--data.batch_size", "8", "--train.steps", "6", *long)
    length, warning = data.describe_length(config)
    assert "6 steps: about 48.00 epochs of 0.1 steps" in length
    assert "each step trains a record about 8.0 times; lower data.batch_size" in warning
    assert (
        len(data.describe_length(load("--data.train", str(chats), "--data.batch_size", "1"))) == 1
    )


def test_steps_and_epochs_exclude_each_other(chats, tmp_path):
    with pytest.raises(UserError, match=r"--train\.steps and --train\.epochs both"):
        load(*chats, "--train.steps", "5", "--train.epochs=2")
    with pytest.raises(UserError, match=r"data\.weights takes from each source"):
        load(*chats, chats[1], "--data.weights", "1", "2", "--train.epochs", "2")
    (tmp_path / "mine.py").write_text(
        "from gptoss_jax.config import *\n"
        "def get_config(): return Config(train=TrainConfig(epochs=3, profile_start=2_000))\n"
    )
    file = ["--config", str(tmp_path / "mine.py")]
    assert command_line.load(file).train.epochs == 3
    config = command_line.load([*file, "--train.steps", "5000"])
    assert (config.train.steps, config.train.epochs) == (5000, 0)


def test_a_run_that_resumes_keeps_the_steps_of_its_epochs(chats):
    config = load(*chats, "--train.epochs", "0.5")
    begun = setup.with_steps(load(*chats, "--train.epochs", "0.5", "--data.batch_size", "1"), None)
    record = types.SimpleNamespace(config=begun)
    assert setup.with_steps(config, record).train.steps == begun.train.steps  # type: ignore[arg-type]
    more = load(*chats, "--train.epochs", "3")
    assert setup.with_steps(more, record).train.steps == setup.with_steps(more, None).train.steps  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_run_of_epochs_ends_where_it_says(chats, tmp_path, capsys):
    options = [*TINY, *chats, "--data.held_out", "--init", "random", "--workdir", str(tmp_path)]
    options += ["--optimizer.warmup_steps", "0"]
    steps = setup.with_steps(load(*chats, "--train.epochs", "0.1"), None).train.steps
    train.main([*options, "--train.epochs", "0.1"])
    assert f"length    {steps} steps: about 0.1" in capsys.readouterr().out
    record = records.read_record(tmp_path)
    assert (record.step, record.config.train.steps, record.config.train.epochs) == (
        steps,
        steps,
        0.1,
    )
    train.main([*options, "--train.epochs", "0.1"])
    assert "is complete" in " ".join(capsys.readouterr().out.split())
    train.main([*options, "--train.epochs", "0.2"])
    assert metrics.read(tmp_path)[-1]["step"] > steps
    said = " ".join(capsys.readouterr().out.split())
    assert 0 < said.index("the learning rate jumps from") < said.index(f"step {steps + 1}/")
