"""What the numbers of a run are, by its objective: the same words on its page and its curves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Losses(NamedTuple):
    """What the losses of a run measure: a few words beside their curves."""

    training: str
    held_out: str


_NATS = "nats a token"
LOSSES = {
    "sft": Losses(_NATS, _NATS),
    "dpo": Losses("of a pair; ln 2 is no preference", "of a pair; ln 2 is no preference"),
    "distill": Losses("divergence from the teacher, a token", _NATS),
    "grpo": Losses("about 0 whatever is learnt: see the reward", _NATS),
}


def objective_of(records: Sequence[dict[str, Any]]) -> str:
    """Return the `objective.name` of a run, from the names of the numbers in its records."""
    names = {name for record in records for name in record}
    by_name = {"groups_alike": "grpo", "reward_margin": "dpo", "teacher_kl": "distill"}
    return next((kind for name, kind in by_name.items() if name in names), "sft")
