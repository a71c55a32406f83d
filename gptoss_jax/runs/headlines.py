"""What the losses of a run measure: the same words on its page and beside its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Losses(NamedTuple):
    """What the losses of a run measure: a few words beside their curves."""

    kind: str  # tells runs with different losses apart on one page
    training: str
    held_out: str


_NATS = "nats a token"
_PAIRS = "of a pair; ln 2 is no preference"
_LIKELIHOOD = Losses("sft", _NATS, _NATS)
# By a number that only runs with these losses log, in training or held out. The records don't say
# whether the loss has a further term (distill's nll_weight), so the words hold with and without.
_BY_NUMBER = {
    "groups_alike": Losses("grpo", "no measure of what is learnt: see the reward", _NATS),
    "reward_margin": Losses("dpo", _PAIRS, _PAIRS),
    "teacher_kl": Losses("distill", "divergence from the teacher, or its mix with nll", _NATS),
}


def losses_of(records: Sequence[dict[str, Any]]) -> Losses:
    """Return what the losses of a run measure, from the names of the numbers in its records."""
    names = {name.removeprefix("held_out_") for record in records for name in record}
    return next((what for name, what in _BY_NUMBER.items() if name in names), _LIKELIHOOD)
