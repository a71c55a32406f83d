"""What a run refuses to begin with, and what is said when one is made longer or shorter."""

from __future__ import annotations

import dataclasses
import types
from pathlib import Path

import pytest
from tiny_training import TINY

from gptoss_jax import loading
from gptoss_jax.config import command_line
from gptoss_jax.errors import UserError
from gptoss_jax.loading import checkpoint
from gptoss_jax.runs import records
from gptoss_jax.training import checks

ROOT = Path(__file__).parents[2]
SHORT = ["--optimizer.learning_rate", "1e-3", "--optimizer.warmup_steps", "10", "--workdir", "w"]


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch):
    monkeypatch.chdir(ROOT)


def jump(schedule: str, *, at: int, steps: tuple[int, int]) -> str:
    """Return what is said of a run of steps[0] that resumes after step `at` with steps[1]."""
    old, new = (
        command_line.load(
            [*TINY, *SHORT, "--optimizer.schedule", schedule, "--train.steps", str(count)]
        )
        for count in steps
    )
    record = types.SimpleNamespace(config=old, step=at)
    return "\n".join(checks.describe_jump(new, record))  # type: ignore[arg-type]


def test_a_finished_cosine_that_is_made_longer_jumps():
    said = jump("cosine", at=100, steps=(100, 200))
    assert "train.steps 200 in place of 100" in said
    assert "the learning rate jumps from 0.0001 at step 100 " in said
    # 1e-3 * (0.1 + 0.9 * (1 + cos(pi * 90 / 189)) / 2)
    assert "to 0.000584 at step 101 (optimizer.schedule cosine)" in said
    assert "--init w --workdir NEW" in said


@pytest.mark.parametrize(
    ("schedule", "at", "steps", "jumps"),
    [
        ("cosine", 50, (100, 100), False),
        ("cosine", 5, (100, 110), False),  # in the warm-up, which is the same
        ("cosine", 50, (100, 60), True),  # shorter, too: it falls at once
        ("constant", 100, (100, 200), False),
        ("wsd", 100, (100, 200), True),
        ("wsd", 70, (100, 200), False),  # before its decay
        ("wsd", 95, (100, 200), True),
    ],
)
def test_other_schedules_and_places(schedule, at, steps, jumps):
    assert bool(jump(schedule, at=at, steps=steps)) == jumps


def test_a_new_run_has_nothing_to_jump_from():
    assert checks.describe_jump(command_line.load(TINY), None) == []


def test_adapters_in_two_places_are_refused_by_headers(monkeypatch):
    adapted = [*TINY, "--model.lora.targets", "q", "--init", "RUN"]
    config = command_line.load([*adapted, "--init_adapters", "DIR"])
    monkeypatch.setattr(loading, "read_config", lambda _: config.model)
    with pytest.raises(UserError, match="--init RUN has adapters, and --init-adapters DIR others"):
        checks.check_init(config)


@pytest.mark.parametrize(("qat", "checked"), [(False, False), (True, True)])
def test_dense_experts_of_a_run_are_not_compared_early(qat, checked, monkeypatch):
    """Orbax reads a stack only as a whole. A run that trained for MXFP4 has none to compare."""
    config = command_line.load([*TINY, "--init", "RUN", "--model.experts", "mxfp4"])
    stored = dataclasses.replace(config.model, experts="dense", qat=qat)
    record = types.SimpleNamespace(config=types.SimpleNamespace(model=stored), base=None)
    monkeypatch.setattr(loading, "read_config", lambda _: config.model)
    for module in (loading, checkpoint):
        monkeypatch.setattr(module, "find_folder", Path)
    monkeypatch.setattr(records, "is_workdir", lambda _: True)
    monkeypatch.setattr(records, "read_record", lambda _: record)
    said = checks.check_init(config)
    assert said == [] if checked else "dense experts of --init RUN exactly" in "".join(said)
