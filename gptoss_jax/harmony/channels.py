"""Harmony's roles and channels, and the loss weight of each."""

from __future__ import annotations

import math
from collections.abc import Iterable

from gptoss_jax.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")
# Which analysis of earlier turns a prompt leaves out; see `harmony.render_prompt`.
HISTORIES = ("harmony", "template")
# Which answers of a chat are trained; see `harmony.render`.
TURNS = ("all", "last")

Weights = dict[tuple[str, str | None], float]  # by role and channel; None: all other channels


def parse_train_on(items: Iterable[str], *, field: str = "train_on") -> Weights:
    """Read entries ROLE[/CHANNEL][=WEIGHT], such as assistant/analysis=0.3.

    The default weight is 1. "system" is another name of "developer". An entry with a channel
    overrides one without: assistant and assistant/analysis=0 together train all of the assistant's
    messages except the analysis.

    Raises:
        UserError: no such role or channel, a weight that is negative or not a number, or two
            different weights for the same role and channel.
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
    """Return the weight of a message; 0 if no entry covers it."""
    return weights.get((role, channel), weights.get((role, None), 0.0))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
