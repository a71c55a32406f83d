"""Training by several real processes: killed, stopped, and gone on with by another number."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from hosts import ROOT, Processes, python
from tiny_training import TINY, write_chats

from gptoss_jax import weights
from gptoss_jax.config import command_line
from gptoss_jax.model import Transformer
from gptoss_jax.model.initial import init_params
from gptoss_jax.runs import metrics, records

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
]

TRAIN = python("-m", "gptoss_jax.train")
FOREVER = ["--train.steps", "100000"]


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Arguments of a run of one layer, without evaluation; any number of steps begins alike."""
    chats = write_chats(tmp_path_factory.mktemp("data") / "a.jsonl", 40)
    more = "--model.num_layers 1 --model.layer_pattern b --data.batch_size 4 --train.keep 9 "
    more += "--optimizer.schedule constant --optimizer.eps 1e-3"
    return [*TINY, *more.split(), "--data.train", str(chats), "--data.held_out"]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def losses(workdir: Path) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in metrics.read(workdir) if "loss" in r}


def damage(checkpoint_folder: Path) -> None:
    """Change one bit of its parameters."""
    files = (p for p in checkpoint_folder.glob("params/**/d/*") if p.is_file())
    file = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


@pytest.mark.parametrize("victim", [0, 1])  # the one that leads, the one that follows
def test_killed_stopped_and_gone_on_with_on_other_hosts(victim, args, tmp_path):
    workdir = tmp_path / "run"
    command = [*TRAIN, *args, "--workdir", str(workdir)]

    # Two processes, and one is killed.
    mesh = ["--mesh.fsdp", "2"] if victim else ["--mesh.data", "-1"]
    run = Processes([*command, *FOREVER, *mesh], folder=tmp_path / "killed", count=2)
    run.wait_until(lambda: len(records.steps(workdir)) > 1)
    run.all[victim].kill()
    killed = time.monotonic()
    codes = run.codes(seconds=60)
    print(f"the other ended {time.monotonic() - killed:.1f} s after process {victim} was killed")
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1, run.said(1 - victim)
    error = [x for x in run.said(1 - victim).splitlines() if x.startswith("error: ")]
    assert len(error) == 1 and "another of the 2 processes is gone" in error[0]
    assert "the same command goes on from the newest checkpoint" in error[0]

    # Four go on from the checkpoint before a damaged one. SIGTERM to one of them stops all.
    reached = records.steps(workdir)
    damage(workdir / "checkpoints" / str(reached[-1]))
    mesh = ["--mesh.fsdp", "2", "--mesh.expert", "2"]
    run = Processes([*command, *FOREVER, *mesh], folder=tmp_path / "four", count=4)
    run.wait_until(lambda: "going on from step" in run.said(0))
    run.wait_until(lambda: max(losses(workdir), default=0) >= reached[-1] + 2)
    run.all[2].terminate()
    assert run.codes() == [0, 0, 0, 0], run.said(0)
    assert f"set aside as .damaged, going on from step {reached[-2]}" in run.said(0)
    assert "fsdp 2 x expert 2 on 4 devices, 4 hosts" in run.said(0)
    stopped = records.steps(workdir)[-1]
    assert f"stopped by SIGTERM: saved at step {stopped} of" in run.said(0)
    assert max(losses(workdir)) == stopped
    for i in (1, 2, 3):  # only the first one speaks
        said = run.said(i)  # XLA may warn of a slow compilation, by the name of the step
        assert not re.search(r"^(step|error)", said, re.M) and "error: " not in said

    # One process goes on, and another does all from the beginning.
    steps = ["--train.steps", str(stopped + 2)]
    for folder in (workdir, tmp_path / "whole"):
        run = Processes([*TRAIN, *args, *steps, "--workdir", str(folder)], folder=folder, count=1)
        assert run.codes() == [0], run.said(0)
    found, whole = losses(workdir), losses(tmp_path / "whole")
    assert list(found) == list(whole) == list(range(1, stopped + 3))
    np.testing.assert_allclose(list(found.values()), list(whole.values()), rtol=0, atol=1e-5)
    assert whole[stopped + 2] < whole[1] - 0.1


def test_processes_that_share_rows_start_from_weights_and_evaluate(args, tmp_path):
    held_out = write_chats(tmp_path / "h.jsonl", 5, seed=1)
    args = [*args[:-1], "--data.held_out", str(held_out), "--train.steps", "3"]
    args += ["--model.num_kv_heads", "2", "--init", str(tmp_path / "weights")]
    model = Transformer(command_line.load(args).model)
    weights.save(tmp_path / "weights", model, init_params(model, seed=3))
    runs = {
        "one": (1, 1, []),
        "two": (2, 2, ["--mesh.context", "2", "--mesh.tensor", "-1"]),
    }
    for name, (count, devices, mesh) in runs.items():
        command = [*TRAIN, *args, *mesh, "--workdir", str(tmp_path / name)]
        run = Processes(command, folder=tmp_path / f"{name}.said", count=count, devices=devices)
        assert run.codes() == [0] * count, run.said(0)
    one, two = (metrics.read(tmp_path / name) for name in runs)
    for key in ("loss", "grad_norm", "held_out_loss"):
        values = [[r[key] for r in records if key in r] for records in (one, two)]
        assert len(values[0]) >= 2
        np.testing.assert_allclose(*values, rtol=0, atol=1e-5)
    a, b = (metrics.read(tmp_path / name, metrics.SAMPLES) for name in runs)
    assert a == b and len(a) == 4
