"""The spike policy's arithmetic: what is a spike, what is left out, what is remembered."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from gptoss_jax.config import TrainConfig
from gptoss_jax.errors import UserError
from gptoss_jax.training.spikes import SpikeGuard
from gptoss_jax.training.step import StepMetrics

CONFIG = TrainConfig(on_spike="rewind", spike_factor=1.5, spike_window=4, max_rewinds=2)


def measured(loss: float, grad_norm: float = 1.0) -> StepMetrics:
    values = dict.fromkeys(("trained", "tokens", "learning_rate", "router", "finite"))
    return StepMetrics(loss=np.float32(loss), grad_norm=np.float32(grad_norm), **values)


def feed(guard: SpikeGuard, losses: list[float], *, first: int = 1, at_once: int = 1):
    """Take a batch a loss and look at them so many at once; return the first spike."""
    batches = iter(range(100))
    for at in range(0, len(losses), at_once):
        part = losses[at : at + at_once]
        for _ in part:
            guard.next_batch(batches)
        spike = guard.find([measured(x) for x in part], step=first + at + len(part) - 1)
        if spike:
            return spike
    return None


@pytest.mark.parametrize("at_once", [1, 3, 8])
def test_above_the_median_of_the_window(at_once):
    # Of the four before the last the median is 3: a spike is above 4.5.
    calm = [9.0, 2.0, 4.0, 2.0, 4.0]
    assert feed(SpikeGuard(CONFIG, {}, step=0), [*calm, 4.5], at_once=at_once) is None
    spike = feed(SpikeGuard(CONFIG, {}, step=0), [*calm, 4.625, 99.0], at_once=at_once)
    assert (spike.step, spike.batch) == (6, 6)
    assert spike.why == "its loss 4.6250 is over 1.5 times 3.0000, the median of the 4 before it"


def test_few_losses_are_no_window():
    wide = TrainConfig(on_spike="rewind", spike_factor=1.5, spike_window=50)
    assert feed(SpikeGuard(wide, {}, step=0), [1.0] * 9 + [8.0]) is None
    assert feed(SpikeGuard(wide, {}, step=0), [1.0] * 10 + [8.0]).step == 11
    assert feed(SpikeGuard(CONFIG, {}, step=0), [1.0] * 3 + [8.0]) is None
    assert feed(SpikeGuard(CONFIG, {}, step=0), [1.0] * 4 + [8.0]).step == 5


def test_no_numbers_are_spikes_from_the_first_step():
    for m, why in [
        (measured(math.nan), "its loss is nan"),
        (measured(math.inf), "its loss is inf"),
        (measured(1.0, math.inf), "its gradient norm is inf"),
    ]:
        guard = SpikeGuard(CONFIG, {}, step=7)
        guard.next_batch(iter([0]))
        spike = guard.find([m], step=8)
        assert (spike.step, spike.batch, spike.why) == (8, 8, why)


def test_switched_off_it_only_counts():
    guard = SpikeGuard(TrainConfig(), {}, step=0)
    assert feed(guard, [1.0] * 12 + [math.nan]) is None
    assert guard.state() == {"taken": 13, "recent": [], "rewinds": 0, "skipped": []}


def test_a_spike_s_batch_is_left_out_when_its_turn_comes():
    guard = SpikeGuard(CONFIG, {}, step=0)
    batches = iter("abcdefg")
    assert [guard.next_batch(batches) for _ in "abc"] == ["a", "b", "c"]
    spike = guard.find([measured(1.0), measured(math.nan), measured(1.0)], step=3)
    assert (spike.step, spike.batch) == (2, 2)
    guard.rewind(spike, {}, step=0)
    batches = iter("abcdefg")
    assert [guard.next_batch(batches) for _ in "acd"] == ["a", "c", "d"]
    # What follows a batch left out is known by its own number.
    spike = guard.find([measured(1.0), measured(1.0), measured(math.nan)], step=3)
    assert (spike.step, spike.batch) == (3, 4)
    assert guard.may_rewind
    guard.rewind(spike, {}, step=0)
    assert not guard.may_rewind
    batches = iter("abcdefg")
    assert [guard.next_batch(batches) for _ in "ace"] == ["a", "c", "e"]


def test_interrupted_anywhere_it_sees_the_same():
    rng = np.random.default_rng(3)
    losses = [float(np.float32(x)) for x in rng.uniform(1, 2, 12)] + [3.5]
    whole = SpikeGuard(CONFIG, {}, step=0)
    want = feed(whole, losses)
    assert want.step == 13
    for cut in range(13):
        guard = SpikeGuard(CONFIG, {}, step=0)
        assert feed(guard, losses[:cut]) is None
        kept = json.loads(json.dumps(guard.state()))
        guard = SpikeGuard(CONFIG, kept, step=cut)
        assert guard.state() == kept
        assert feed(guard, losses[cut:], first=cut + 1) == want


def test_counts_outlive_the_older_checkpoint():
    guard = SpikeGuard(CONFIG, {}, step=0)
    first = feed(guard, [1.0, math.nan])
    guard.rewind(first, {"taken": 0, "recent": [], "rewinds": 0, "skipped": []}, step=0)
    assert guard.state() == {"taken": 0, "recent": [], "rewinds": 1, "skipped": [2]}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("spike_factor", 1.0, "train.spike_factor is 1.0: it must be more than 1"),
        ("spike_factor", math.nan, "train.spike_factor is nan"),
        ("spike_window", 0, "train.spike_window is 0: it must be positive"),
        ("max_rewinds", -1, "train.max_rewinds is -1: it must not be negative"),
    ],
)
def test_bad_fields(field, value, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**{field: value})
