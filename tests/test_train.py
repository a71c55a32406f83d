"""The training command from end to end, on a model that compiles in seconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_training import TINY, write_chats

from gptoss_jax import train
from gptoss_jax.config import command_line
from gptoss_jax.errors import UserError
from gptoss_jax.loading import checkpoint
from gptoss_jax.runs import metrics, records
from gptoss_jax.training import setup

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Arguments that name training and held-out data."""
    folder = tmp_path_factory.mktemp("data")
    chats, held_out = (
        write_chats(folder / "a.jsonl", 40),
        write_chats(folder / "h.jsonl", 5, seed=1),
    )
    return ["--data.train", str(chats), "--data.held_out", str(held_out)]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, files):
    """A workdir of a run from beginning to end."""
    workdir = tmp_path_factory.mktemp("whole")
    os.chdir(ROOT)
    train.main([*TINY, *files, "--workdir", str(workdir)])
    return workdir


def losses(workdir: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in metrics.read(workdir) if "loss" in r]


def held_out(workdir: Path) -> dict[int, float]:
    return {r["step"]: r["held_out_loss"] for r in metrics.read(workdir) if "held_out_loss" in r}


def test_a_run_leaves_all_that_it_says(whole, files, capsys):
    assert [step for step, _ in losses(whole)] == [1, 2, 3, 4, 5, 6]
    assert list(held_out(whole)) == [0, 3, 6]
    assert held_out(whole)[6] < held_out(whole)[0] - 0.02
    last = metrics.read(whole)[-1]
    assert 0 <= last["exact_match"] <= 1
    np.testing.assert_allclose(last["held_out_perplexity"], np.exp(last["held_out_loss"]))
    record = next(r for r in metrics.read(whole) if r["step"] == 2)
    np.testing.assert_allclose(np.sum(record["expert_load"], axis=1), 1, atol=1e-4)
    assert record["tokens_per_second"] > 0 and "mfu" not in record
    assert records.steps(whole) == [2, 4, 6]
    assert records.best_step(whole) == (6, held_out(whole)[6])
    config = command_line.from_json((whole / "config.json").read_text())
    assert config.model.d_model == 32 and config.workdir == str(whole)
    assert (whole / "curves.png").stat().st_size > 10_000
    assert (whole / "report.html").stat().st_size > 10_000
    samples = metrics.read(whole, metrics.SAMPLES)
    assert [s["step"] for s in samples] == [0, 0, 3, 3, 6, 6]
    assert sum(s["right"] for s in samples[-2:]) == 2 * last["exact_match"]

    before = (whole / "metrics.jsonl").read_text()
    train.main([*TINY, *files, "--workdir", str(whole)])
    shown = capsys.readouterr().out
    assert f"{whole} is complete: step 6 of 6" in shown.replace("\n", "")
    assert "gptoss_jax.sample --checkpoint" in shown and "curves.png" in shown
    assert (whole / "metrics.jsonl").read_text() == before


def stop_at(monkeypatch, step: int, number: int) -> None:
    """Send this process a signal while it runs a step."""
    real = setup.make_train_step

    def make(*args, **kwargs):
        run, calls = real(*args, **kwargs), []

        def counted(state, batch):
            calls.append(1)
            if len(calls) == step:
                os.kill(os.getpid(), number)
            return run(state, batch)

        return counted

    monkeypatch.setattr(setup, "make_train_step", make)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_stopped_and_started_again_is_bit_equal(
    whole, files, tmp_path, monkeypatch, capsys, number
):
    args = [*TINY, *files, "--workdir", str(tmp_path), "--train.checkpoint_every", "100"]
    handler = signal.getsignal(number)  # a shell ignores SIGINT for what it runs in the background
    with monkeypatch.context() as patch:
        stop_at(patch, 3, number)
        train.main(args)
    shown = capsys.readouterr().out
    assert f"stopped by {signal.Signals(number).name}: saved at step 3 of 6" in shown
    assert losses(tmp_path) == losses(whole)[:3]
    assert signal.getsignal(number) is handler

    train.main(args)
    assert losses(tmp_path) == losses(whole)
    assert held_out(tmp_path)[6] == held_out(whole)[6]
    a, b = (metrics.read(w, metrics.SAMPLES) for w in (whole, tmp_path))
    assert [s for s in a if s["step"] != 3] == b  # where it was stopped, nothing was evaluated
    a, b = (checkpoint.load_params(w)[1] for w in (whole, tmp_path))
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), a, b))


@pytest.mark.slow
def test_a_stopped_run_goes_on_over_mended_data(files, tmp_path, monkeypatch, capsys):
    data = write_chats(tmp_path / "a.jsonl", 40)
    args = [*TINY, "--data.train", str(data), "--workdir", str(tmp_path / "w")]
    with monkeypatch.context() as patch:
        stop_at(patch, 3, signal.SIGTERM)
        train.main(args)
    lines = data.read_text().splitlines()
    lines[4] = lines[4].replace('"user"', '"User"')
    data.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl:5: messages\[0\]\.role is 'User'"):
        train.main(args)
    train.main([*args, "--data.on_bad_record", "skip"])
    assert "records since the run began: 1 left out now" in capsys.readouterr().out
    lines[4] = lines[4].replace('"User"', '"user"').replace('"messages"', '"id": 4, "messages"')
    lines[5] = lines[5].replace('"assistant", "content": "', '"assistant", "content": "it is ')
    data.write_text("\n".join(lines))
    train.main([*args, "--train.steps", "8"])
    assert "records since the run began: 1 changed" in capsys.readouterr().out
    assert [step for step, _ in losses(tmp_path / "w")] == list(range(1, 9))
    other = write_chats(tmp_path / "b.jsonl", 40, seed=5)
    with pytest.raises(UserError, match=r"another data: data file a\.jsonl is gone"):
        train.main([*TINY, "--data.train", str(other), *args[-2:], "--train.steps", "9"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model.window", "8"], "another model: model.window 16 -> 8"),
        (["--optimizer.b1", "0.5"], "another optimizer: optimizer.b1 0.9 -> 0.5"),
        (["--train.seed", "9"], "train.seed"),
        (["--data.sequence_length", "300"], "data.sequence_length was 256, is 300"),
    ],
)
def test_a_workdir_of_another_run_is_refused(whole, files, change, message):
    before = sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*"))
    with pytest.raises(UserError) as caught:
        train.main([*TINY, *files, "--workdir", str(whole), "--train.steps", "8", *change])
    assert message in str(caught.value) and str(whole) in str(caught.value)
    assert sorted((p, p.stat().st_mtime_ns) for p in whole.rglob("*")) == before


def test_no_data_and_bad_init_write_nothing(files, tmp_path):
    workdir = tmp_path / "w"
    with pytest.raises(UserError, match=r"give --data.train FILE"):
        train.main(["--config", "configs/20b.py", "--workdir", str(workdir)])
    with pytest.raises(UserError, match="nowhere"):
        train.main([*TINY, *files, "--workdir", str(workdir), "--init", str(tmp_path / "nowhere")])
    assert not workdir.exists()


def test_a_loss_that_is_not_finite_stops_the_run(files, tmp_path, monkeypatch, capsys):
    real = setup.make_train_step

    def make(*args, **kwargs):
        step, calls = real(*args, **kwargs), []

        def poisoned(state, batch):
            calls.append(1)
            return step(state, batch.replace(weights=batch.weights * (np.nan ** (len(calls) == 3))))

        return poisoned

    monkeypatch.setattr(setup, "make_train_step", make)
    with pytest.raises(SystemExit) as stop:
        train.main([*TINY, *files[:2], "--data.held_out", "--workdir", str(tmp_path)])
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "is not finite at step 3 " in error and error.count("\n") == 1
    assert "the newest checkpoint is of step 2" in error
    assert [step for step, _ in losses(tmp_path)] == [1, 2]


@pytest.mark.slow
def test_steps_that_are_not_finite_are_skipped(files, tmp_path):
    train.main(
        [
            *(*TINY, *files[:2], "--data.held_out", "--workdir", str(tmp_path)),
            *("--optimizer.learning_rate", "1e38", "--train.on_nan", "skip"),
            *("--train.log_every", "2"),
        ]
    )
    steps = [(r["step"], r.get("skipped_steps")) for r in metrics.read(tmp_path)]
    assert steps == [(2, 1), (3, 1), (4, 1), (6, 2)]  # evaluation at 3 ends an interval


# --- Starting from weights -------------------------------------------------------------------

SHRUNK = str.split(
    "--config configs/20b.py --model.vocab_size 320 --model.num_layers 2 --model.d_model 64 "
    "--model.num_heads 6 --model.num_kv_heads 3 --model.head_dim 8 --model.num_experts 5 "
    "--model.active_experts 3 --model.d_expert 32 --model.window 16 --model.dtype float32 "
    "--model.param_dtype float32 --data.sequence_length 256 --data.batch_size 2 --train.steps 2 "
    "--train.eval_questions 0 --optimizer.warmup_steps 0"
)


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["dense", "mxfp4"])
def test_fine_tuning_from_weights_with_the_real_config(tmp_path, files, experts):
    from gptoss_jax import weights
    from gptoss_jax.model import Transformer

    workdir, source = tmp_path / "w", tmp_path / "hf"
    args = [*SHRUNK, *files[:2], "--workdir", str(workdir), "--model.experts", experts]
    config = command_line.load(args)
    model = Transformer(config.model)
    key = jax.random.key(3)
    params = jax.jit(model.init)(key, jnp.zeros((1, 1), jnp.int32))["params"]
    weights.save(source, model, params)
    before = jax.device_get(params)

    with pytest.raises(
        UserError, match=r"another model than the config's: model.num_layers 2 -> 1"
    ):
        train.main([*args, "--init", str(source), "--model.num_layers", "1"])
    assert not workdir.exists()

    train.main([*args, "--init", str(source)])
    (_, first), (_, second) = losses(workdir)
    assert second < first
    # A step of Adam moves each weight by about the learning rate (1e-5).
    _, after = checkpoint.load_params(workdir)
    moved = np.abs(np.asarray(after["unembedding"]["weight"]) - before["unembedding"]["weight"])
    assert 5e-6 < moved.max() < 5e-5
    if experts == "mxfp4":
        old, new = (p["layers"]["experts"]["down_weight"] for p in (before, after))
        np.testing.assert_array_equal(old.blocks, new.blocks)
        np.testing.assert_array_equal(old.scales, new.scales)


# --- Killed ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_sigterm_from_outside_exits_cleanly(files, tmp_path):
    command = [sys.executable, "-m", "gptoss_jax.train", *TINY, *files[:2], "--data.held_out"]
    command += ["--train.steps", "5000", "--workdir", str(tmp_path)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while run.poll() is None and not losses(tmp_path):
        time.sleep(0.05)
    run.terminate()
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and "Traceback" not in err
    step = losses(tmp_path)[-1][0]
    assert f"stopped by SIGTERM: saved at step {step} of 5000" in out
    assert records.steps(tmp_path)[-1] == step


def test_no_weights_to_start_from_is_one_line(files, tmp_path):
    args = ["--config", "configs/20b.py", files[0], files[1], "--workdir", str(tmp_path / "w")]
    with pytest.raises(UserError, match="--init DIR"):
        train.main(args)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("steps", "answers"),
    [
        pytest.param(200, 0.25, marks=pytest.mark.slow),
        pytest.param(600, 0.9, marks=pytest.mark.slow),
        pytest.param(800, 0.95, marks=pytest.mark.exhaustive),  # `make demo`
    ],
)
@pytest.mark.timeout(1200)
def test_the_demo_learns(tmp_path, steps, answers):
    """From about nothing to a share of the held-out answers, which grows with the steps."""
    command = [sys.executable, "-m", "gptoss_jax.train", "--config", "configs/tiny.py"]
    command += ["--train.steps", str(steps), "--train.eval_every", str(steps)]
    command += ["--train.eval_questions", "64"]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    subprocess.run([*command, "--workdir", str(tmp_path / "demo")], check=True, env=environment)
    scores = [r["exact_match"] for r in metrics.read(tmp_path / "demo") if "exact_match" in r]
    assert scores[0] < 0.05 and scores[-1] >= answers, scores
