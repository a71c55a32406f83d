"""Make batches of rows, with grain: resumable, and split over hosts.

The packed rows of a source (`data/windows.py`) make up one endless sequence; in a mixture, the
sources take turns (`data/mixture.py`). Step s takes rows s*B to (s+1)*B of the sequence. The
sequence depends on the data and the seed alone, so a batch is a pure function of (seed, step). Each
host takes its part of the rows of a step. Every host tokenises all records, because packing needs
their lengths.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grain

from gptoss_jax import harmony
from gptoss_jax.config import Config, dates
from gptoss_jax.data import preferences
from gptoss_jax.data.examples import Source, open_examples, open_sources
from gptoss_jax.data.mixture import Mixture, plan
from gptoss_jax.data.packing import Row, fill
from gptoss_jax.data.windows import PackedRow, Rows, WindowDataset, Windows
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.types import Batch

WINDOWS_AHEAD = 1  # windows tokenised and packed in the background while one is in use
BATCHES_AHEAD = 4  # batches prepared in the background


class _BatchIterator(grain.DatasetIterator[Batch]):
    """Takes B rows from the sources in each step, and lays out rows `first` to `last` - 1 of them.

    The state is {"step", "window", "row", "seen"}, or for a mixture {"step", "sources": [{"window",
    "row", "seen", "tokens"}, ...]}. "seen" has the segments of the window that were used.
    """

    def __init__(
        self,
        windows: Sequence[grain.DatasetIterator[list[PackedRow]]],
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
        states = [rows.get_state() for rows in self._rows]
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
            rows.set_state(source, changed=state.get("changed", False))


class _BatchDataset(grain.IterDataset[Batch]):
    def __init__(
        self,
        windows: Sequence[grain.IterDataset[list[PackedRow]]],
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
    """The endless iterator of `train_batches` over batches of numpy arrays.

    `Batch.sources` holds indices into `source_names`; without a mixture, `source_names` is empty
    and `Batch.sources` is None. Background threads prepare batches until `close()` is called, the
    iterator is garbage-collected, or Python exits.
    """

    def __init__(self, sources: Sequence[Source], config: Config, *, first: int, last: int) -> None:
        """Serve rows `first` to `last` - 1 of each global batch."""
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
        # The iterator is in a list, which `_stop` empties. Otherwise grain's own finaliser would
        # run when Python exits and print errors, because the modules that it uses are gone by then.
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

        Raises `UserError` for a record that only tokenising shows to be bad, and for a file that
        has changed.
        """
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position of the next batch. It fits JSON and is the same on every host."""
        return copy.deepcopy(self._iterator.get_state())

    def set_state(self, state: dict[str, Any], *, changed: bool = False) -> None:
        """Continue from `state`, which must come from the same settings, and from the same records.

        If some of them have `changed`, what was seen stays as it was (`data/mended.py`). The number
        of hosts may differ.
        """
        self._iterator.set_state(copy.deepcopy(state) | {"changed": changed})

    def close(self) -> None:
        """Stop the threads; the iterator can't be used after this."""
        self._close()


def _stop(windows: list[Windows], iterators: list[grain.DatasetIterator[Batch]]) -> None:
    for w in windows:
        w.stopped = True  # otherwise close() waits until a whole window is tokenised
    iterators.pop().close()


def train_batches(config: Config, *, rows: tuple[int, int] | None = None) -> TrainBatches:
    """Iterate without end over the batches of `data.train`, mixed as `data.weights` says.

    A batch is [batch_size, sequence_length]. With `rows` = (first, last + 1), it has only those
    rows of the global batch: the rows that one host of several needs (`data.shards`). The global
    batch is the same on any number of hosts. Resuming from a state costs the tokenising of one
    window of each source.

    Raises `UserError` for bad data. This call finds nearly all of it. Errors that only tokenising
    shows, in large data, are raised when their batch comes up.
    """
    first, last = rows or (0, config.data.batch_size)
    sources = open_sources(config)
    for source in sources:
        _ = source.examples.stats  # raises
    return TrainBatches(sources, config, first=first, last=last)


def eval_batches(config: Config, *, rows: tuple[int, int] | None = None) -> list[Batch]:
    """Return the first `train.eval_batches` batches of `data.held_out`, or all if that is 0.

    The batches are always the same: their order is fixed and does not depend on the seed. Each
    record occurs at most once. The last batch is filled up with rows of padding, whose weights are
    0. `rows` is as in `train_batches`. The list is empty if no held-out data is given. Raises
    `UserError` for bad data.
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
    """A held-out chat as a question: the prompt for the model, and the expected answer."""

    prompt: list[int]  # token ids up to and including <|start|>assistant
    answer: str
    name: str  # file:line


def eval_questions(config: Config, limit: int) -> list[Question]:
    """Turn up to `limit` chats of `data.held_out` into questions; always the same ones.

    The answer is the content of the last assistant message. The prompt is everything before the
    assistant's turn that ends in this message, so the model writes its own analysis. Of a pair, the
    chosen answer is used. Left out are texts, chats that end in a tool call or without an answer,
    and chats whose context has no room for `train.eval_max_tokens` more tokens. The list is empty
    if no held-out data is given. Raises `UserError` for bad data.
    """
    if not config.data.held_out or limit <= 0:
        return []
    examples = open_examples(config, held_out=True)
    encoding = tokenizer.get_tokenizer(config.model.vocab_size)
    questions: list[Question] = []
    windows = Windows(examples, seed=0)
    for k in range(len(examples)):
        record = examples.record(windows.record(k))
        assert record is not None  # held-out data has the records of its files
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
                date=dates.in_training(config.data.date, record.fields.get("date")),
                history=config.data.history,
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
    """Split a chat at its last assistant turn: messages before it, and its final answer or ""."""
    ends = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not ends:
        return [], ""
    start = last = ends[-1]
    while start > 0 and messages[start - 1]["role"] == "assistant":
        start -= 1
    message = messages[last]
    is_final = message.get("channel") in (None, "final") and not message.get("tool_calls")
    return messages[:start], (message.get("content") or "") if is_final else ""
