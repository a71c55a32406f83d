"""What a run says while it trains."""

import io

import pytest
from rich.console import Console

from gptoss_jax.training.terminal import RunProgress


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"loss": 1.5, "tokens_per_second": 1234.5}, "step 1/7  loss 1.5000  1,234 tokens/s"),
        ({"loss": 0.25, "reward": 0.625, "reward_std": 0.5}, "loss 0.2500  reward 0.625  left"),
        ({"loss": 0.25, "reward_accuracy": 1.0}, "loss 0.2500  reward accuracy 1.000  left"),
    ],
)
def test_a_line_has_what_the_run_is_for(values, text):
    out = io.StringIO()
    progress = RunProgress(Console(file=out, width=40), start=0, steps=7)
    progress.step(1, values)
    progress.stop()
    (line,) = out.getvalue().splitlines()
    assert text in line
