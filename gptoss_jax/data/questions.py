"""Data for GRPO: turn chats into questions. A model answers them, a reward function scores them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from gptoss_jax import harmony
from gptoss_jax.config import Config, dates
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.reading import before_answer
from gptoss_jax.data.sources import Record
from gptoss_jax.data.windows import Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer


@dataclass(frozen=True)
class Asked:
    """A question: the prompt for the model, and what a reward function may need to know."""

    prompt: list[int]  # token ids up to and including <|start|>assistant
    question: str  # the last message of the user, for people to read
    record: dict[str, Any]  # all fields of the record, as in the file
    where: str  # file:line
    tools: Any = None  # of the chat, as `harmony.render_prompt` takes them


@dataclass
class Round:
    """Questions that are asked together. Steps that train on the same answers share one round."""

    number: int  # counts from 0
    questions: list[Asked]
    answers: dict[str, Any] | None = None  # fits JSON; set by the code that samples the answers


class Questions:
    """The endless rounds of `data.train`, of batch_size / group_size questions each.

    Every epoch is a permutation, so a round is a pure function of the data, the seed and its
    number. Each round is returned `objective.grpo.updates` times. The question is the chat without
    the assistant's turn at its end, if there is one. A question that leaves no room for
    `objective.grpo.max_tokens` tokens in sequence_length is left out, or refused if
    `data.on_long=refuse`.
    """

    source_names: tuple[str, ...] = ()  # there are no mixtures

    def __init__(self, config: Config) -> None:
        """Open the data and prepare the first round. Raises `UserError` for bad data."""
        self._config, grpo = config, config.objective.grpo
        self._examples = open_examples(config)
        self._encoding = tokenizer.get_tokenizer(config.model.vocab_size)
        self._order = Windows(self._examples, seed=config.train.seed)
        self._count = config.data.batch_size // grpo.group_size
        self._room = config.data.sequence_length - grpo.max_tokens
        if self._room < 1:
            raise UserError(
                f"objective.grpo.max_tokens ({grpo.max_tokens}) leaves no room for a question in "
                f"data.sequence_length ({config.data.sequence_length}): a row has both"
            )
        if config.data.on_long == "refuse":
            for i in range(len(self._examples)):
                self._read(self._examples.record(i))  # raises
        self._number = self._place = self._left = 0
        self._round, self._next = self._ask(0, 0)

    def __iter__(self) -> Questions:
        """Return itself."""
        return self

    def __next__(self) -> Round:
        """Return the round of the next step."""
        if not self._left:
            if self._round.number != self._number:
                self._round, self._next = self._ask(self._number, self._place)
            self._left = self._config.objective.grpo.updates
        self._left -= 1
        asked = self._round
        if not self._left:
            self._number, self._place = self._number + 1, self._next
        return asked

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next step's round; the value fits JSON.

        If steps of the round remain, the state includes its answers, because the parameters that
        produced them no longer exist.
        """
        state = {"round": self._number, "place": self._place, "left": self._left}
        if self._left and self._round.answers is not None:
            state["answers"] = copy.deepcopy(self._round.answers)
        return state

    def set_state(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Continue from a state, which must come from the same settings and records.

        If some records have `changed`, the questions of the round in progress are asked again.
        """
        self._number, self._place = state["round"], state["place"]
        self._left = state["left"]
        self._round, self._next = self._ask(self._number, self._place)
        self._round.answers = None if changed else copy.deepcopy(state.get("answers"))

    def close(self) -> None:
        """Do nothing: there are no background threads to stop."""

    def _ask(self, number: int, place: int) -> tuple[Round, int]:
        """Make a round of the shuffled records from `place` on; return it and the place after."""
        questions: list[Asked] = []
        missed = 0
        self._examples.records.check_unchanged()
        while len(questions) < self._count:
            asked = self._read(self._examples.record(self._order.record(place)))
            place, missed = place + 1, 0 if asked else missed + 1
            if asked:
                questions.append(asked)
            if missed == len(self._examples):
                raise UserError(
                    f"data.train has no question: none of its {missed:,} records is a chat that, "
                    f"with objective.grpo.max_tokens ({self._config.objective.grpo.max_tokens}), "
                    f"is at most data.sequence_length ({self._config.data.sequence_length}) long"
                )
        return Round(number, questions), place

    def _read(self, record: Record | None) -> Asked | None:
        """Return a record as a question; None if it is left out, or gone."""
        if record is None:
            return None
        fields, config = record.fields, self._config
        messages = before_answer(fields.get("messages", []))
        try:
            prompt = harmony.render_prompt(
                messages,
                tools=fields.get("tools"),
                reasoning=fields.get("reasoning") or config.data.reasoning,
                date=dates.in_training(config.data.date, fields.get("date")),
                history=config.data.history,
                tokenizer=self._encoding,
            )
        except UserError as error:
            self._examples.records.bad(record.where, str(error))
            return None
        if len(prompt) > self._room:
            if config.data.on_long == "refuse":
                raise UserError(
                    f"{record.where}: {len(prompt):,} tokens and objective.grpo.max_tokens "
                    f"({config.objective.grpo.max_tokens}) are longer than data.sequence_length "
                    f"({config.data.sequence_length:,}); shorten it, raise that, or set "
                    "data.on_long=truncate, which leaves it out"
                )
            return None
        texts = [m["content"] for m in messages if m["role"] == "user" and m.get("content")]
        question, tools = texts[-1] if texts else "", fields.get("tools")
        return Asked(prompt, question, record.columns, record.where, tools)


def describe(config: Config) -> str:
    """Describe in one line what `data.train` holds, and how many questions a step asks."""
    examples = open_examples(config)
    records = examples.records
    group = config.objective.grpo.group_size
    text = (
        f"data.train: {len(records):,} questions; {config.data.batch_size // group:,} a step, "
        f"{group} answers each of at most {config.objective.grpo.max_tokens:,} tokens"
    )
    more = [records.skip_summary(), examples.mended.describe() if examples.mended else ""]
    return "; ".join([text, *filter(None, more)])
