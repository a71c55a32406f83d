"""Rows to batches: resumable and split over hosts, on grain.

The rows of a source's windows (`data/windows.py`) make up one endless sequence; those of a mixture
take turns (`data/mixture.py`). Of the sequence, step s takes rows s*B to (s+1)*B. All this depends
on the data and the seed alone, and each host takes its part of the rows of a step: a batch is a
pure function of (seed, step). Every host tokenises all records, since packing needs the lengths.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain

from gptoss_jax import harmony
from gptoss_jax.config import Config
from gptoss_jax.data import preferences
from gptoss_jax.data.examples import Source, open_examples, open_sources
from gptoss_jax.data.mixture import Mixture, plan
from gptoss_jax.data.packing import Row, fill
from gptoss_jax.data.windows import Rows, WindowDataset, Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.types import Batch

WINDOWS_AHEAD = 1  # tokenised and packed in the background while one is in use
BATCHES_AHEAD = 4


class _BatchIterator(grain.DatasetIterator[Batch]):
    """Takes B rows a step from the sources, and lays out rows `first` to `last` of them.

    The state is {"step", "window", "row"} of the one source there is; or, of a mixture,
    {"step", "sources": [{"window", "row", "tokens"}, ...]}.
    """

    def __init__(
        self,
        windows: Sequence[grain.DatasetIterator[list[Row]]],
        config: Config,
        *,
        first: int,
        last: int,
    ) -> None:
        super().__init__(windows)
        self._data, self._first, self._last = config.data, first, last
        self._rows = [Rows(w) for w in windows]
        self._mixture = Mixture(config.data.weights) if config.data.weights else None
        self._step = 0

    def __next__(self) -> Batch:
        chosen: list[Row] = []
        sources: list[int] = []
        for _ in range(self._data.batch_size):
            source = self._mixture.pick() if self._mixture else 0
            row = self._rows[source].take()
            if self._mixture:
                self._mixture.count(source, row)
            chosen.append(row)
            sources.append(source)
        self._step += 1
        here = slice(self._first, self._last)
        given = sources[here] if self._mixture else None
        return fill(chosen[here], self._data.sequence_length, sources=given)

    def get_state(self) -> dict[str, Any]:
        states: list[dict[str, int]] = [rows.get_state() for rows in self._rows]
        if self._mixture is None:
            return {"step": self._step, **states[0]}
        for state, tokens in zip(states, self._mixture.tokens, strict=True):
            state["tokens"] = tokens
        return {"step": self._step, "sources": states}

    def set_state(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        states = [state] if self._mixture is None else state["sources"]
        if self._mixture:
            self._mixture.tokens = [s["tokens"] for s in states]
        for rows, source in zip(self._rows, states, strict=True):
            rows.set_state(source)


class _BatchDataset(grain.IterDataset[Batch]):
    def __init__(
        self,
        windows: Sequence[grain.IterDataset[list[Row]]],
        config: Config,
        *,
        first: int,
        last: int,
    ) -> None:
        super().__init__(windows)
        self._windows, self._config = windows, config
        self._first, self._last = first, last

    def __iter__(self) -> _BatchIterator:
        windows = [w.__iter__() for w in self._windows]
        return _BatchIterator(windows, self._config, first=self._first, last=self._last)


class TrainBatches:
    """The iterator of `train_batches`: endless, over batches of numpy arrays.

    `source_names` has what `Batch.sources` counts, and is empty where that is None. Threads work
    ahead until `close()`, or until nothing refers to it, or Python exits.
    """

    def __init__(self, sources: Sequence[Source], config: Config, *, first: int, last: int) -> None:
        """Serve rows `first` to `last` of each global batch."""
        mixed = bool(config.data.weights)
        self.source_names = tuple(source.name for source in sources) if mixed else ()
        windows = [plan(source, config) for source in sources]
        ahead = [
            grain.experimental.ThreadPrefetchIterDataset(
                WindowDataset(w), prefetch_buffer_size=WINDOWS_AHEAD
            )
            for w in windows
        ]
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            _BatchDataset(ahead, config, first=first, last=last), prefetch_buffer_size=BATCHES_AHEAD
        )
        # In a list that `_stop` empties: what is left to grain's own finaliser when Python exits
        # fails aloud, since the modules that it uses are gone by then.
        self._iterators: list[grain.DatasetIterator[Batch]] = [dataset.__iter__()]
        self._close = weakref.finalize(self, _stop, windows, self._iterators)

    @property
    def _iterator(self) -> grain.DatasetIterator[Batch]:
        if not self._iterators:
            raise ValueError("these batches are closed")
        return self._iterators[0]

    def __iter__(self) -> TrainBatches:
        """Return itself."""
        return self

    def __next__(self) -> Batch:
        """Return the next batch.

        Raises `UserError` for what only tokenising shows to be bad, and for a file that changed.
        """
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return where the next batch lies: JSON-able, and the same on every host."""
        return copy.deepcopy(self._iterator.get_state())

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from `state`, of the same data and settings, whatever the number of hosts."""
        self._iterator.set_state(copy.deepcopy(state))

    def close(self) -> None:
        """Stop the threads; there is no going on after this."""
        self._close()


def _stop(windows: list[Windows], iterators: list[grain.DatasetIterator[Batch]]) -> None:
    for w in windows:
        w.stopped = True  # else this waits for a whole window
    iterators.pop().close()


def train_batches(config: Config, *, rows: tuple[int, int] | None = None) -> TrainBatches:
    """Iterate without end over the batches of `data.train`, mixed as `data.weights` says.

    A batch is [batch_size, sequence_length]; with `rows`, (first, last + 1), those rows of it: what
    one host of several needs (`data.shards`) of a global batch that is the same on any number of
    hosts. To go on from a state costs the tokenising of one window of each source. Raises
    `UserError` for bad data: nearly all of it here, and what only the tokenising of large data
    shows when its batch comes up.
    """
    first, last = rows or (0, config.data.batch_size)
    sources = open_sources(config)
    for source in sources:
        _ = source.examples.stats  # raises
    return TrainBatches(sources, config, first=first, last=last)


def eval_batches(config: Config, *, rows: tuple[int, int] | None = None) -> list[Batch]:
    """Return the first `train.eval_batches` batches of `data.held_out`, or all if that is 0.

    Always the same ones, in an order of their own that no seed changes, each record at most once.
    The last batch is filled up with rows of padding, whose weights are 0. `rows` are as those of
    `train_batches`. Empty if no held-out data is given. Raises `UserError` for bad data.
    """
    if not config.data.held_out:
        return []
    first, last = rows or (0, config.data.batch_size)
    examples = open_examples(config, held_out=True)
    _ = examples.stats  # raises
    windows, size = Windows(examples, seed=0), config.data.batch_size
    packed: list[Row] = []
    limit = config.train.eval_batches * size
    for w in range(windows.per_round):
        packed += windows[w]
        if limit and len(packed) >= limit:
            packed = packed[:limit]
            break
    packed += [[]] * (-len(packed) % size)
    return [
        fill(packed[at + first : at + last], config.data.sequence_length)
        for at in range(0, len(packed), size)
    ]


@dataclass(frozen=True)
class Question:
    """A held-out chat as a question: what the model is given, and what it should say."""

    prompt: list[int]  # ids up to and with <|start|>assistant
    answer: str
    name: str  # file:line


def eval_questions(config: Config, limit: int) -> list[Question]:
    """Turn up to `limit` chats of `data.held_out` into questions; always the same ones.

    The answer is the content of the last assistant message, the prompt all before the assistant's
    turn that ends in it (its analysis is left to the model); of a pair that is the chosen one. Left
    out: texts, chats that end in a tool call or without an answer, and those that leave
    `train.eval_max_tokens` no room in the context. Empty if no held-out data is given. Raises
    `UserError` for bad data.
    """
    if not config.data.held_out or limit <= 0:
        return []
    examples = open_examples(config, held_out=True)
    encoding = tokenizer.get_tokenizer(config.model.vocab_size)
    questions: list[Question] = []
    windows = Windows(examples, seed=0)
    for k in range(len(examples)):
        record = examples.records[windows.record(k)]
        chat = record.fields.get("messages", [])
        if examples.pairs:
            chat = preferences.question(record.fields)
        messages, answer = _split_answer(chat)
        if not answer:
            continue
        try:
            prompt = harmony.render_prompt(
                messages,
                tools=record.fields.get("tools"),
                reasoning=record.fields.get("reasoning") or config.data.reasoning,
                tokenizer=encoding,
            )
        except UserError as error:
            examples.records.bad(record.where, str(error))
            continue
        if len(prompt) + config.train.eval_max_tokens <= config.model.context:
            questions.append(Question(prompt, answer, record.where))
        if len(questions) == limit:
            break
    return questions


def _split_answer(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Split a chat at its last assistant turn: messages before it, and its final content or ""."""
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not ends:
        return [], ""
    start = last = ends[-1]
    while start > 0 and messages[start - 1]["role"] == "assistant":
        start -= 1
    message = messages[last]
    is_final = message.get("channel") in (None, "final") and not message.get("tool_calls")
    return messages[:start], (message.get("content") or "") if is_final else ""
