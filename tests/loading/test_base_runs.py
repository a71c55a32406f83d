"""LoRA runs under trouble, with adapters alone in their checkpoints: rewound, killed, joined."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import poisoned
import pytest
from hosts import Processes, python
from programs import make_program
from tiny_training import TINY, write_chats

from gptoss_jax import sample, train, weights
from gptoss_jax.config import LoRAConfig, MeshConfig, command_line
from gptoss_jax.loading import checkpoint, resume
from gptoss_jax.loading import frozen_base as begun_base
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.parallel import mesh as meshes
from gptoss_jax.parameters.patterns import frozen_paths
from gptoss_jax.runs import metrics, records

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = "--model.experts mxfp4 --model.num_layers 1 --model.layer_pattern b --model.d_expert 96 "
MODEL += "--model.num_heads 4 --model.num_kv_heads 2 --data.sequence_length 192 --data.batch_size 4"
LORA = "--model.lora.targets q experts --model.lora.rank 3 --optimizer.only *sinks "
LORA += "--optimizer.schedule constant --optimizer.learning_rate 1e-2 --train.steps 4"


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Arguments of a run that begins with a checkpoint of packed experts."""
    folder = tmp_path_factory.mktemp("data")
    chats = write_chats(folder / "a.jsonl", 40)
    args = [*TINY, *MODEL.split(), *LORA.split(), "--data.train", str(chats), "--data.held_out"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        config = dataclasses.replace(command_line.load(args).model, lora=LoRAConfig())
    model = Transformer(config)
    weights.save(folder / "hf", model, init_params(model, seed=5))
    return [*args, "--init", str(folder / "hf")]


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics.read(workdir) if "loss" in r]


def test_a_spike_is_rewound_with_the_base_as_it_is(args, tmp_path, monkeypatch):
    spikes = "--train.steps 6 --train.on_spike rewind --train.checkpoint_every 2 --train.keep 9"
    args = [*args, *spikes.split(), "--workdir"]
    loads = []
    real = checkpoint.load_base
    monkeypatch.setattr(resume, "load_base", lambda *a, **k: loads.append(1) or real(*a, **k))
    poisoned.main({"nan": [4]}, [*args, str(tmp_path / "spike")])
    assert not loads  # it was there
    poisoned.main({"without": [4]}, [*args, str(tmp_path / "clean")])
    assert losses(tmp_path / "spike") == losses(tmp_path / "clean")
    a, b = (checkpoint.load_params(tmp_path / name)[1] for name in ("spike", "clean"))
    chex.assert_trees_all_equal(a, b)
    assert records.read_record(tmp_path / "spike").spikes["rewinds"] == 1


@pytest.mark.parametrize("sizes", [MeshConfig(fsdp=2, expert=2), MeshConfig(tensor=2, data=2)])
def test_random_parameters_are_alike_on_meshes(args, sizes):
    config = command_line.load([*args, "--init", "random"])
    program = make_program(config)
    params, frozen = program.begin(None).params, frozen_paths(program.factors)
    base = begun_base.measure(begun_base.begin(config), params, frozen_paths=frozen)
    with jax.set_mesh(meshes.make(sizes, jax.devices()[:4])):
        checkpoint.load_base(base, config.model)


def test_killed_and_started_again_is_bit_equal(args, tmp_path, capsys):
    args = [*args, "--train.steps", "24", "--train.checkpoint_every", "1", "--workdir"]
    command, workdir = [sys.executable, "-m", "gptoss_jax.train", *args], tmp_path / "killed"
    run = subprocess.Popen([*command, str(workdir)], stdout=subprocess.DEVNULL)
    while run.poll() is None and not any(step >= 3 for step, _ in losses(workdir)):
        time.sleep(0.003)
    assert run.poll() is None
    run.send_signal(signal.SIGKILL)
    run.wait()
    train.main([*args, str(workdir)])
    train.main([*args, str(tmp_path / "whole")])
    assert losses(workdir) == losses(tmp_path / "whole")
    capsys.readouterr()
    prompt = ["--prompt-ids", "5,6,7", "--max-tokens", "4", "--json"]
    sample.main(["--checkpoint", str(workdir), *prompt])
    assert len(json.loads(capsys.readouterr().out)["ids"]) <= 4


@pytest.mark.timeout(600)
def test_two_processes_go_on_with_the_run_of_one(args, tmp_path):
    begin = [*args, "--optimizer.eps", "1e-3", "--workdir"]
    command = [*python("-m", "gptoss_jax.train"), *begin, str(tmp_path / "run")]
    train.main([*begin, str(tmp_path / "alone")])
    train.main([*begin, str(tmp_path / "run"), "--train.steps", "2"])
    run = Processes([*command, "--mesh.fsdp", "2"], folder=tmp_path / "said", count=2)
    assert run.codes() == [0, 0], run.said(0)
    one, two = (losses(tmp_path / name) for name in ("alone", "run"))
    assert [s for s, _ in two] == [1, 2, 3, 4]
    np.testing.assert_allclose([x for _, x in one], [x for _, x in two], rtol=0, atol=1e-5)
    a, b = (records.read_record(tmp_path / name).base for name in ("alone", "run"))
    assert a == b
    # What the other has not is a line, and the end of both.
    run = Processes(
        [*command, "--mesh.fsdp", "2", "--train.steps", "6", "--init", str(tmp_path / "no")],
        folder=tmp_path / "refused",
        count=2,
    )
    assert run.codes(seconds=90) == [2, 2]
    assert "no: there is no such folder" in run.said(0)
