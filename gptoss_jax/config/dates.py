"""The date that the system message of a prompt names: `data.date`, and what follows from it.

A value is one of
- "none": no date;
- "today": in training, the day on which the run began; when the model is asked, the day then. A run
  records the day as "today=YYYY-MM-DD", so that it writes the same after it was resumed;
- "record": the date of each record, or none where it has none; when the model is asked, that day;
- a day, as YYYY-MM-DD.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

from gptoss_jax.errors import UserError

RULES = ("none", "today", "record")


def check(rule: str, *, field: str = "data.date", rules: Sequence[str] = RULES) -> None:
    """Raise UserError unless `rule` is one of `rules` or a day."""
    recorded = rules is RULES and rule.startswith("today=")
    if rule not in rules and not is_day(rule.removeprefix("today=") if recorded else rule):
        raise UserError(
            f"{field} is {rule!r}: it is one of {', '.join(rules)}, or a day as YYYY-MM-DD"
        )


def is_day(value: object) -> bool:
    """Return whether a value is a day as YYYY-MM-DD."""
    if not isinstance(value, str) or len(value) != len("YYYY-MM-DD"):
        return False
    try:
        datetime.date.fromisoformat(value)
    except ValueError:
        return False
    return True


def today() -> str:
    """Return the day that this machine's clock and time zone give."""
    return datetime.date.today().isoformat()


def begin(rule: str, recorded: str | None = None) -> str:
    """Return the value that a run records; `recorded` is the one of the run that it continues."""
    if rule != "today":
        return rule
    if recorded is not None and recorded.startswith("today="):
        return recorded
    return f"today={today()}"


def in_training(rule: str, given: str | None = None) -> str | None:
    """Return the date of a chat that is trained or evaluated; `given` is its record's own."""
    if rule == "record":
        return given
    return None if rule == "none" else in_prompt(rule.removeprefix("today="))


def in_prompt(rule: str) -> str | None:
    """Return the date of a prompt to a model that was trained by `rule`."""
    rule = of_template(rule)
    return None if rule == "none" else today() if rule == "today" else rule


def of_template(rule: str) -> str:
    """Return the value for `harmony.chat_template`: "none", "today" or a day."""
    return "today" if rule == "record" or rule.startswith("today") else rule
