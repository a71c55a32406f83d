"""Turn records into token segments with loss weights, and count what the data holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax import harmony
from gptoss_jax.config import Config, DataConfig, dates
from gptoss_jax.data import mended, preferences
from gptoss_jax.data.entries import entries, resolve
from gptoss_jax.data.indexing import Stamp, progress
from gptoss_jax.data.packing import Segment
from gptoss_jax.data.reading import Reading
from gptoss_jax.data.sources import Record, Records, stamp
from gptoss_jax.errors import UserError
from gptoss_jax.harmony import tokenizer
from gptoss_jax.harmony.messages import Message

# Bytes of a token of English text under o200k. It sizes the stretches of a .txt file (the chunks
# that `Records` cuts it into) so that each fills about one row.
BYTES_PER_TOKEN = 4
CACHE_TOKENS = 16 << 20  # tokens of records kept in memory: 128 MiB at 8 bytes a token
SURVEY_BYTES = 8 << 20  # data up to this size is tokenised as a whole before training starts
SURVEY_RECORDS = 1_000  # records of larger data that are tokenised instead, spread evenly


@dataclass(frozen=True)
class Stats:
    """Counts over `records` records, after truncation."""

    records: int
    tokens: int
    trained: int  # tokens whose loss weight as a target is above 0
    cut: int  # records truncated
    untrained: int  # records left out because none of their tokens is trained
    turns: int = 0  # turns of the assistant that are not trained, as their analysis is left out


class Examples:
    """The token segments of each record: `examples[i]` is a list of `packing.Segment`.

    The records are those of the files, in their order. If a run is continued on files that have
    changed, they are the run's records, wherever these lie now (`data/mended.py`); a record that
    is gone has no segment.

    - A chat gives one segment, its Harmony tokens. If it is longer than sequence_length, it is
      truncated or refused, as `data.on_long` says.
    - A {"text"} record gives one segment: its tokens, then <|endoftext|>, all trained. It is
      truncated or refused likewise.
    - A stretch of a .txt file (see `Records`) gives as many segments as it needs, each of at most
      sequence_length tokens. Each starts with the last token of the one before, so that every token
      is a target once. Only the last stretch of the file ends in <|endoftext|>.
    - A pair gives two segments, chosen and rejected (`data/preferences.py`), which together fit
      into a row. It is left out if truncation leaves either with nothing to train, or makes both
      the same.

    A segment with no trained token is left out. Raises `UserError` that names file and line if a
    record can't be rendered, is too long, or is a pair whose sides are the same.
    """

    def __init__(
        self,
        records: Records,
        config: DataConfig,
        *,
        vocab_size: int,
        field: str,
        cache_tokens: int,
        since: Sequence[int] | None = None,
    ) -> None:
        """Tokenise `records` on demand for a model of `vocab_size`.

        `field` names the data in messages. Up to `cache_tokens` tokens are kept in memory. `since`
        has the hashes of the records of a run that is continued. If most of them are gone, it is
        not used, and `follows` is False.
        """
        self.records, self.config, self.field = records, config, field
        self.mended = None if since is None else mended.align(since, records.hashes)
        self.follows = self.mended is not None
        self._cache_tokens = cache_tokens
        self._encoding = tokenizer.get_tokenizer(vocab_size)
        self._end = tokenizer.special_id(self._encoding, "<|endoftext|>")
        self._cache: dict[int, list[Segment]] = {}
        self._cached_tokens = 0
        self._bad: set[int] = set()
        self._truncated: set[int] = set()
        self._turns: dict[int, int] = {}  # untrained turns of each record that has some

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.mended.places if self.mended else self.records)

    def place(self, i: int) -> int:
        """Return the index of record `i` among `records`; -1 if it is gone."""
        return int(self.mended.places[i]) if self.mended else i

    def record(self, i: int) -> Record | None:
        """Read record `i`; None if it is gone."""
        place = self.place(i)
        return None if place < 0 else self.records[place]

    def __getitem__(self, i: int) -> list[Segment]:
        """Return the segments of record `i`: none if it has nothing to train, or is bad."""
        segments = self._cache.get(i)
        if segments is None:
            whole = [] if self.pairs else self.tokenise(i)
            segments = self._pair(i) if self.pairs else [s for w in whole for s in self.cut(i, w)]
            size = sum(len(s.tokens) for s in segments)
            if self._cached_tokens + size <= self._cache_tokens:
                self._cached_tokens += size
                self._cache[i] = segments
        return segments

    @property
    def pairs(self) -> bool:
        """Whether the records are pairs: both segments of a pair then share a row."""
        return self.records.pairs

    def tokenise(self, i: int) -> list[Segment]:
        """Return all tokens of record `i` and their loss weights; nothing if it is bad.

        With `data.turns=split`, each turn of a chat is a segment of its own.
        """
        record = self.record(i)
        if record is None:
            return []
        try:
            found = self._encode(record, i)
        except UserError as error:  # no check found it: indexing accepts what is rendered
            self._bad.add(i)
            self.records.bad(record.where, str(error))
            return []
        return [Segment(np.array(t, np.int32), np.array(w, np.float32)) for t, w in found]

    def _encode(self, record: Record, i: int) -> list[tuple[list[int], list[float]]]:
        fields = record.fields
        if "messages" in fields:
            options, given = self._options(fields), fields.get("given", 0)
            if self.config.turns != "split":
                self._count_turns(i, record, fields["messages"], given)
                return [harmony.render(fields["messages"], given=given, **options)]
            chats = harmony.split_turns(fields["messages"])
            return [harmony.render(chat, given=min(given, len(chat)), **options) for chat in chats]
        return [self._encode_text(record)]

    def _count_turns(self, i: int, record: Record, chat: list[Message], given: int) -> None:
        if self.config.turns == "all":
            tools, history = record.fields.get("tools"), self.config.history
            count = harmony.count_untrained(chat, tools, history=history, given=given)
            if count:
                self._turns[i] = self._turns.get(i, 0) + count

    def _encode_text(self, record: Record) -> tuple[list[int], list[float]]:
        fields = record.fields
        spelled = harmony.spelled(fields["text"]) is not None
        if spelled and not self.config.plain_special_tokens:
            return harmony.read_rendering(
                fields["text"],
                train_on=self.config.train_on,
                turns="last" if self.config.turns == "last" else "all",
                tokenizer=self._encoding,
            )
        tokens = self._encoding.encode_ordinary(fields["text"])
        if record.ends:
            tokens.append(self._end)
        return tokens, [1.0] * len(tokens)

    def _options(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {
            "tools": fields.get("tools"),
            "reasoning": fields.get("reasoning") or self.config.reasoning,
            "train_on": self.config.train_on,
            "turns": "all" if self.config.turns == "all" else "last",
            "history": self.config.history,
            "date": dates.in_training(self.config.date, fields.get("date")),
            "tokenizer": self._encoding,
        }

    def _pair(self, i: int) -> list[Segment]:
        """Return the two segments of pair `i`, or none if it is bad or left out."""
        record, limit = self.record(i), self.config.sequence_length
        if record is None:
            return []
        try:
            chosen, rejected = preferences.render(record.fields, **self._options(record.fields))
            prompt, *answers = preferences.split(record.fields)
            for answer in answers:
                self._count_turns(i, record, [*prompt, *answer], len(prompt))
        except UserError as error:
            self._bad.add(i)
            self.records.bad(record.where, str(error))
            return []
        length = len(chosen.tokens) + len(rejected.tokens)
        if length > limit:
            self._check_long(i, length, "chosen and rejected, ")
        sides = preferences.fit(chosen, rejected, limit)
        trains = all(side.weights[1:].any() for side in sides)
        return list(sides) if trains and preferences.differ(*sides) else []

    def _check_long(self, i: int, length: int, what: str = "") -> None:
        """Refuse a record that is too long, or note that it is truncated (`data.on_long`)."""
        if self.config.on_long == "refuse":
            raise UserError(
                f"{self.records.where(self.place(i))}: {what}{length:,} tokens are longer than "
                f"data.sequence_length ({self.config.sequence_length:,}); shorten it, raise that, "
                "or set data.on_long=truncate"
            )
        self._truncated.add(i)

    def cut(self, i: int, whole: Segment) -> list[Segment]:
        """Cut the tokens of record `i` into segments of at most sequence_length tokens.

        Segments with no trained token are left out.
        """
        limit, (tokens, weights) = self.config.sequence_length, whole
        starts = range(1)
        if len(tokens) > limit:
            if self.records.running(self.place(i)):
                starts = range(0, len(tokens) - 1, max(1, limit - 1))
            else:
                self._check_long(i, len(tokens))
        pieces = [Segment(tokens[s : s + limit], weights[s : s + limit]) for s in starts]
        return [piece for piece in pieces if piece.weights[1:].any()]

    @cached_property
    def stats(self) -> Stats:
        """Tokenise the data, or a sample of large data, and count records and tokens.

        With `data.on_long=refuse`, all of the data is tokenised, so that a record that is too long
        stops the run before training and not hours into it. Raises `UserError` if no token at all
        is trained.
        """
        n = len(self)
        step = 1
        if self.records.num_bytes > SURVEY_BYTES and self.config.on_long != "refuse":
            step = max(1, n // SURVEY_RECORDS)
        stats = self._count(range(0, n, step))
        if step > 1 and not stats.trained:
            stats = self._count(range(n))
        if not stats.trained:
            bad = f"; {self.records.skip_summary()}" if self.records.skipped else ""
            raise UserError(
                f"{self.field}: no token of its {n:,} records is trained; data.train_on is "
                f"{', '.join(self.config.train_on) or 'empty'}, and data.sequence_length "
                f"{self.config.sequence_length}{bad}"
            )
        return stats

    def _count(self, chosen: range) -> Stats:
        tokens = trained = untrained = 0
        size = self.records.num_bytes // len(self)
        with progress("tokenising " + self.field, size * len(chosen)) as advance:
            for i in chosen:
                segments = self[i]
                tokens += sum(len(s.tokens) for s in segments)
                trained += sum(int(np.count_nonzero(s.weights[1:])) for s in segments)
                untrained += not segments
                advance(size)
        cut = sum(i in self._truncated for i in chosen)
        untrained -= sum(i in self._bad or self.place(i) < 0 for i in chosen)
        turns = sum(self._turns.get(i, 0) for i in chosen)
        return Stats(len(chosen), tokens, trained, cut, untrained, turns)


@dataclass(frozen=True)
class Source:
    """A source of the training data: one entry of a mixture, or all data if there is none."""

    index: int
    name: str
    examples: Examples


def open_examples(config: Config, *, held_out: bool = False) -> Examples:
    """Open all files of `data.train` (or of `data.held_out`) as one data set.

    A second call is cheap as long as the files do not change. Raises `UserError` as
    `entries.resolve`, `Records` and `get_tokenizer` do.
    """
    field = "data.held_out" if held_out else "data.train"
    files = resolve(config.data.held_out if held_out else config.data.train, field=field)
    since = None if held_out else _since(config)
    settings = _settings(config, held_out=held_out)
    return _open((_stamped(files, field),), *settings, since)[0]


def open_sources(config: Config) -> tuple[Source, ...]:
    """Open the sources of `data.train`: one for each entry of a mixture, else one for all entries.

    It is a mixture if `data.weights` is set. Raises `UserError` as `open_examples` does.
    """
    if not config.data.weights:
        return (Source(0, "", open_examples(config)),)
    found = entries(config.data.train)
    groups = tuple(_stamped(entry.files, f"data.train ({entry.name})") for entry in found)
    opened = _open(groups, *_settings(config), _since(config))
    named = zip(found, opened, strict=True)
    return tuple(Source(i, entry.name, examples) for i, (entry, examples) in enumerate(named))


_Stamped = tuple[str, tuple[tuple[Path, Stamp], ...]]  # a name for messages, and stamped files


def _stamped(files: Sequence[Path], field: str) -> _Stamped:
    return field, tuple((path, stamp(path)) for path in files)


def _since(config: Config) -> tuple[Path, Stamp] | None:
    """Return the file with the records of the config's run, if the run has begun."""
    path = Path(config.run_folder) / mended.FILE
    return (path, stamp(path)) if mended.has_begun(path.parent) and path.exists() else None


def _settings(config: Config, *, held_out: bool = False) -> tuple[DataConfig, int, str]:
    records = config.objective.kind.records
    if held_out and records == "questions":
        records = "examples"  # the held-out loss is of all chats and texts
    return config.data, config.model.vocab_size, records


@lru_cache(maxsize=2)  # one for the training data, one for the held-out data
def _open(
    groups: tuple[_Stamped, ...],
    config: DataConfig,
    vocab_size: int,
    records: str,
    since: tuple[Path, Stamp] | None,
) -> tuple[Examples, ...]:
    opened = []
    kept = None if since is None else mended.read(since[0].parent)
    if kept is None or len(kept) != len(groups):
        kept = [None] * len(groups)
    for (field, stamped), hashes in zip(groups, kept, strict=True):
        read = Records(
            [path for path, _ in stamped],
            field=field,
            stretch_bytes=BYTES_PER_TOKEN * config.sequence_length,
            skip_bad=config.on_bad_record == "skip",
            reading=Reading(
                pairs=records == "pairs",
                questions=records == "questions",
                ignore=config.ignore,
                plain_special_tokens=config.plain_special_tokens,
                vocab_size=vocab_size,
                dated=config.date == "record",
            ),
            whole=records == "questions",  # a reward function may read any column
        )
        room = CACHE_TOKENS // len(groups)
        opened.append(
            Examples(
                read,
                config,
                vocab_size=vocab_size,
                field=field,
                cache_tokens=room,
                since=hashes,
            )
        )
    return tuple(opened)
