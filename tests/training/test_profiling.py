"""The profiler's window, and the table that is read from a trace."""

from __future__ import annotations

import io
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from gptoss_jax.config import TrainConfig
from gptoss_jax.errors import UserError
from gptoss_jax.training import profiling

# jax 0.12's ProfileData ends the process at an event's stats: `read` refuses it there.
pytestmark = pytest.mark.skipif(jax.__version_info__ >= (0, 12), reason="jax 0.12 reads no trace")


@jax.jit
def step(x):
    """A step with three scopes: experts forward and backward, attention little, optimizer less."""

    def loss(x):
        with jax.named_scope("experts"):
            y = jnp.tanh(x @ x) @ x
        with jax.named_scope("attention"), jax.named_scope("inner"):
            y = y + jnp.sin(x)
        return jnp.sum(y)

    grads = jax.grad(loss)(x)
    with jax.named_scope("optimizer"):
        return x - 1e-6 * grads


@jax.jit
def evaluate(x):
    with jax.named_scope("loss"):
        return jnp.tanh(x @ x) @ x


def run(workdir: Path, config: TrainConfig, *, steps=range(1, 9), evaluate_at: int = 0) -> str:
    """Do what the training loop does, and return what was printed."""
    console = Console(file=io.StringIO(), width=100, highlight=False)
    window = profiling.Window(config, workdir, console)
    x = jnp.full((400, 400), 0.001)
    for i in steps:
        window.begin(i, x)
        x = step(x)
        spent = window.end(i, x)
        assert spent == 0 or i == config.profile_start + config.profile_steps - 1
        if i == evaluate_at:
            evaluate(x).block_until_ready()
    x.block_until_ready()  # as training has when it ends: it has read the last step's loss
    window.close()
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_exactly_the_steps_asked_for_are_recorded(tmp_path):
    printed = run(tmp_path, TrainConfig(profile_start=3, profile_steps=2))
    times = profiling.read(tmp_path / "profile")
    assert times.steps == 2
    assert str(times.folder) in printed and "2 steps" in printed
    assert list(times.folder.glob("*.xplane.pb")) and list(times.folder.glob("*.trace.json.gz"))
    rows = {line.split()[0]: line for line in printed.splitlines() if line}
    assert set(profiling.SCOPES) < set(rows) and "other" in rows
    # Two matmuls forward, four backward; of the optimizer a pass over a matrix.
    forward, backward = (times.by_scope["experts", back] for back in (False, True))
    assert forward > 0 and backward > 0
    assert forward + backward > 0.5 * sum(times.by_scope.values())
    assert 0 < times.by_scope.get(("optimizer", False), 0) < forward + backward
    assert ("loss", False) not in times.by_scope and ("optimizer", True) not in times.by_scope
    assert 0 <= times.idle < times.wall
    assert times.ops[0][2] == max(t for _, _, t in times.ops)


def test_writing_the_profile_is_no_time_of_a_step(tmp_path):
    window = profiling.Window(
        TrainConfig(profile_start=1, profile_steps=2), tmp_path, Console(file=io.StringIO())
    )
    x, spent = jnp.full((40, 40), 0.001), []
    for i in range(1, 4):
        window.begin(i, x)
        x = step(x)
        spent.append(window.end(i, x))
    assert spent[0] == spent[2] == 0 and spent[1] > 1e-3
    assert list((tmp_path / "profile").glob("**/*.xplane.pb"))


def test_what_runs_between_steps_is_left_out(tmp_path):
    run(tmp_path, TrainConfig(profile_start=3, profile_steps=2), evaluate_at=3)
    times = profiling.read(tmp_path / "profile")
    assert ("loss", False) not in times.by_scope
    assert not any("loss" in path for _, path, _ in times.ops)


@pytest.mark.parametrize(
    ("steps", "recorded"),
    [
        (range(1, 5), 2),  # ends inside
        (range(4, 9), 2),  # goes on inside
        ([1, 2, 3, 4, 2, 3, 4, 5, 6], 2),  # goes back inside: only what was until then
        (range(6, 9), 0),  # goes on after it
        (range(1, 3), 0),  # ends before it
    ],
)
def test_a_window_that_the_run_does_not_cover(tmp_path, steps, recorded):
    printed = run(tmp_path, TrainConfig(profile_start=3, profile_steps=3), steps=steps)
    if recorded:
        assert profiling.read(tmp_path / "profile").steps == recorded
        assert f"{recorded} steps" in printed
    else:
        assert not printed and not (tmp_path / "profile").exists()


def test_off_writes_nothing(tmp_path):
    assert run(tmp_path, TrainConfig()) == "" and not list(tmp_path.iterdir())


def test_a_profiler_that_can_not_start_stops_no_run(tmp_path):
    with jax.profiler.trace(str(tmp_path / "other")):
        printed = run(tmp_path, TrainConfig(profile_start=2, profile_steps=1))
    assert printed.startswith("no profile: ") and printed.count("\n") == 1


def test_a_workdir_that_can_not_be_written_stops_no_run(tmp_path):
    (tmp_path / "profile").write_text("in the way")
    printed = run(tmp_path, TrainConfig(profile_start=2, profile_steps=1))
    assert printed.startswith("no profile: ")
    assert run(tmp_path / "b", TrainConfig(profile_start=2, profile_steps=1)).startswith("profile ")


def test_the_innermost_scope_counts():
    scan = "jit(step)/transpose(jvp(Transformer.run))/Transformer._scan/while/body/closed_call/"
    for path, want in {
        scan + "Block/attention/attention/q_weight/dot_general": ("attention", True),
        "jit(step)/jvp(loss)/while/body/add": ("loss", False),
        "jit(step)/optimizer/mul": ("optimizer", False),
        scan + "Block/attention/experts/mul": ("experts", True),
        scan + "Block/attention_norm/mul": ("other", True),
        "jit(step)/jvp(Transformer.run)/embedding/gather": ("embedding", False),
        "": ("other", False),
    }.items():
        assert profiling.scope_of(path) == want, path


def test_the_command_reads_the_newest_trace_again(tmp_path, capsys):
    run(tmp_path, TrainConfig(profile_start=3, profile_steps=1))
    profiling.main([str(tmp_path)])
    assert "1 steps" in capsys.readouterr().out


def test_bad_traces_are_one_line(tmp_path):
    with pytest.raises(UserError, match=r"no trace in it; record one with --train.profile_start"):
        profiling.main([str(tmp_path)])
    folder = tmp_path / "profile"
    with jax.profiler.trace(str(folder)):
        evaluate(jnp.ones((8, 8))).block_until_ready()
    with pytest.raises(UserError, match="no op of a training step"):
        profiling.read(folder)
    path = next(folder.glob("**/*.xplane.pb"))
    raw = path.read_bytes()
    for damaged in (b"", raw[: len(raw) // 2], b"nonsense" * 100, b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"no whole trace|no op of"):
            profiling.read(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profile_start": -1}, "train.profile_start is -1: not negative"),
        ({"profile_steps": 0}, "train.profile_steps is 0: it must be positive"),
        ({"profile_start": 21, "steps": 20}, "train.profile_start is 21: the run ends at step 20"),
        ({"eval_samples": -1}, "train.eval_samples is -1: not negative"),
    ],
)
def test_bad_fields_are_one_line(values, message):
    with pytest.raises(UserError) as caught:
        TrainConfig(**values)
    assert str(caught.value) == message
