"""The rules by which a checkpoint's prompts are written: those with which it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gptoss_jax import harmony
from gptoss_jax.config import dates
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.tokenizer import CHAT_TEMPLATE
from gptoss_jax.loading.folders import find_folder
from gptoss_jax.runs import records


class PromptRules(NamedTuple):
    """`data.history` and `data.date` of the run, or what stands for them."""

    history: str
    date: str

    def date_of(self, given: str | None) -> str:
        """Return the rule for a prompt whose record has the date `given`, as YYYY-MM-DD.

        The record's date counts where training took it, and where no run says which day it named:
        a run that named the day it began on has "today=YYYY-MM-DD", and never "today" alone.
        """
        return given if given is not None and self.date in ("record", "today") else self.date

    def template(self) -> str:
        """Return the chat template that follows these rules."""
        return harmony.chat_template(history=self.history, date=dates.of_template(self.date))

    def describe(self) -> str:
        """Say the rules in a few words."""
        date = dates.of_template(self.date)
        named = {"none": "no date", "today": "today's date"}.get(date, f"the date {date}")
        return f"earlier analysis by the rule {self.history}; {named}"


# A checkpoint without a record: OpenAI's servers write today's date, and trained so.
UNRECORDED = PromptRules("harmony", "today")


def read_rules(checkpoint: str | Path, *, step: int | None = None) -> PromptRules:
    """Return the rules of a workdir's run, or those of the chat template that we exported.

    For any other folder they are `UNRECORDED`. Raises UserError as `find_folder` and `read_record`.
    """
    folder = find_folder(checkpoint)
    if records.is_workdir(folder):
        data = records.read_record(folder, step).config.data
        return PromptRules(data.history, data.date)
    return _read_template(folder) or UNRECORDED


def describe_template(folder: str | Path) -> str:
    """Say in a line which chat template a folder has."""
    rules = _read_template(Path(folder))
    if rules is not None:
        return f"chat template: ours ({rules.describe()})"
    if (Path(folder) / CHAT_TEMPLATE).is_file():
        return "chat template: copied"
    return "chat template: none"


def _read_template(folder: Path) -> PromptRules | None:
    file = folder / CHAT_TEMPLATE
    if not file.is_file():
        return None
    try:
        rules = harmony.template_rules(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: can't be read: {error}") from None
    return PromptRules(*rules) if rules else None
