"""Config files, overrides, JSON, and what bad ones get."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_jax.config import Config, ModelConfig, TrainConfig
from gptoss_jax.config.command_line import flat, from_json, load, to_json
from gptoss_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = ["--config", str(ROOT / "configs/tiny.py")]


def test_overrides_reach_their_fields():
    config = load(
        [
            *(*TINY, "--model.num_layers", "2", "--model.num-experts=6", "--data.train", "a", "b"),
            *("--init", "somewhere", "--model.rope_factor", "auto", "--model.qk_norm"),
        ]
    )
    assert (config.model.num_layers, config.model.num_experts) == (2, 6)
    assert config.data.train == ("a", "b")
    assert (config.init, config.model.rope_factor, config.model.qk_norm) == (
        "somewhere",
        "auto",
        True,
    )
    assert config.model.d_model == 128  # of the file, not the default


def test_configs_that_ship_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()  # a folder of that name is no config
    for name in ("tiny", "20b", "120b"):
        assert load(["--config", name]) == load(["--config", str(ROOT / f"configs/{name}.py")])
        assert load(["--config", name]).name == name
    reward = load(["--config=tiny_grpo"]).objective.grpo.reward
    assert reward and Path(reward).is_file()


def test_a_wheel_has_every_module_and_config(monkeypatch):
    setuptools = pytest.importorskip("setuptools")
    made = {}
    monkeypatch.setattr(setuptools, "setup", made.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {made["package_dir"].get(name, name.replace(".", "/")) for name in made["packages"]}
    modules = [*Path("gptoss_jax").rglob("*.py"), *Path("configs").rglob("*.py")]
    assert folders == {str(path.parent) for path in modules}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("--train.stps 3", "unknown option --train.stps; did you mean --train.steps?"),
        ("--learning_rate 3", "did you mean --optimizer.learning_rate?"),
        ("--zzzzzz 3", "unknown option --zzzzzz"),
        ("--train.steps x", "--train.steps expects a whole number, not 'x'"),
        ("--train.steps 1.5", "--train.steps expects a whole number, not '1.5'"),
        ("--train.steps", "--train.steps expects a value: a whole number"),
        ("--train.steps 3 4", "--train.steps expects a whole number, not '3 4'"),
        ("--model.dtype float8", "expects one of float32, bfloat16, float16, not 'float8'"),
        ("--model.rope_factor much", "expects a number or auto, not 'much'"),
        ("--model.qk_norm True", "takes no value: write --model.qk_norm or --model.no_qk_norm"),
        ("stray", "'stray' belongs to no option"),
        ("--train.steps 0", "train.steps is 0: it must be positive"),
        ("--data.sequence_length 999", "data.sequence_length (999) is longer than model.context"),
        ("--data.weights 1 x", "--data.weights expects a list of numbers, not '1 x'"),
        ("--data.weights 0.5 0.5", "data.weights has 2 numbers for the 1 entries of data.train"),
        ("--data.weights -1", "data.weights is -1.0: each must be positive"),
        ("--data.weights nan", "data.weights is nan: each must be positive"),
        ("--optimizer.name adam", "expects one of adamw, adafactor, muon, not 'adam'"),
        ("--optimizer.schedule linear", "expects one of cosine, constant, wsd, not 'linear'"),
        ("--optimizer.masters none", "expects one of float32, stochastic, not 'none'"),
        ("--optimizer.moment_dtype float16", "expects one of float32, bfloat16, not 'float16'"),
        ("--optimizer.ema 1", "optimizer.ema is 1.0: it must be at least 0 and less than 1"),
        ("--optimizer.decay_share 1.5", "optimizer.decay_share is 1.5: it must be a share"),
        ("--optimizer.warmup_steps -1", "optimizer.warmup_steps is -1: it must not be negative"),
        ("--optimizer.clip_norm nan", "optimizer.clip_norm is nan: it must not be negative"),
        ("--model.capacity_factor -1", "model.capacity_factor is -1.0: it is 0 (off) or positive"),
        ("--train.balance_bias -0.1", "train.balance_bias is -0.1: it must not be negative"),
        ("--train.on_spike stop", "expects one of ignore, rewind, not 'stop'"),
        ("--train.spike_factor 1", "train.spike_factor is 1.0: it must be more than 1"),
        ("--train.spike_window 0", "train.spike_window is 0: it must be positive"),
        ("--train.max_rewinds -1", "train.max_rewinds is -1: it must not be negative"),
        ("--train.load_batches 0", "train.load_batches is 0: it must be positive"),
        ("--train.eval_samples -1", "train.eval_samples is -1: it must not be negative"),
        ("--train.profile_start -1", "train.profile_start is -1: it must not be negative"),
        ("--train.profile_steps 0", "train.profile_steps is 0: it must be positive"),
        ("--dry_run yes", "--dry_run takes no value: write --dry_run or --no_dry_run"),
    ],
)
def test_bad_options_say_what(args, message):
    with pytest.raises(UserError) as caught:
        load([*TINY, *args.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1", "defines no get_config()"),
        ("def get_config():\n    return 3", "returned a int, not a Config"),
        ("def get_config():\n    return 1 / 0", "line 2: ZeroDivisionError"),
        ("def get_config(:", "line 1: SyntaxError"),
    ],
)
def test_bad_config_files_say_what(tmp_path, body, message):
    path = tmp_path / "c.py"
    path.write_text(body)
    with pytest.raises(UserError, match=r"c\.py") as caught:
        load(["--config", str(path)])
    assert message in str(caught.value)


def test_missing_config_files():
    with pytest.raises(UserError, match=r"nowhere\.py: no such file"):
        load(["--config", "nowhere.py"])
    with pytest.raises(UserError, match=r"did you mean tiny\?; the configs that ship are 120b, 12"):
        load(["--config", "tinny"])
    with pytest.raises(UserError, match="--config: expected one argument"):
        load(["--config", "--train.steps", "3"])
    with pytest.raises(UserError, match="no --config FILE was given"):
        load(["--train.steps", "3"])


def test_help_says_of_each_option_what_it_is_in_the_order_of_use(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # in one column
    with pytest.raises(SystemExit) as stop:
        load([*TINY, "--help"])
    assert stop.value.code in (0, None)
    shown = capsys.readouterr().out
    assert "--config FILE" in shown
    groups, helps, option = [], {}, ""
    for line in shown.splitlines():
        if found := re.match(r"\W+((?:[\w.]+ )?)options ", line):
            groups.append(found[1].strip())
        elif found := re.match(r"\W -(?:h, -)?-([\w.-]+)", line):
            option = found[1].replace("-", "_")
            helps[option] = ""
        elif re.match(r"\W {7}\S", line):
            helps[option] += line.strip("│| ") + " "
    assert [g for g in groups if "." not in g] == [
        *("", "data", "train", "optimizer", "objective", "model", "mesh", "distributed")
    ]
    said = {name: text.partition("(default:")[0] for name, text in helps.items() if text}
    assert set(flat(Config())) <= set(said)
    assert [n for n, text in said.items() if not text or list(said.values()).count(text) > 1] == []
    assert "(default: 128)" in helps["model.d_model"]  # of the file
    for doc in ("Direct preference", "Distillation", "Group relative policy", "Low-rank adapters"):
        assert re.search(rf"\W {doc}", shown), "a comment of a field stands over a group"


def test_the_command_prints_one_line_and_exits_2():
    run = subprocess.run(
        [sys.executable, "-m", "gptoss_jax.train", *TINY, "--train.stps", "3"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == "error: unknown option --train.stps; did you mean --train.steps?\n"
    assert run.stdout == ""


def test_json_round_trip():
    config = Config(
        model=ModelConfig(num_layers=2, rope_factor="auto"), train=TrainConfig(steps=7), init="x"
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, train=("a", "b")))
    assert from_json(to_json(config)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"num_layer": 3}}, "unknown field model.num_layer; did you mean num_layers?"),
        ({"train": {"steps": "x"}}, 'train.steps is "x"; expected a whole number'),
        ({"train": {"steps": True}}, "train.steps is true; expected a whole number"),
        ({"data": {"train": "a"}}, "data.train is"),
        ({"model": 3}, "model is not a JSON object"),
        ({"train": {"steps": -1}}, "train.steps is -1"),
    ],
)
def test_bad_json_says_what(change, message):
    with pytest.raises(UserError) as caught:
        from_json(json.dumps(change))
    assert message in str(caught.value) and str(caught.value).startswith("config.json")
    with pytest.raises(UserError, match="is not JSON"):
        from_json("{")
