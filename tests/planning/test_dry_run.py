"""What --dry-run prints, and that it does nothing else."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from programs import make_program
from rich.console import Console
from tiny_training import TINY, write_chats

from gptoss_jax import data, inspect, train, weights
from gptoss_jax.config import Config, command_line
from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.model.flops import step_flops
from gptoss_jax.model.initial import init_params
from gptoss_jax.optimizer import split_trainable
from gptoss_jax.planning import dry_run
from gptoss_jax.planning.shapes import checkpoint_bytes, shapes
from gptoss_jax.runs import checkpoints
from gptoss_jax.runs.frozen_base import Base, Sum
from gptoss_jax.runs.workdir import Hold
from gptoss_jax.training import setup

ROOT = Path(__file__).parents[2]
SMALL = [*TINY, "--model.num_layers", "1", "--data.sequence_length", "64", "--data.held_out"]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def config_of(*args: str):
    return command_line.load([*SMALL, "--data.train", *args])


def test_nothing_is_written_and_no_weights_or_data_are_needed(tmp_path, monkeypatch, capsys):
    workdir = tmp_path / "w"
    args = [*SMALL, "--data.train", "--init", "some/name", "--workdir", str(workdir), "--dry-run"]

    def allocated(*_: object) -> None:
        raise AssertionError("parameters were made")

    monkeypatch.setattr(setup, "first_state", _only_traced(allocated))
    train.main([*args, "--optimizer.freeze", "embedding/*", "--optimizer.ema", "0.9"])
    assert not list(tmp_path.iterdir())
    printed = capsys.readouterr().out
    assert "dry run: nothing was written" in printed and "num_layers=1" in printed

    config = command_line.load(args)
    rows = {line.split("  ")[0]: line for line in printed.splitlines()}
    assert re.search(r"320 x 32 +float32 +10,240 +frozen +0\.0", rows["embedding/weight"])
    assert re.search(
        r"1 x 4 x 32 x 64 +float32 +8,192 +all +0\.0", rows["layers/experts/down_weight"]
    )
    total, _ = shapes(config).model.num_parameters()
    assert f"{total:,}" in rows["all"] and f"{total - 10_240:,}" in rows["all"]

    want = step_flops(config.model, tokens=128, trained=128, sequence_length=64)
    assert f"FLOPs     {want:.4g} a step" in printed
    assert "2 rows of 64: 128 tokens, 128 trained (full rows" in printed
    assert "768 tokens in 6 steps" in printed
    sizes = dict(re.findall(r"^  ([a-z ]+?) +([\d.]+ [kMGT]?B)", printed, re.MULTILINE))
    names = ["parameters", "optimizer state", "averaged parameters", "batch", "temporaries", "peak"]
    assert list(sizes) == names
    # Moments are of what is trained, two of them; averages are one more.
    assert sizes["parameters"] == _kb(total * 4)
    assert sizes["averaged parameters"] == _kb((total - 10_240) * 4)
    assert sizes["batch"] == _kb(128 * 5 * 4)
    assert _bytes(sizes["peak"]) > sum(_bytes(sizes[n]) for n in names[:5]) * 0.99
    assert "that this device has: it fits" in printed
    assert "The compiler counts" in printed


def _only_traced(instead):
    """Return `first_state`, to be only ever traced."""
    real = setup.first_state

    def make(*args, **kwargs):
        state = real(*args, **kwargs)
        traced = all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(state.params))
        return state if traced else instead()

    return make


def _kb(size: float) -> str:
    return f"{size / 1e6:,.2f} MB" if size >= 1e6 else f"{size / 1e3:,.2f} kB"


def _bytes(text: str) -> float:
    number, unit = text.split()
    return float(number) * {"kB": 1e3, "MB": 1e6, "GB": 1e9}[unit]


def test_data_that_are_given_are_looked_at(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "memory_table", lambda *_: [])
    chats = write_chats(tmp_path / "a.jsonl", 9)
    train.main([*SMALL, "--data.train", str(chats), "--dry-run", "--data.sequence_length", "256"])
    printed = capsys.readouterr().out
    assert "data.train: 9 records in 1 file" in printed
    tokens, trained = re.search(r"([\d,]+) tokens, ([\d,]+) trained \(first", printed).groups()  # type: ignore[union-attr]
    assert 2 * 256 >= int(tokens.replace(",", "")) > 2 * 128 > int(trained) > 20

    with pytest.raises(UserError, match="nowhere"):
        train.main([*SMALL, "--data.train", str(tmp_path / "nowhere.jsonl"), "--dry-run"])


def write_run(workdir: Path, config: Config, base: Base | None = None) -> None:
    """Write the first checkpoint of a run."""
    with checkpoints.open_manager(workdir) as manager:
        kept = {"data_state": {}, "fingerprint": data.fingerprint(config), "base": base}
        checkpoints.save(manager, make_program(config).begin(None), config=config, **kept)


@pytest.fixture
def held():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--mesh.fsdp 3", "mesh: fsdp 3 is for 3 devices, and there are 8"),
        ("--mesh.fsdp 8", "make it a multiple of 8"),
        ("--mesh.tensor 8 --data.batch_size 8", "tensor"),
        ("--init {other}", "is another model than the config's: model.num_layers 2 -> 1"),
        ("--objective.name dpo", "model.lora.targets"),
        ("--optimizer.freeze nothing_like_it", "nothing_like_it"),
        ("--data.held_out {bad}", "not JSON"),
        ("--init random --workdir {run} --train.seed 5", "train.seed 0 -> 5"),
        ("--init /no/such/folder", "/no/such/folder: there is no such folder"),
        ("--init ./typo", "./typo: there is no such folder"),
        ("--workdir {bad}", "bad.jsonl is a file: name a folder"),
        ("--workdir {bad}/w", "can't be written: Not a directory; name another"),
        ("--workdir {held}", "is in use by process"),
        ("--workdir {moved}", "gone, the base of"),  # and so restoring would fail
        ("--init {moved}", "gone, the base of"),  # and so reading --init would fail
    ],
)
def test_what_training_refuses_is_refused_before_anything_is_printed(
    options, message, tmp_path, capsys, held
):
    """In the same words by both; the model of `other` has two layers, and `run` is of this one."""
    chats = write_chats(tmp_path / "a.jsonl", 9)
    (tmp_path / "bad.jsonl").write_text("{\n")
    places = {name: tmp_path / name for name in ("other", "run", "moved", "held")}
    places["bad"] = tmp_path / "bad.jsonl"
    common = [*SMALL, "--data.sequence_length", "256", "--data.train", str(chats)]
    config = command_line.load(common)
    if "{other}" in options:
        two = dataclasses.replace(config.model, num_layers=2)
        weights.save(places["other"], Transformer(two), init_params(Transformer(two), seed=0))
    path, gone = "layers/attention/q_bias", str(tmp_path / "gone")
    base = Base(gone, folder=gone, arrays={path: Sum((1, 4, 8), "float32", 0)})
    for name in ("run", "moved"):
        if f"{{{name}}}" in options:
            write_run(places[name], config, base=base if name == "moved" else None)
    if "{held}" in options:
        places["held"].mkdir()
        held.enter_context(Hold(places["held"]))
    args = [*common, *options.format(**places).split()]
    if "--workdir" not in args:
        args += ["--workdir", str(tmp_path / "w")]
    said = []
    for more in ([], ["--dry-run"]):
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            train.main([*args, *more])
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "w").exists()


def test_a_run_that_goes_on_is_not_asked_for_what_it_began_with(tmp_path, monkeypatch, capsys):
    """Its day is that of its record, and its adapters are in its checkpoint."""
    monkeypatch.setattr(dry_run, "memory_table", lambda *_: [])
    chats = write_chats(tmp_path / "a.jsonl", 9)
    args = [*SMALL, "--data.sequence_length", "256", "--data.train", str(chats)]
    args += ["--workdir", str(tmp_path / "w"), "--init_adapters", str(tmp_path / "gone")]
    write_run(tmp_path / "w", command_line.load([*args, "--data.date", "today=2020-01-05"]))
    train.main([*args, "--data.date", "today", "--dry-run"])
    printed = capsys.readouterr().out
    assert "today=2020-01-05" in printed and "begin as" not in printed


def test_what_is_not_there_is_said_at_the_end(monkeypatch):
    monkeypatch.setattr(dry_run, "memory_table", lambda *_: [])
    out = io.StringIO()
    dry_run.show(config_of("--init", "some/name"), Console(file=out, width=200))
    end = out.getvalue().splitlines()[-6:]
    assert "train needs --data.train FILE" in end
    assert "not checked: --init some/name is no folder here" in end
    config = dataclasses.replace(config_of(), init=None)
    dry_run.show(config, Console(file=out, width=200))
    assert "train needs weights to start from" in out.getvalue()


def test_patterns_and_packed_experts_show_in_the_table():
    config = config_of(
        *("--model.experts", "mxfp4", "--optimizer.freeze", "layers[0]/attention/*", "*norm*"),
        *("--model.num_layers", "2", "--optimizer.accumulate", "2"),
    )
    run = shapes(config)
    rows = {line.split()[0]: line.split() for line in dry_run.parameter_table(run)}
    assert rows["layers/experts/down_weight"][-4:] == ["mxfp4", "16,384", "packed", "0.0"]
    assert rows["layers/attention/q_bias"][-3:-1] == ["96", "48"]
    assert rows["final_norm/scale"][-2] == "frozen"
    state = run.state
    assert checkpoint_bytes(state) == sum(
        math.prod(x.shape) * x.dtype.itemsize
        for x in jax.tree.leaves((state.params, state.opt_state))
    )
    packed = state.params["layers"]["experts"]["down_weight"]
    assert packed.blocks.shape == (2, 4, 32, 2, 16)


def test_chosen_by_load_is_counted_without_data():
    run = shapes(config_of("--optimizer.only", "layers/experts[top2]/*weight"))
    rows = {line.split()[0]: line.split() for line in dry_run.parameter_table(run)}
    assert rows["layers/experts/down_weight"][-3:-1] == ["8,192", "4,096"]
    with pytest.raises(UserError, match="nothing_like_it"):
        shapes(config_of("--optimizer.freeze", "nothing_like_it"))


def test_a_mixture_has_sources_in_its_batch():
    one = shapes(config_of("a", "b", "--data.weights", "0.5", "2"))
    assert one.batch.sources is not None and one.batch.sources.shape == (2,)
    assert shapes(config_of("a", "b")).batch.sources is None


@pytest.mark.parametrize(
    ("name", "parameters", "gb"), [("20b", 20.91e9, 293), ("120b", 116.83e9, 1636)]
)
def test_the_real_models_are_counted_without_being_made(name, parameters, gb):
    run = shapes(command_line.load(["--config", f"configs/{name}.py"]))
    last = dry_run.parameter_table(run)[-1].split()
    assert int(last[1].replace(",", "")) == pytest.approx(parameters, rel=1e-3)
    assert last[1] == last[2]
    # bfloat16 parameters with float32 moments and copies: 14 bytes each.
    assert checkpoint_bytes(run.state) / 1e9 == pytest.approx(gb, rel=1e-3)
    trained, _ = split_trainable(run.state.params)
    assert len(jax.tree.leaves(trained)) == len(jax.tree.leaves(run.state.params))
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(run.state))


def test_questions_need_no_answers(tmp_path, monkeypatch):
    question = {"messages": [{"role": "user", "content": "why?"}]}
    (tmp_path / "q.jsonl").write_text(json.dumps(question) + "\n")
    options = "--objective.name grpo --objective.grpo.reward configs/rewards/sums.py --init random "
    options += "--objective.grpo.group_size 2 --objective.grpo.max_tokens 8 "
    options += "--data.sequence_length 256"
    config = config_of(str(tmp_path / "q.jsonl"), *options.split())
    monkeypatch.setattr(dry_run, "memory_table", lambda *_: ["as ever"])
    out = io.StringIO()
    dry_run.show(config, Console(file=out))
    assert "full rows, every token trained" in out.getvalue() and "as ever" in out.getvalue()
    with pytest.raises(UserError, match="grpo, which trains on sampled answers"):
        inspect.main([*SMALL, "--data.train", str(tmp_path / "q.jsonl"), *options.split()])


def test_a_step_that_does_not_compile_is_told(monkeypatch):
    config = config_of()
    run = shapes(config)

    class Refuses:
        def lower(self, *_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 99 GB asked for\nmore")

    lines = dry_run.memory_table(config, dataclasses.replace(run, step=Refuses()))
    assert "the step can't be compiled for this device: RESOURCE_EXHAUSTED" in lines[-1]
    assert any("together" in line for line in lines) and "more" not in lines[-1]


def test_help_shows_it(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "--dry-run" in printed and "memory and FLOPs" in " ".join(printed.split())


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_20b_is_compiled_on_a_laptop(tmp_path):
    command = [sys.executable, "-m", "gptoss_jax.train", "--dry-run", "--config", "configs/20b.py"]
    ran = subprocess.run(
        [*command, "--workdir", str(tmp_path / "w")], cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    sizes = dict(re.findall(r"^  ([a-z ]+?) +([\d.]+) GB", ran.stdout, re.MULTILINE))
    np.testing.assert_allclose(float(sizes["parameters"]), 41.83, atol=0.01)
    np.testing.assert_allclose(float(sizes["optimizer state"]), 250.98, atol=0.01)
    assert float(sizes["peak"]) > 300 and not (tmp_path / "w").exists()
