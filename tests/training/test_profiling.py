"""The profiler's window: which steps it records, and what it says."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from gptoss_jax.config import TrainConfig
from gptoss_jax.errors import UserError
from gptoss_jax.training import profiling


@jax.jit
def step(x):
    with jax.named_scope("experts"):
        return jnp.tanh(x @ x) @ x


def run(workdir: Path, config: TrainConfig, *, steps=range(1, 9)) -> tuple[str, list[int]]:
    """Do what the training loop does; return what was printed, and the steps it wrote after."""
    console = Console(file=io.StringIO(), width=100, highlight=False)
    window = profiling.Window(config, workdir, console)
    x, wrote = jnp.full((40, 40), 0.001), []
    for i in steps:
        window.begin(i, x)
        x = step(x)
        if window.end(i, x) > 0:
            wrote.append(i)
    x.block_until_ready()  # as training has when it ends: it has read the last step's loss
    window.close()
    return console.file.getvalue(), wrote  # type: ignore[attr-defined]


def recorded(folder: Path) -> list[int]:
    """Return the steps that a trace has."""
    (path,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [int(e["args"]["step_num"]) for e in events if e.get("name") == profiling.STEP]


@pytest.mark.parametrize(
    ("steps", "inside"),
    [
        (range(1, 9), [3, 4, 5]),
        (range(1, 5), [3, 4]),  # ends inside
        (range(4, 9), [4, 5]),  # goes on inside
        ([1, 2, 3, 4, 2, 3, 4, 5, 6], [3, 4]),  # goes back inside: only what was until then
    ],
)
def test_the_steps_asked_for_are_recorded_as_far_as_the_run_has_them(tmp_path, steps, inside):
    printed, wrote = run(tmp_path, TrainConfig(profile_start=3, profile_steps=3), steps=steps)
    folder = tmp_path / "profile"
    assert recorded(folder) == inside
    assert wrote == [5] * (5 in inside)  # the time of that is no time of a step
    assert f"steps recorded: {len(inside)}" in printed
    assert f"xprof --logdir {folder}" in printed and printed.count("\n") == 2
    (trace,) = folder.glob("plugins/profile/*/*.xplane.pb")
    assert b"experts" in trace.read_bytes()  # the path of each op in the program


@pytest.mark.parametrize(
    ("config", "steps"),
    [
        (TrainConfig(), range(1, 9)),
        (TrainConfig(profile_start=3), range(6, 9)),  # goes on after the window
        (TrainConfig(profile_start=3), range(1, 3)),  # ends before it
    ],
)
def test_outside_of_the_window_nothing_is_written(tmp_path, config, steps):
    assert run(tmp_path, config, steps=steps) == ("", []) and not list(tmp_path.iterdir())


def test_what_goes_wrong_stops_no_run(tmp_path):
    config = TrainConfig(profile_start=2, profile_steps=1)
    with jax.profiler.trace(str(tmp_path / "other")):  # there is one profiler in a process
        printed, _ = run(tmp_path / "a", config)
    assert printed.startswith("no profile: ") and printed.count("\n") == 1
    (tmp_path / "b").mkdir()
    (tmp_path / "b/profile").write_text("in the way")
    assert run(tmp_path / "b", config)[0].startswith("no profile: ")
    assert run(tmp_path / "c", config)[0].startswith("profile ")


def test_a_window_after_the_end_is_one_line():
    with pytest.raises(UserError, match=r"^train.profile_start is 21: the run ends at step 20$"):
        TrainConfig(profile_start=21, steps=20)
