"""What a run says while it trains."""

import io
import sys

import pytest
from rich.console import Console

from gptoss_jax.data import indexing
from gptoss_jax.training import terminal
from gptoss_jax.training.terminal import RunProgress
from gptoss_jax.weights import sources as weight_sources


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": 1.5, "tokens_per_second": 1234.5}, "step 1/7  loss 1.5000  1,234 tokens/s"),
        ({"loss": 0.25, "reward": 0.625, "reward_std": 0.5}, "step 1/7  reward 0.625  loss 0.2500"),
        (
            {"loss": 0.25, "reward_margin": 0.5, "reward_accuracy": 1.0},
            "step 1/7  reward accuracy 1.000  reward margin 0.500  loss 0.2500",
        ),
        ({"loss": 0.0, "reward": 1, "groups_alike": 0.25}, "reward 1.000  groups alike 25%  loss"),
    ],
)
def test_a_line_has_what_the_run_is_for(values, text):
    out = io.StringIO()
    progress = RunProgress(Console(file=out, width=40), start=0, steps=7)
    progress.step(1, values)
    progress.stop()
    (line,) = out.getvalue().splitlines()
    assert text in line


def lines_of(records, monkeypatch, *, seconds, steps=10, evaluations=()):
    """Return what is printed for (step, record) pairs that end at the given seconds."""
    out, clock = io.StringIO(), iter(seconds)
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    progress = RunProgress(Console(file=out, width=40), start=0, steps=steps)
    for step, values in records:
        progress.step(step, {"loss": 1.0, **values})
    for step, scores in evaluations:
        progress.say(step, scores)
    progress.stop()
    return out.getvalue().splitlines()


def test_the_time_left_does_not_count_compilation(monkeypatch):
    records = [(step, {}) for step in (1, 2, 4)]
    first, second, fourth = lines_of(records, monkeypatch, seconds=[500.0, 503.0, 515.0])
    assert "left" not in first
    assert second.endswith("left 0:24") and fourth.endswith("left 0:30")  # 3, and 5 seconds a step


def test_after_a_rewind_the_pace_counts_anew(monkeypatch):
    out, clock = io.StringIO(), iter([100.0, 900.0, 902.0])
    monkeypatch.setattr(terminal.time, "perf_counter", lambda: next(clock))
    progress = RunProgress(Console(file=out, width=40), start=0, steps=10)
    progress.step(1, {"loss": 1.0})
    progress.go_back(0, "a spike")
    progress.step(1, {"loss": 1.0})
    progress.stop()
    assert out.getvalue().splitlines()[-1].endswith("left 0:18")


def test_a_step_that_teaches_nothing_is_said_once(monkeypatch):
    alike = {"reward": 0.0, "groups_alike": 1.0}
    records = [(1, alike), (2, alike), (3, {"reward": 0.5, "groups_alike": 0.5})]
    lines = lines_of(records, monkeypatch, seconds=[0.0, 1.0, 2.0])
    said = [line for line in lines if "teaches nothing" in line]
    assert said == [lines[1]] and said[0].startswith("step 1: all answers to a question got the")
    assert "groups alike 50%" in lines[-1]


def test_an_evaluation_of_pairs_leads_with_their_rewards(monkeypatch):
    scores = {"held_out_loss": 0.5}
    rewards = {"held_out_reward_accuracy": 0.75, "held_out_reward_margin": 1.25}
    lines = lines_of(
        [], monkeypatch, seconds=[],
        evaluations=[(5, scores | rewards), (5, scores | {"held_out_perplexity": 1.65})],
    )  # fmt: skip
    assert lines == [
        "step 5/10  held-out reward accuracy 0.750  margin 1.250  held-out loss 0.5000",
        "step 5/10  held-out loss 0.5000  perplexity 1.65",
    ]


def test_what_is_no_terminal_gets_no_bars(monkeypatch, capsys):
    """Jupyter sets FORCE_COLOR, for which rich takes the pipe of a notebook for a terminal."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(indexing, "PROGRESS_FROM", 0)
    monkeypatch.setattr(weight_sources, "_PROGRESS_FROM", 0)
    out = io.StringIO()
    console = Console(file=out, width=80, highlight=False)
    assert console.is_terminal and not sys.stderr.isatty()
    progress = RunProgress(console, start=0, steps=2)
    for step in (1, 2):
        progress.step(step, {"loss": 1.0})
    progress.stop()
    for bar in (indexing.progress, weight_sources.progress):
        with bar("a pass", 10) as advance:
            advance(10)
    said = out.getvalue() + "".join(capsys.readouterr())
    assert "step 2/2" in said and "\u2501" not in said and "\x1b[2K" not in said
