"""What goes wrong in a week of training, made to go wrong: kills, damage, full disks, spikes."""

from __future__ import annotations

import json
import os
import random
import shutil
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
from tiny_training import TINY, write_chats

from gptoss_jax import train
from gptoss_jax.errors import UserError
from gptoss_jax.loading import resume
from gptoss_jax.runs import checkpoints, metrics, records
from gptoss_jax.runs.workdir import Hold
from gptoss_jax.training import held_out

ROOT = Path(__file__).parents[2]
TRAIN = [sys.executable, "-m", "gptoss_jax.train"]
POISONED = [sys.executable, str(ROOT / "tests/poisoned.py")]
SPIKES = str.split(
    "--train.steps 12 --train.on_spike rewind --train.spike_window 3 --train.spike_factor 1.05 "
    "--train.checkpoint_every 3 --train.keep 9 --optimizer.learning_rate 1e-2"
)


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def args(tmp_path_factory):
    """Arguments of a run without evaluation."""
    chats = write_chats(tmp_path_factory.mktemp("data") / "a.jsonl", 40)
    one = ["--model.num_layers", "1", "--model.layer_pattern", "b"]
    return [*TINY, *one, "--data.train", str(chats), "--data.held_out"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, args):
    """The workdir of a run of 12 steps that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    os.chdir(ROOT)
    train.main([*args, "--workdir", str(workdir), "--train.steps", "12"])
    return workdir


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics.read(workdir) if "loss" in r]


def events(workdir: Path) -> list[dict]:
    return metrics.read(workdir, "events.jsonl")


def assert_same_end(a: Path, b: Path) -> None:
    """Hold two runs' last parameters and optimizer states against each other, bit for bit."""
    from programs import make_program

    record = records.read_record(a)
    begin = make_program(record.config).begin
    (one, _), (two, _) = (resume.restore(w, jax.eval_shape(begin, None)) for w in (a, b))
    chex.assert_trees_all_equal(one.params, two.params)
    chex.assert_trees_all_equal(one.opt_state, two.opt_state)


# --- Damage -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped_and_said(whole, args, tmp_path, capsys):
    workdir = tmp_path / "w"
    shutil.copytree(whole, workdir)
    shutil.rmtree(workdir / "checkpoints/12")
    file = max((workdir / "checkpoints/10/params/d").iterdir(), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    train.main([*args, "--workdir", str(workdir), "--train.steps", "12"])
    shown = capsys.readouterr().out.splitlines()
    said = [line for line in shown if "set aside" in line]
    assert len(said) == 1 and "checkpoints/10: its params is" in said[0]
    assert said[0].endswith("set aside as .damaged, going on from step 8")
    assert losses(workdir) == losses(whole)
    assert_same_end(workdir, whole)
    assert (workdir / "checkpoints/10.damaged").is_dir()
    assert [(e["event"], e["step"]) for e in events(workdir)] == [("damaged", 8)]


# --- Two runs, signals ------------------------------------------------------------------------


def test_a_second_run_is_refused_before_it_writes(whole, args):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    with Hold(whole):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            train.main([*args, "--workdir", str(whole), "--train.steps", "20"])
        (whole / "lock").unlink()
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.parametrize("when", ["evaluation", "save"])
def test_sigterm_while_evaluating_and_saving(whole, args, tmp_path, monkeypatch, capsys, when):
    module, name = (held_out, "evaluate") if when == "evaluation" else (checkpoints, "save")
    real, calls = getattr(module, name), []

    def stop(*a, **k):
        calls.append(1)
        if len(calls) == 2:  # at steps 3 and 2 (a checkpoint each 2)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*a, **k)

    monkeypatch.setattr(module, name, stop)
    questions = ["--data.held_out", args[-2], "--train.eval_questions", "0"]
    train.main([*args[:-1], *questions, "--workdir", str(tmp_path), "--train.steps", "12"])
    step = {"evaluation": 4, "save": 5}[when]  # the step after the one that it came in
    assert f"stopped by SIGTERM: saved at step {step} of 12" in capsys.readouterr().out
    assert records.steps(tmp_path)[-1] == step
    assert losses(tmp_path) == losses(whole)[:step]


# --- Loss spikes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "log_every"),
    [("garbage", 1), pytest.param("nan", 4, marks=pytest.mark.slow)],
)
def test_a_spike_is_rewound_and_exactly_its_batch_left_out(args, tmp_path, capsys, kind, log_every):
    args = [*args, *SPIKES, "--train.log_every", str(log_every)]
    poisoned.main({kind: [8]}, [*args, "--workdir", str(tmp_path / "spike")])
    shown = capsys.readouterr().out
    assert "back to step 6, without batch 8, rewind 1 of 3" in shown.replace("\n", " ")
    poisoned.main({"without": [8]}, [*args, "--workdir", str(tmp_path / "clean")])
    assert "back to" not in capsys.readouterr().out
    assert losses(tmp_path / "spike") == losses(tmp_path / "clean")
    assert losses(tmp_path / "spike")[-1][0] == 12
    assert_same_end(tmp_path / "spike", tmp_path / "clean")
    (event,) = events(tmp_path / "spike")
    assert event["event"] == "rewind" and event["step"] == 6
    assert event["spike"]["step"] == event["spike"]["batch"] == 8
    spikes = records.read_record(tmp_path / "spike").spikes
    assert (spikes["rewinds"], spikes["skipped"], spikes["taken"]) == (1, [8], 13)
    assert records.read_record(tmp_path / "clean").spikes["taken"] == 12


@pytest.mark.slow
def test_one_spike_too_many_stops_the_run(args, tmp_path, capsys):
    args = [*args, *SPIKES, "--train.max_rewinds", "2", "--workdir", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        # Before there is a checkpoint, and after one: each of two, and the third that is too many.
        poisoned.main({"nan": [2, 3, 9]}, args)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: step 7 is a spike: its loss is nan; the run went back 2 times")
    assert error.count("\n") == 1 and "the newest checkpoint is of step 6" in error
    assert records.steps(tmp_path) == [0, 3, 6]
    assert [e["spike"]["batch"] for e in events(tmp_path)] == [2, 3]
    assert [e["step"] for e in events(tmp_path)] == [0, 0]


PLAN = {"garbage": [8], "nan": [9]}  # so that batches are taken up to 8, from 7 to 9, from 7 on


@pytest.fixture(scope="module")
def twice_rewound(tmp_path_factory, args):
    workdir = tmp_path_factory.mktemp("twice")
    os.chdir(ROOT)
    poisoned.main(PLAN, [*args, *SPIKES, "--workdir", str(workdir)])
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize("kill", [9, 17])
def test_killed_around_a_rewind_it_leaves_out_the_same(twice_rewound, args, tmp_path, kill):
    args = [*args, *SPIKES, "--workdir", str(tmp_path)]
    command = [*POISONED, json.dumps(PLAN | {"kill": kill}), *args]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, capture_output=True, env=environment)
    assert run.returncode == -signal.SIGKILL, run.stderr
    poisoned.main(PLAN, args)
    assert losses(tmp_path) == losses(twice_rewound)
    assert_same_end(tmp_path, twice_rewound)
    a, b = (records.read_record(w).spikes for w in (tmp_path, twice_rewound))
    assert a == b and a["rewinds"] == 2 and a["skipped"] == [8, 9]


# --- Disks ------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a tmpfs here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def run(args: list[str], workdir: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [*TRAIN, *args, "--workdir", str(workdir), *more]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_disk_that_gets_full_and_has_room_again(whole, args, small_disk):
    workdir, ballast = small_disk / "w", small_disk / "ballast"
    args = [*args, "--train.steps", "12"]
    for room in (40_000, 1_200_000):
        used = sum(p.stat().st_size for p in small_disk.rglob("*") if p.is_file())
        ballast.write_bytes(bytes(max(0, 3 * 2**20 - used - room)))
        done = run(args, workdir)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert f"the workdir {workdir} can't be written: No space left on device" in done.stderr
        kept = records.steps(workdir)
        assert (f"checkpoint {kept[-1]} is whole" if kept else "no checkpoint") in done.stderr
        assert not (workdir / "lock").exists()
        ballast.unlink()
    assert kept
    done = run(args, workdir, "--train.keep", "1")
    assert done.returncode == 0, done.stderr
    assert losses(workdir) == losses(whole)


@pytest.mark.slow
def test_a_disk_that_is_read_only(args, small_disk):
    (small_disk / "w").mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for workdir in (small_disk / "w", small_disk / "new"):
        done = run(args, workdir)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{workdir} can't be written: Read-only file system" in done.stderr


@pytest.mark.slow
def test_data_that_change_under_a_run(args, tmp_path):
    chats = write_chats(tmp_path / "b.jsonl", 40)
    args = [*args, "--data.train", str(chats), "--train.steps", "5000"]
    command = [*TRAIN, *args, "--workdir", str(tmp_path / "w")]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and len(losses(tmp_path / "w")) < 5:
        time.sleep(0.02)
    write_chats(chats, 41, seed=4)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "b.jsonl" in error
    assert records.newest_record(tmp_path / "w").step >= 4
    assert not list((tmp_path / "w/checkpoints").glob("*tmp*"))


# --- SIGKILL ----------------------------------------------------------------------------------


def kill_and_go_on(args: list[str], workdir: Path, *, kills: int, rng: random.Random) -> dict:
    """Run to the end with so many SIGKILLs at random moments; return how many fell on what."""
    command, log = [*TRAIN, *args, "--workdir", str(workdir)], workdir.with_suffix(".log")
    fell = {"starting": 0, "training": 0, "saving": 0}
    while sum(fell.values()) < kills:
        with log.open("a") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out)
        before = len(losses(workdir))
        if rng.random() < 0.1:
            time.sleep(rng.uniform(0, 5))  # while it starts, too
        else:
            while process.poll() is None and len(losses(workdir)) <= before:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.5))
        assert process.poll() is None, f"it ended by itself: {log.read_text()[-2000:]}"
        process.kill()
        process.wait()
        if len(losses(workdir)) == before:
            fell["starting"] += 1
        elif list(workdir.glob("checkpoints/*tmp*")):
            fell["saving"] += 1
        else:
            fell["training"] += 1
    assert "Traceback" not in log.read_text()
    return fell


@pytest.mark.parametrize(
    "kills",
    [pytest.param(2, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.exhaustive)],
)
@pytest.mark.timeout(7200)
def test_killed_at_random_moments_losses_are_bit_equal(args, tmp_path, kills):
    args = [*args, "--train.checkpoint_every", "1", "--train.keep", "2"]
    args += ["--optimizer.schedule", "constant"]  # whatever the number of steps
    fell = kill_and_go_on(
        [*args, "--train.steps", "100000"], tmp_path / "killed", kills=kills, rng=random.Random(7)
    )
    print(f"kills that fell on: {fell}")
    reached = losses(tmp_path / "killed")[-1][0]
    steps = ["--train.steps", str(reached + 5)]
    for name in ("killed", "whole"):
        train.main([*args, "--workdir", str(tmp_path / name), *steps])
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert np.isfinite([loss for _, loss in losses(tmp_path / "whole")]).all()
    assert_same_end(tmp_path / "killed", tmp_path / "whole")
    assert fell["saving"] or kills < 20
