"""Chats to questions, which a model answers and a reward function judges: data for GRPO."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from gptoss_jax import harmony
from gptoss_jax.config import Config
from gptoss_jax.data.examples import open_examples
from gptoss_jax.data.sources import Record
from gptoss_jax.data.windows import Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer


@dataclass(frozen=True)
class Asked:
    """A question as it is put to the model, and what a reward function is to know of it."""

    prompt: list[int]  # ids up to and with <|start|>assistant
    question: str  # what the user says last, for people
    record: dict[str, Any]  # all fields, as the file has them
    where: str  # file:line


@dataclass
class Round:
    """Questions that are asked at once. The steps on one set of answers have the same one."""

    number: int  # from 0
    questions: list[Asked]
    answers: dict[str, Any] | None = None  # JSON-able; put here by who asked them


class Questions:
    """The endless rounds of `data.train`: batch_size / group_size questions each.

    Every epoch is a permutation, so a round is a pure function of data, seed and its number. Each
    comes `objective.grpo.updates` times. A chat is a question up to the assistant's turn at its
    end, if it ends in one. Left out, or refused where `data.on_long` says so: what leaves
    `objective.grpo.max_tokens` no room in sequence_length.
    """

    source_names: tuple[str, ...] = ()  # there are no mixtures

    def __init__(self, config: Config) -> None:
        """Open the data, and find the first round. Raises `UserError` for bad data."""
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
        """Return where the next step's round lies, with its answers where it has some: JSON-able.

        Answers are kept since the parameters that gave them are gone.
        """
        state = {"round": self._number, "place": self._place, "left": self._left}
        if self._left and self._round.answers is not None:
            state["answers"] = copy.deepcopy(self._round.answers)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from a state, of the same data and settings."""
        self._number, self._place = state["round"], state["place"]
        self._left = state["left"]
        self._round, self._next = self._ask(self._number, self._place)
        self._round.answers = copy.deepcopy(state.get("answers"))

    def close(self) -> None:
        """Do nothing: no thread works ahead."""

    def _ask(self, number: int, place: int) -> tuple[Round, int]:
        """Take the questions from a place of the shuffled records on; return the place after."""
        questions: list[Asked] = []
        missed = 0
        self._examples.records.check_unchanged()
        while len(questions) < self._count:
            asked = self._read(self._examples.records[self._order.record(place)])
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

    def _read(self, record: Record) -> Asked | None:
        """Return a record as a question; None if it is left out."""
        fields, config = record.fields, self._config
        messages = _before_answer(fields.get("messages", []))
        try:
            if not messages:
                raise UserError("no chat with a question: there is nothing to answer")
            prompt = harmony.render_prompt(
                messages,
                tools=fields.get("tools"),
                reasoning=fields.get("reasoning") or config.data.reasoning,
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
        said = [m["content"] for m in messages if m["role"] == "user" and m.get("content")]
        return Asked(prompt, said[-1] if said else "", fields, record.where)


def describe(config: Config) -> str:
    """Say in a line what `data.train` holds, and how it is asked."""
    records = open_examples(config).records
    group = config.objective.grpo.group_size
    text = (
        f"data.train: {len(records):,} questions; {config.data.batch_size // group:,} a step, "
        f"{group} answers each of at most {config.objective.grpo.max_tokens:,} tokens"
    )
    return f"{text}; {records.skip_summary()}" if records.skipped else text


def _before_answer(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a chat without the assistant's messages at its end."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]
