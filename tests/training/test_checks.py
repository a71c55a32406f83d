"""What is said when a run that resumes is made longer or shorter."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
from tiny_training import TINY

from gptoss_jax.config import command_line
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
