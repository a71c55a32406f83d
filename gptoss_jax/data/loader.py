"""Records to batches: shuffled, packed, resumable and split over hosts, on grain.

An epoch is a permutation of the records drawn from (seed, epoch). It is cut into windows of about
`data.pack_window` records, each packed into rows by itself; the rows of window after window and
epoch after epoch make up one endless sequence, of which step s takes rows s*B to (s+1)*B. Nothing
of an epoch is lost or seen twice; the price is that a window's last row or so is not full. All this
depends on the data and the seed alone, and each host takes its part of the rows of a step: a batch
is a pure function of (seed, step). Every host tokenises all records, since packing needs the
lengths.
"""

from __future__ import annotations

import hashlib
import weakref
from dataclasses import dataclass
from typing import Any

import grain

from gptoss_jax import harmony, tokenizer
from gptoss_jax.config import Config
from gptoss_jax.data.examples import Examples, open_examples
from gptoss_jax.data.packing import Segment, fill, pack
from gptoss_jax.errors import UserError
from gptoss_jax.types import Batch

Row = list[Segment]

WINDOWS_AHEAD = 1  # tokenised and packed in the background while one is in use
BATCHES_AHEAD = 4


class Windows:
    """The endless sequence of packed windows; `windows[w]` is the rows of window w.

    Costs the tokenising of that window's records alone.
    """

    def __init__(self, examples: Examples, *, seed: int) -> None:
        """Plan windows over `examples` in the order that `seed`, any integer, gives."""
        self.examples, self.stopped = examples, False
        n = len(examples)
        # grain shuffles epoch e by seed + e: hashing keeps neighbouring seeds' epochs apart.
        hashed = int.from_bytes(hashlib.sha256(str(seed).encode()).digest()[:4], "big")
        self._order = grain.MapDataset.range(n).shuffle(seed=hashed).repeat()
        # Of equal size, so that no epoch ends in a window of a few records, which packs badly.
        self.per_epoch = -(-n // examples.config.pack_window)

    def record(self, k: int) -> int:
        """Return the index of the record at place k of the endless shuffled sequence."""
        index = self._order[k]
        assert index is not None  # grain's None stands for a filtered element: there are none
        return index

    def __getitem__(self, w: int) -> list[Row]:
        """Return the rows of window w, in random order."""
        n = len(self.examples)
        epoch, i = divmod(w, self.per_epoch)
        places = range(i * n // self.per_epoch, (i + 1) * n // self.per_epoch)
        segments: Row = []
        for k in places:
            if self.stopped:
                raise RuntimeError("the data loader is closed")
            segments += self.examples[self.record(epoch * n + k)]
        lengths = [len(s.tokens) for s in segments]
        rows = pack(lengths, self.examples.config.sequence_length)
        return [[segments[k] for k in row] for row in rows]


class _WindowIterator(grain.DatasetIterator[list[Row]]):
    """Yields windows in turn; the state is the next one's number."""

    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows
        self._next = 0

    def __next__(self) -> list[Row]:
        self._next += 1
        return self._windows[self._next - 1]

    def get_state(self) -> dict[str, int]:
        return {"window": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self._next = state["window"]


class _WindowDataset(grain.IterDataset[list[Row]]):
    def __init__(self, windows: Windows) -> None:
        super().__init__()
        self._windows = windows

    def __iter__(self) -> _WindowIterator:
        return _WindowIterator(self._windows)


class _BatchIterator(grain.DatasetIterator[Batch]):
    """Takes B rows a step from the windows, and lays out rows `first` to `last` of them."""

    def __init__(
        self, parent: grain.DatasetIterator[list[Row]], config: Config, *, first: int, last: int
    ) -> None:
        super().__init__(parent)
        self._parent_iterator = parent
        self._data, self._first, self._last = config.data, first, last
        self._rows: list[Row] | None = None  # of window self._window, read when it is needed
        self._step = self._window = self._row = 0

    def __next__(self) -> Batch:
        chosen: list[Row] = []
        while len(chosen) < self._data.batch_size:
            if self._rows is None:
                self._rows = next(self._parent_iterator)
            end = self._row + self._data.batch_size - len(chosen)
            chosen += self._rows[self._row : end]
            self._row = end
            if end >= len(self._rows):
                self._rows, self._window, self._row = None, self._window + 1, 0
        self._step += 1
        return fill(chosen[self._first : self._last], self._data.sequence_length)

    def get_state(self) -> dict[str, int]:
        return {"step": self._step, "window": self._window, "row": self._row}

    def set_state(self, state: dict[str, int]) -> None:
        self._step, self._window, self._row = state["step"], state["window"], state["row"]
        self._rows = None
        self._parent_iterator.set_state({"window": self._window})


class _BatchDataset(grain.IterDataset[Batch]):
    def __init__(
        self, parent: grain.IterDataset[list[Row]], config: Config, *, first: int, last: int
    ) -> None:
        super().__init__(parent)
        self._config, self._first, self._last = config, first, last

    def __iter__(self) -> _BatchIterator:
        parent = iter(self._parent)
        return _BatchIterator(parent, self._config, first=self._first, last=self._last)


class TrainBatches:
    """The iterator of `train_batches`: endless, over batches of numpy arrays.

    Threads work ahead until `close()`, or until nothing refers to it, or Python exits.
    """

    def __init__(self, examples: Examples, config: Config, *, first: int, last: int) -> None:
        """Serve rows `first` to `last` of each global batch."""
        self.source_names: tuple[str, ...] = ()  # of a mixture, by the index in Batch.sources
        windows = Windows(examples, seed=config.train.seed)
        dataset: Any = _WindowDataset(windows)
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=WINDOWS_AHEAD
        )
        dataset = _BatchDataset(dataset, config, first=first, last=last)
        dataset = grain.experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=BATCHES_AHEAD
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
        """Return the next batch. Raises `UserError` for what only tokenising shows to be bad."""
        return next(self._iterator)

    def get_state(self) -> dict[str, int]:
        """Return where the next batch lies: JSON-able, and the same on every host."""
        return dict(self._iterator.get_state())

    def set_state(self, state: dict[str, int]) -> None:
        """Go on from `state`, of the same data and settings, whatever the number of hosts."""
        self._iterator.set_state(dict(state))

    def close(self) -> None:
        """Stop the threads; there is no going on after this."""
        self._close()


def _stop(windows: Windows, iterators: list[grain.DatasetIterator[Batch]]) -> None:
    windows.stopped = True  # else this waits for a whole window
    iterators.pop().close()


def train_batches(
    config: Config, *, process_index: int = 0, process_count: int = 1
) -> TrainBatches:
    """Iterate without end over the batches of `data.train`.

    A batch is [batch_size / process_count, sequence_length]: this host's rows of the global batch,
    which is the same whatever process_count. To go on from a state costs the tokenising of one
    window. Raises `UserError` for bad data: nearly all of it here, and what only the tokenising of
    large data shows when its batch comes up.
    """
    first, last = _share(config, process_index, process_count)
    examples = open_examples(config)
    _ = examples.stats  # raises
    return TrainBatches(examples, config, first=first, last=last)


def _share(config: Config, process_index: int, process_count: int) -> tuple[int, int]:
    if config.data.batch_size % process_count:
        raise UserError(
            f"data.batch_size ({config.data.batch_size}) is no multiple of the number of hosts "
            f"({process_count})"
        )
    size = config.data.batch_size // process_count
    return process_index * size, (process_index + 1) * size


def eval_batches(config: Config, *, process_index: int = 0, process_count: int = 1) -> list[Batch]:
    """Return the first `train.eval_batches` batches of `data.held_out`, or all if that is 0.

    Always the same ones, in an order of their own that no seed changes, each record at most once.
    The last batch is filled up with rows of padding, whose weights are 0. Empty if no held-out data
    is given. Raises `UserError` for bad data.
    """
    if not config.data.held_out:
        return []
    first, last = _share(config, process_index, process_count)
    examples = open_examples(config, held_out=True)
    _ = examples.stats  # raises
    windows, size = Windows(examples, seed=0), config.data.batch_size
    rows: list[Row] = []
    limit = config.train.eval_batches * size
    for w in range(windows.per_epoch):
        rows += windows[w]
        if limit and len(rows) >= limit:
            rows = rows[:limit]
            break
    rows += [[]] * (-len(rows) % size)
    return [
        fill(rows[at + first : at + last], config.data.sequence_length)
        for at in range(0, len(rows), size)
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
    turn that ends in it (its analysis is left to the model). Left out: texts, chats that end in a
    tool call or without an answer, and those that leave `train.eval_max_tokens` no room in the
    context. Empty if no held-out data is given. Raises `UserError` for bad data.
    """
    if not config.data.held_out or limit <= 0:
        return []
    examples = open_examples(config, held_out=True)
    encoding = tokenizer.get_tokenizer(config.model.vocab_size)
    questions: list[Question] = []
    windows = Windows(examples, seed=0)
    for k in range(len(examples)):
        record = examples.records[windows.record(k)]
        messages, answer = _split_answer(record.fields.get("messages", []))
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
