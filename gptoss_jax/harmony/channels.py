"""Harmony's roles and channels, and with which weight each is trained."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gptoss_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")

Weights = dict[tuple[str, str | None], float]  # by role and channel; None: the rest of the role's


def parse_train_on(items: Iterable[str], *, field: str = "train_on") -> Weights:
    """Read entries ROLE[/CHANNEL][=WEIGHT], such as assistant/analysis=0.3.

    The weight is 1 where none is given. "system" is another name of "developer". An entry with a
    channel goes before one without: of assistant and assistant/analysis=0 all is trained but the
    analysis.

    Raises:
        UserError: no such role or channel, a weight that is negative or no number, or two weights
            for one thing.
    """
    weights: Weights = {}
    for item in items:
        name, _, number = item.partition("=")
        role, slash, channel = name.partition("/")
        if role not in ROLES or (slash and channel not in CHANNELS):
            raise UserError(
                f"{field} has {item!r}: it takes a role ({', '.join(ROLES)}), alone or with a "
                f"channel ({', '.join(CHANNELS)}), such as assistant/final, and a weight, if not "
                "1, as in assistant/analysis=0.3"
            )
        weight = _number(number) if "=" in item else 1.0
        if not 0 <= weight < math.inf:
            raise UserError(f"{field} has {item!r}: the weight is a number, and not negative")
        key = ("developer" if role == "system" else role), channel or None
        if weights.setdefault(key, weight) != weight:
            raise UserError(f"{field} has {item!r}, and another weight for the same before it")
    return weights


def weight_of(weights: Weights, role: str, channel: str | None) -> float:
    """Return the weight of a message, 0 where no entry names it."""
    return weights.get((role, channel), weights.get((role, None), 0.0))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
