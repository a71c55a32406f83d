"""Harmony messages out of sampled ids, one id at a time.

A sampler may give any ids whatever, so nothing here raises, and no id is lost: the `ids` of the
messages, one after the other, and then the parser's `pending` are all ids processed, each once and
in their order; after `finish` the messages alone are. A message's content is the text of its
`content_ids`, bytes that are no UTF-8 read as U+FFFD. A broken header gives what can be read from
it; what says nothing there is in the message's ids only.
"""

from __future__ import annotations

import codecs
import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_jax.harmony.channels import CHANNELS as CHANNELS
from gptoss_jax.harmony.channels import ROLES as ROLES
from gptoss_jax.harmony.tokenizer import decode, get_tokenizer, special_id, token_bytes
from gptoss_jax.harmony.tools import render_tools

if TYPE_CHECKING:
    import tiktoken

CONSTRAIN = "<|constrain|>"
INSTRUCTIONS = "# Instructions\n\n"  # what a developer's text stands after

_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_WORD = re.compile(r"[^ \t\n\f\r]+")
_FIRST_WORD = re.compile(r"[ \t\n\f\r]*([^ \t\n\f\r]+)[ \t\n\f\r]?")


@dataclass(frozen=True)
class Header:
    """What stands before `<|message|>`.

    `name` says which tool it is if the role is "tool", and else which participant: `user:name`.
    """

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
    and whatever came between it and the next `<|start|>` included. `span` is where among them the
    content begins and ends; it is empty where there was no `<|message|>`, and the content then is
    what is no header of the text.
    """

    header: Header
    content: str
    stop: str | None
    ids: tuple[int, ...]
    span: tuple[int, int]

    @property
    def content_ids(self) -> tuple[int, ...]:
        """Return the ids of the content alone."""
        return self.ids[slice(*self.span)]


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
    """The message is whole, but for ids that may yet come between it and the next."""

    message: ParsedMessage


Event = MessageStart | TextDelta | MessageEnd


class StreamParser:
    """Parse what a model samples after a prompt that ends in `<|start|>assistant`.

    With `after_prompt=False`, ids that begin with a whole message. `messages` are those that have
    ended, `pending` the ids since: of the message under way, or of none, between two.
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
        self._content_at = 0
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def process(self, token: int) -> list[Event]:
        """Take the next id; return what it brought about. Never raises.

        An id that the tokenizer lacks reads as U+FFFD. `<|start|>` ends a message that had no end
        token; a message without `<|message|>` has as content what is no header of its text. Ids
        before the first `<|start|>` go to the first message.
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
            self._header = parse_header(self._encoding, self._header_ids, self._role)
            self._header_ids, self._content_at = None, len(self.pending)
            return [MessageStart(self._header)]
        return []  # between two messages: no place for text

    def feed(self, ids: Iterable[int]) -> list[Event]:
        """Process several ids; return all that they brought about."""
        return [event for token in ids for event in self.process(token)]

    def finish(self) -> list[Event]:
        """End a message that broke off, as when the budget of tokens is spent.

        No id is pending then: those without any `<|start|>` become a message of text alone.
        """
        if not self.pending:
            return []
        if not self.messages and self._header_ids is None and self._header is None:
            self._header, self._content_at = Header(), 0
            text = decode(self._encoding, self.pending)
            return [MessageStart(self._header), *self._add_text(text), *self._close(None)]
        return self._close(None)

    def _add_text(self, text: str) -> list[Event]:
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text)]

    def _close(self, stop: str | None) -> list[Event]:
        """End the open message, or give what came after the last one to it."""
        events: list[Event] = []
        end = len(self.pending) - (stop is not None)
        if self._header is not None:
            events += self._add_text(self._utf8.decode(b"", final=True))
            header, content = self._header, "".join(self._text)
            span = self._content_at, end
        elif self._header_ids is not None:
            header, content = parse_open_header(self._encoding, self._header_ids, self._role)
            span = end, end
            events.append(MessageStart(header))
            if content:
                events.append(TextDelta(content))
        else:
            if self.messages and self.pending:
                last = self.messages[-1]
                self.messages[-1] = dataclasses.replace(last, ids=(*last.ids, *self.pending))
                self.pending = []
            return events
        message = ParsedMessage(header, content, stop, tuple(self.pending), span)
        self.messages.append(message)
        self.pending, self._text = [], []
        self._header_ids = self._header = None
        return [*events, MessageEnd(message)]


def parse(
    ids: Iterable[int], tokenizer: tiktoken.Encoding | None = None, *, after_prompt: bool = True
) -> list[ParsedMessage]:
    """Return the messages of all ids that were sampled after a prompt. Never raises.

    With `after_prompt=False`, of ids that begin with a whole message, such as a rendered chat.
    """
    parser = StreamParser(tokenizer, after_prompt=after_prompt)
    parser.feed(ids)
    parser.finish()
    return parser.messages


def parse_header(encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None) -> Header:
    """Read the header that `<|message|>` closed.

    `role` is that of a prompt, None where the header itself begins with one. The recipient may
    stand before the channel (as rendered) or after it (as sampled). The last word is the content
    type, unless `<|constrain|>` says which is. A word before it, or a function's name alone, is the
    recipient even without "to=".
    """
    before, after, constrained = _sections(encoding, ids)
    words, name = _WORD.findall(before), None
    if role is None:
        role, name = _read_role(words.pop(0) if words else "assistant")
    elif words[:1] == [role]:  # the prompt gave it, and the model wrote it again
        del words[0]
    behind = _WORD.findall(after or "")
    channel = behind.pop(0) if behind and not behind[0].startswith("to=") else None
    typed = _WORD.findall(constrained or "")
    marked = [word for word in [*words, *behind, *typed] if word.startswith("to=")]
    words = [word for word in [*words, *behind] if not word.startswith("to=")]
    recipient = marked[0].removeprefix("to=") or None if marked else None
    content_type = None
    if constrained is not None:
        first = next((word for word in typed if not word.startswith("to=")), "")
        content_type = CONSTRAIN + first
    elif words and (recipient or len(words) > 1 or not words[0].startswith("functions.")):
        content_type = words.pop()
    if recipient is None and words:
        recipient = words.pop()
    return Header(role, name, channel, recipient, content_type)


def parse_open_header(
    encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None
) -> tuple[Header, str]:
    """Read a header that no `<|message|>` closed; return it, and the text that is none of it."""
    before, after, constrained = _sections(encoding, ids)
    name = recipient = channel = None
    word, rest = _take_word(before)
    if role is None or word == role:
        role, name = _read_role(word or "assistant")
        before = rest
        word, rest = _take_word(before)
    if word.startswith("to="):
        recipient, before = word.removeprefix("to="), rest
    if after is not None:
        word, rest = _take_word(after)
        if not word.startswith("to="):
            channel, after = word or None, rest
            word, rest = _take_word(after)
        if word.startswith("to="):
            recipient, after = recipient or word.removeprefix("to="), rest
    content_type = None
    if constrained is not None:
        word, constrained = _take_word(constrained)
        content_type = CONSTRAIN + word
    header = Header(role, name, channel, recipient or None, content_type)
    return header, before + (after or "") + (constrained or "")


def _sections(
    encoding: tiktoken.Encoding, ids: Iterable[int]
) -> tuple[str, str | None, str | None]:
    """Return the text of a header before, after its `<|channel|>`, and after its `<|constrain|>`.

    None where there is no such token; a second one is text like any other.
    """
    marks = special_id(encoding, "<|channel|>"), special_id(encoding, CONSTRAIN)
    sections: dict[int, list[int]] = {-1: []}
    section = sections[-1]
    for i in ids:
        if i in marks and i not in sections:
            section = sections[i] = []
        else:
            section.append(i)
    after, constrained = (
        decode(encoding, sections[mark]) if mark in sections else None for mark in marks
    )
    return decode(encoding, sections[-1]), after, constrained


def _read_role(word: str) -> tuple[str, str | None]:
    """Return role and name: of `user:name`, or a tool's, whose name stands for the role."""
    role, _, name = word.partition(":")
    return (role, name or None) if role in ROLES else ("tool", word)


def _take_word(text: str) -> tuple[str, str]:
    """Return the first word, and what is behind it and one space; "" and the text if none is."""
    match = _FIRST_WORD.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)


def to_messages(
    parsed: Iterable[ParsedMessage],
    *,
    keep_ids: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return parsed messages as the JSON messages that `harmony.render` takes.

    With `keep_ids` each Harmony message is one JSON message with its "ids", and renders as it was
    sampled. Without, what one JSON message renders becomes one again: analysis right before another
    message of the assistant is its "thinking", calls of functions are "tool_calls" in their order,
    with the commentary before them as "content". `tools` are those of the chat: their text is taken
    off the developer's message. A channel that Harmony lacks becomes commentary, and so does none
    in a call; none elsewhere is final.
    """
    tools_text = render_tools(tools) if tools else ""
    messages: list[dict[str, Any]] = []
    for item in parsed:
        message = _to_message(item, tools_text)
        if keep_ids:
            messages.append(message | {"ids": list(item.ids)})
        elif item.ids and not (messages and _join(messages[-1], message)):
            messages.append(message)
    return messages


def _join(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Make an assistant's message part of its last one, where that renders the same."""
    if (last["role"], message["role"]) != ("assistant", "assistant"):
        return False
    calls = message.keys() == {"role", "tool_calls"}
    if calls and "tool_calls" in last:
        last["tool_calls"] += message["tool_calls"]
    elif not last.get("content") or last.keys() - {"role", "thinking", "content", "channel"}:
        return False
    elif calls and last.get("channel") == "commentary":
        del last["channel"]
        last["tool_calls"] = message["tool_calls"]
    elif last.get("channel") == "analysis" and message.get("channel") != "analysis":
        last["thinking"] = last.pop("content")
        del last["channel"]
        last |= message
    else:
        return False
    return True


def _to_message(item: ParsedMessage, tools_text: str) -> dict[str, Any]:
    header = item.header
    message: dict[str, Any] = {"role": header.role, "content": item.content}
    channel = header.channel
    if channel not in CHANNELS and (channel or header.recipient):
        channel = "commentary"
    if header.role == "developer":
        text = item.content.removesuffix(tools_text)
        if len(text) < len(item.content):
            text = text.removesuffix("\n\n")
        message["content"] = text.removeprefix(INSTRUCTIONS)
    if header.role == "tool":
        message["name"] = header.name or "unknown"
        if channel not in (None, "commentary"):
            message["channel"] = channel
    if header.role != "assistant":
        return message
    namespace, _, function = (header.recipient or "").partition(".")
    if namespace == "functions" and function and channel == "commentary":
        del message["content"]
        name = header.recipient if "." in function else function
        call = {"name": name, "arguments": item.content}
        if header.content_type != f"{CONSTRAIN}json":
            call["content_type"] = header.content_type
        message["tool_calls"] = [call]
        return message
    if channel not in (None, "final"):
        message["channel"] = channel
    for field in ("recipient", "content_type"):
        if getattr(header, field) is not None:
            message[field] = getattr(header, field)
    return message
