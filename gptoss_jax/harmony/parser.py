"""Parse sampled ids into Harmony messages, one id at a time.

A sampler may give any ids, so nothing here raises, and no id is lost. The `ids` of all messages in
order, followed by the parser's `pending`, are exactly the ids processed. After `finish`, `pending`
is empty. A message's content is the text of its `content_ids`; bytes that are not UTF-8 become
U+FFFD. From a broken header we read what we can; the rest of it is only in the message's ids.

What gpt-oss models are known to get wrong, and whose meaning is clear, is read as it was meant, and
the header is marked `irregular`: `assistantfinal` and `assistantassistant` as a role, a channel's
name as a role or without `<|channel|>`, a header's beginning twice (which includes the prompt's
end), `<|channel|>` or `<|constrain|>` twice, no `<|start|>` after `<|end|>`, and a function's call
on another channel than commentary.
"""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptoss_jax.harmony.channels import CHANNELS as CHANNELS
from gptoss_jax.harmony.channels import ROLES as ROLES
from gptoss_jax.harmony.dialects import read_tools
from gptoss_jax.harmony.header import CHANNEL, parse_header, parse_open_header
from gptoss_jax.harmony.header import CONSTRAIN as CONSTRAIN
from gptoss_jax.harmony.header import Header as Header
from gptoss_jax.harmony.tokenizer import STOPS, decode, get_tokenizer, special_id, token_bytes
from gptoss_jax.harmony.tools import render_tools

if TYPE_CHECKING:
    import tiktoken

INSTRUCTIONS = "# Instructions\n\n"  # the heading before a developer's text

_ENDS = ("<|end|>", *STOPS)


@dataclass(frozen=True)
class ParsedMessage:
    """One whole message.

    `stop` is the name of its end token, or None if the ids broke off. `ids` are all ids from
    `<|start|>` up to the next `<|start|>`: they include the end token and any ids after it. For the
    first message after a prompt they begin after `<|start|>assistant`. `span` is where in `ids` the
    content begins and ends. Without a `<|message|>` the span is empty, and the content is the part
    of the text that is not a header.

    `odd_start` says what is wrong with the first `<|start|>`: it is "missing" after the `<|end|>`
    of the message before (the ids then begin after that `<|end|>`), or it is "repeated", as the
    prompt ended in `<|start|>assistant`.
    """

    header: Header
    content: str
    stop: str | None
    ids: tuple[int, ...]
    span: tuple[int, int]
    odd_start: str | None = None

    @property
    def content_ids(self) -> tuple[int, ...]:
        """The ids of the content alone."""
        return self.ids[slice(*self.span)]


@dataclass(frozen=True)
class MessageStart:
    """The header is complete, and the content begins."""

    header: Header


@dataclass(frozen=True)
class TextDelta:
    """More of the content: whole characters only, never empty."""

    text: str


@dataclass(frozen=True)
class MessageEnd:
    """The message is complete, except for ids that may still come before the next message."""

    message: ParsedMessage


Event = MessageStart | TextDelta | MessageEnd


class StreamParser:
    """Parse what a model samples after a prompt that ends in `<|start|>assistant`.

    With `after_prompt=False`, parse ids that begin with a whole message. `messages` are the
    messages that have ended. `pending` are the ids since then: of the current message, or ids
    between two messages.
    """

    def __init__(
        self, tokenizer: tiktoken.Encoding | None = None, *, after_prompt: bool = True
    ) -> None:
        self.messages: list[ParsedMessage] = []
        self.pending: list[int] = []
        self._encoding = tokenizer or get_tokenizer()
        self._start = special_id(self._encoding, "<|start|>")
        self._message = special_id(self._encoding, "<|message|>")
        self._channel = special_id(self._encoding, CHANNEL)
        self._ends = {special_id(self._encoding, name): name for name in _ENDS}
        self._header_ids: list[int] | None = [] if after_prompt else None  # None: not in a header
        self._role = "assistant" if after_prompt else None  # given by the prompt
        self._header: Header | None = None  # None: not in the content
        self._doubled = False  # the message began with more than one header
        self._odd_start: str | None = None  # as in ParsedMessage
        # Where text after the last <|end|> begins in `pending`; None: what ended was the turn.
        self._after_end: int | None = None
        self._content_at = 0
        self._text: list[str] = []
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def process(self, token: int) -> list[Event]:
        """Process the next id and return the events that it causes. Never raises.

        An id that the tokenizer lacks is read as U+FFFD. `<|start|>` ends a message that had no end
        token; if that is a header without any text behind it, its ids begin the next message. The
        content of a message without `<|message|>` is the part of its text that is not a header. Ids
        before the first `<|start|>` belong to the first message. After `<|end|>`, `<|channel|>` or
        `<|message|>` begin a message as well, and the text since `<|end|>` belongs to it.
        """
        token = int(token)
        if token == self._start:
            return self._begin()
        self.pending.append(token)
        if self._header is not None:
            if token in self._ends:
                return self._close(self._ends[token])
            return self._add_text(self._utf8.decode(token_bytes(self._encoding, token)))
        if self._header_ids is None:
            if token in self._ends:
                ends = self._after_end is not None and self._ends[token] == "<|end|>"
                self._after_end = len(self.pending) if ends else None
            if token not in (self._channel, self._message) or self._after_end is None:
                return []  # between two messages, where text has no place
            self._header_ids = self._begin_without_start(self._after_end)
        elif token in self._ends:
            return self._close(self._ends[token])
        if token != self._message:
            self._header_ids.append(token)
            return []
        started = self._doubled or self._odd_start != "missing"
        header = parse_header(self._encoding, self._header_ids, self._role, started=started)
        self._header, self._header_ids = self._marked(header), None
        self._content_at = len(self.pending)
        return [MessageStart(self._header)]

    def _begin(self) -> list[Event]:
        """Read a `<|start|>`: begin a message, or begin the header again that has no text yet."""
        events: list[Event] = []
        if self._header_ids is not None and not self._open_text().strip():
            if not self.pending:
                self._odd_start = "repeated"
            self._doubled = True
        else:
            events = self._close(None)
        self.pending.append(self._start)
        self._header_ids, self._role = [], None
        return events

    def _open_text(self) -> str:
        """Return the text in an open header that is no part of it."""
        return parse_open_header(self._encoding, self._header_ids or [], self._role)[1]

    def _begin_without_start(self, at: int) -> list[int]:
        """Begin a message at `pending[at]`, behind the strays; return its header so far."""
        if at:
            last = self.messages[-1]
            self.messages[-1] = dataclasses.replace(last, ids=(*last.ids, *self.pending[:at]))
            del self.pending[:at]
        self._role, self._odd_start = "assistant", "missing"
        return self.pending[:-1]

    def feed(self, ids: Iterable[int]) -> list[Event]:
        """Process several ids and return all events that they cause."""
        return [event for token in ids for event in self.process(token)]

    def finish(self) -> list[Event]:
        """End a message that broke off, for example because the token budget ran out.

        Afterwards no id is pending: ids without any `<|start|>` become a message of plain text.
        """
        if not self.pending:
            return []
        if not self.messages and self._header_ids is None and self._header is None:
            self._header, self._content_at = Header(), 0
            text = decode(self._encoding, self.pending)
            return [MessageStart(self._header), *self._add_text(text), *self._close(None)]
        return self._close(None)

    def _marked(self, header: Header) -> Header:
        """Return the header, irregular if its beginning is not as Harmony writes it."""
        odd = self._doubled or self._odd_start is not None
        return dataclasses.replace(header, irregular=True) if odd else header

    def _add_text(self, text: str) -> list[Event]:
        if not text:
            return []
        self._text.append(text)
        return [TextDelta(text)]

    def _close(self, stop: str | None) -> list[Event]:
        """End the open message; if none is open, add the pending ids to the last message."""
        events: list[Event] = []
        end = len(self.pending) - (stop is not None)
        if self._header is not None:
            events += self._add_text(self._utf8.decode(b"", final=True))
            header, content = self._header, "".join(self._text)
            span = self._content_at, end
        elif self._header_ids is not None:
            header, content = parse_open_header(self._encoding, self._header_ids, self._role)
            header = self._marked(header)
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
        message = ParsedMessage(header, content, stop, tuple(self.pending), span, self._odd_start)
        self.messages.append(message)
        self.pending, self._text = [], []
        self._header_ids = self._header = self._odd_start = None
        self._doubled = False
        self._after_end = 0 if stop == "<|end|>" else None
        return [*events, MessageEnd(message)]


def parse(
    ids: Iterable[int], tokenizer: tiktoken.Encoding | None = None, *, after_prompt: bool = True
) -> list[ParsedMessage]:
    """Return the messages in ids that were sampled after a prompt. Never raises.

    With `after_prompt=False`, the ids begin with a whole message, as in a rendered chat.
    """
    parser = StreamParser(tokenizer, after_prompt=after_prompt)
    parser.feed(ids)
    parser.finish()
    return parser.messages


def to_messages(
    parsed: Iterable[ParsedMessage],
    *,
    keep_ids: bool = False,
    tools: list[dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Turn parsed messages into the JSON messages that `harmony.render` takes.

    With `keep_ids`, each Harmony message becomes one JSON message with its "ids", which renders
    exactly as it was sampled. (If a message repeats the prompt's end, one without ids comes before
    it. If its `<|start|>` is missing, its "ids" begin with the `<|end|>` of the message before.)
    Without it, Harmony messages that one JSON message would render are joined into one: analysis
    directly before another message of the assistant becomes that message's "thinking", and calls of
    functions become "tool_calls" in order, with the commentary before them as "content". `tools`
    are the tools of the chat: their text is removed from the developer's message, and a call whose
    recipient is the bare name of one of them, without "functions.", is a call of that tool. A
    channel that Harmony does not have becomes commentary. A missing channel becomes commentary in a
    call, and final elsewhere.
    """
    items = list(parsed)
    tools_text = render_tools(tools) if tools else ""
    declared = {tool.get("name") for tool in read_tools(tools)}
    messages: list[dict[str, Any]] = []
    for i, item in enumerate(items):
        message = _to_message(item, tools_text, declared)
        if keep_ids:
            ids = list(item.ids)
            if item.odd_start == "repeated":
                messages.append({"role": "assistant", "content": "", "ids": []})
            elif item.odd_start == "missing" and messages:
                before = messages[-1]["ids"]
                at = len(before) - len(items[i - 1].ids) + items[i - 1].span[1]
                ids[:0] = before[at:]
                del before[at:]
            messages.append(message | {"ids": ids})
        elif item.ids and not (messages and _join(messages[-1], message)):
            messages.append(message)
    return messages


def _join(last: dict[str, Any], message: dict[str, Any]) -> bool:
    """Join an assistant's message to the last one if the result renders the same; say if it did."""
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


def _to_message(item: ParsedMessage, tools_text: str, declared: set[Any]) -> dict[str, Any]:
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
    recipient = header.recipient or ""
    function = recipient.removeprefix("functions.")
    if recipient in declared or (function and function != recipient):
        del message["content"]
        whole = function not in declared and ("." in function or recipient in declared)
        name = recipient if whole else function
        call: dict[str, Any] = {"name": name, "arguments": item.content}
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
