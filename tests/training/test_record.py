"""What a line of metrics.jsonl says of several steps."""

import numpy as np
import pytest
from tiny_training import TINY

from gptoss_jax.config import command_line
from gptoss_jax.training.record import StepRecorder
from gptoss_jax.training.step import StepMetrics
from gptoss_jax.types import RouterStats


def test_what_some_steps_alone_can_tell_is_the_mean_of_these_or_the_largest():
    config = command_line.load(TINY)
    layers, experts = config.model.num_layers, config.model.num_experts
    each = np.ones(layers, np.float32)
    load = np.full((layers, experts), 1 / experts, np.float32)
    router = RouterStats(load, each, each, each)  # pyright: ignore[reportArgumentType]

    def step(gap: float, largest: float) -> StepMetrics:
        extra = {"sampler_gap": np.float32(gap), "sampler_gap_max": np.float32(largest)}
        one = np.float32(1)
        return StepMetrics(one, one, one, one, one, router, np.bool_(True), extra=extra)  # pyright: ignore[reportArgumentType]

    done = [step(0.5, 4), step(np.nan, np.nan), step(0.25, 6)]
    record = StepRecorder(config, (), log=[]).record(done, seconds=None)
    assert record["sampler_gap"] == pytest.approx(0.375)
    assert record["sampler_gap_max"] == 6.0
