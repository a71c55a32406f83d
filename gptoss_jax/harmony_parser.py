"""Harmony messages out of sampled ids, one id at a time.

A sampler may give any ids whatever, so nothing here raises: a broken header gives what can be read
from it, and every id stays with the message that it came in.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tiktoken

from gptoss_jax.tokenizer import decode, get_tokenizer, special_id, token_bytes

ROLES = ("system", "developer", "user", "assistant", "tool")
CHANNELS = ("analysis", "commentary", "final")

_ENDS = ("<|end|>", "<|return|>", "<|call|>")


@dataclass(frozen=True)
class Header:
    """What stands before `<|message|>`. A tool's role is "tool", and `name` says which tool."""

    role: str = "assistant"
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None  # with `<|constrain|>` before it if that was sampled


@dataclass(frozen=True)
class ParsedMessage:
    """One whole message.

    `stop` is its end token's name, None where the ids broke off. `ids` are all ids from `<|start|>`
    on (from what follows `<|start|>assistant` for the first message after a prompt), the end token
    and whatever came between it and the next `<|start|>` included.
    """

    header: Header
    content: str
    stop: str | None
    ids: tuple[int, ...]


@dataclass(frozen=True)
class MessageStart:
    """The header is whole: the content begins."""

    header: Header


@dataclass(frozen=True)
class TextDelta:
    """More of the content: never a part of a character, never empty."""

    text: str


@dataclass(frozen=True)
class MessageEnd:
    """The message is whole."""

    message: ParsedMessage


Event = MessageStart | TextDelta | MessageEnd


class StreamParser:
    """Parse what a model samples after a prompt that ends in `<|start|>assistant`.

    With `after_prompt=False`, ids that begin with a whole message. `messages` are those that have
    ended; their ids and then `pending` are all ids processed, in their order.
    """

    def __init__(
        self, tokenizer: tiktoken.Encoding | None = None, *, after_prompt: bool = True
    ) -> None:
        self.messages: list[ParsedMessage] = []
        self.pending: list[int] = []
        self._encoding = tokenizer or get_tokenizer()
        self._start = special_id(self._encoding, "<|start|>")
        self._message = special_id(self._encoding, "<|message|>")
        self._ends = {special_id(self._encoding, name): name for name in _ENDS}
        self._header_ids: list[int] | None = [] if after_prompt else None  # None: not in a header
        self._role = "assistant" if after_prompt else None  # given by the prompt
        self._header: Header | None = None  # None: not in the content
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def process(self, token: int) -> list[Event]:
        """Take the next id; return what it brought about. Never raises.

        An id that the tokenizer lacks reads as U+FFFD. `<|start|>` ends a message that had no end
        token; a message without `<|message|>` has as content what is no header of its text.
        """
        token = int(token)
        if token == self._start:
            events = self._close(None)
            self.pending.append(token)
            self._header_ids, self._role = [], None
            return events
        self.pending.append(token)
        if self._header is not None:
            if token in self._ends:
                return self._close(self._ends[token])
            return self._add_text(self._utf8.decode(token_bytes(self._encoding, token)))
        if self._header_ids is not None:
            if token in self._ends:
                return self._close(self._ends[token])
            if token != self._message:
                self._header_ids.append(token)
                return []
            self._header, _ = parse_header(self._encoding, self._header_ids, self._role)
            self._header_ids = None
            return [MessageStart(self._header)]
        if self.messages:  # between two messages: no place for text
            last = self.messages[-1]
            self.messages[-1] = dataclasses.replace(last, ids=(*last.ids, *self.pending))
            self.pending = []
        return []

    def finish(self) -> list[Event]:
        """End a message that broke off, as when the budget of tokens is spent."""
        return self._close(None) if self.pending else []

    def _add_text(self, text: str) -> list[Event]:
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text)]

    def _close(self, stop: str | None) -> list[Event]:
        """End the open message, if there is one."""
        events: list[Event] = []
        if self._header is not None:
            events += self._add_text(self._utf8.decode(b"", final=True))
            header, content = self._header, "".join(self._text)
        elif self._header_ids is not None and self.pending:
            header, content = parse_header(
                self._encoding, self._header_ids, self._role, closed=False
            )
            events.append(MessageStart(header))
            if content:
                events.append(TextDelta(content))
        else:
            return events
        message = ParsedMessage(header, content, stop, tuple(self.pending))
        self.messages.append(message)
        self.pending, self._text = [], []
        self._header_ids = self._header = None
        return [*events, MessageEnd(message)]


def parse_header(
    encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None, *, closed: bool = True
) -> tuple[Header, str]:
    """Read a header; return it, and its words that say nothing.

    `role` is that of a prompt, None where the header itself begins with one. The recipient may
    stand before the channel (as rendered) or after it (as sampled). The last word is the content
    type, but in a header that is not `closed` by `<|message|>` it may be content.
    """
    channel_id = special_id(encoding, "<|channel|>")
    constrain_id = special_id(encoding, "<|constrain|>")
    sections: dict[int | None, list[int]] = {None: []}
    section: int | None = None
    for i in ids:
        if i in (channel_id, constrain_id) and i not in sections:
            section = i
            sections[i] = []
        else:
            sections[section].append(i)
    words = {key: decode(encoding, section).split() for key, section in sections.items()}
    before = words[None]
    name = None
    if role is None:
        role = before.pop(0) if before else "assistant"
        role, _, _ = role.partition(":")  # Harmony puts a participant's name after a colon
        if role not in ROLES:
            role, name = "tool", role
    after = words.get(channel_id, [])
    channel = after.pop(0) if after and not after[0].startswith("to=") else None
    constrained = words.get(constrain_id)
    rest = [*before, *after, *(constrained or [])]
    recipient = next((w.removeprefix("to=") for w in rest if w.startswith("to=")), None)
    rest = [w for w in rest if not w.startswith("to=")]
    content_type = None
    if constrained is not None:
        content_type = "<|constrain|>" + (rest.pop() if rest and constrained else "")
    elif rest and closed:
        content_type = rest.pop()
    return Header(role, name, channel, recipient, content_type), " ".join(rest)


def to_messages(parsed: Iterable[ParsedMessage], *, keep_ids: bool = False) -> list[dict[str, Any]]:
    """Return parsed messages as the JSON messages that `harmony.render` takes.

    Analysis right before another message of the assistant becomes its "thinking", calls of function
    tools become "tool_calls". With `keep_ids` each Harmony message is one JSON message with its
    "ids", and renders as it was sampled. A channel that Harmony lacks becomes commentary.
    """
    messages: list[dict[str, Any]] = []
    for item in parsed:
        message = _to_message(item)
        last = messages[-1] if messages else {}
        if keep_ids:
            message["ids"] = list(item.ids)
        elif (
            message["role"] == "assistant"
            and message.get("channel") != "analysis"
            and last.get("channel") == "analysis"
            and last["role"] == "assistant"
            and last.keys() == {"role", "channel", "content"}
            and last["content"]
        ):
            message["thinking"] = messages.pop()["content"]
        messages.append(message)
    return messages


def _to_message(item: ParsedMessage) -> dict[str, Any]:
    header = item.header
    message: dict[str, Any] = {"role": header.role, "content": item.content}
    if header.role == "tool":
        message["name"] = header.name or "unknown"
    channel = header.channel
    if channel is not None and channel not in CHANNELS:
        channel = "commentary"
    if header.role == "tool" and channel not in (None, "commentary"):
        message["channel"] = channel
    if header.role != "assistant":
        return message
    namespace, _, function = (header.recipient or "").partition(".")
    if namespace == "functions" and function and channel == "commentary":
        del message["content"]
        message["tool_calls"] = [{"name": function, "arguments": item.content}]
        return message
    if channel not in (None, "final"):
        message["channel"] = channel
    for field in ("recipient", "content_type"):
        if getattr(header, field) is not None:
            message[field] = getattr(header, field)
    return message
