"""Check JSON messages and split them into Harmony messages, which `harmony.render` renders.

`gptoss_jax.harmony` describes the fields of a message.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony import dialects
from gptoss_jax.harmony.parser import CHANNELS, CONSTRAIN, INSTRUCTIONS, ROLES
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE, check_ids
from gptoss_jax.harmony.tools import render_tools

Message = dict[str, Any]

EFFORTS = ("low", "medium", "high")

_SPACE = re.compile(r"[ \t\n\f\r]")  # separates the words of a header


@dataclass(frozen=True)
class Part:
    """One Harmony message, made of a JSON message, of its thinking, or of one of its tool calls."""

    role: str
    content: str
    author: str = ""  # the name in the header in place of the role; "" is the role itself
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    ids: tuple[int, ...] | None = None  # the sampled ids; None if the message was not sampled
    weight: float = 1.0  # multiplies the loss weight of its role and channel

    @property
    def calls(self) -> bool:
        """Whether the message is a tool call."""
        return self.role == "assistant" and self.recipient is not None


@dataclass
class _Calls:
    """The calls so far: the calls without a result yet (id and recipient), and all recipients.

    `declared` has the parameters of each declared tool, by its name.
    """

    declared: dict[str, Any]
    waiting: list[tuple[Any, str]] = field(default_factory=list)
    recipients: set[str] = field(default_factory=set)

    def add(self, call_id: Any, recipient: str) -> None:
        self.waiting.append((call_id, recipient))
        self.recipients.add(recipient)

    def recipient(self, name: str) -> str:
        """Return a function's name with its namespace.

        What is declared is a function, even with a dot in its name. Another name with a dot has its
        namespace.
        """
        if name in self.declared:
            return f"functions.{name}"
        return name if "." in name else f"functions.{name}"


def check(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    reasoning: str = "medium",
    *,
    vocab_size: int = VOCAB_SIZE,
) -> None:
    """Raise the UserError that `harmony.render` would raise for a chat, without tokenising it.

    The error says in one line which message and which field are wrong, and what they must be. The
    "ids" of sampled messages must be below `vocab_size`.
    """
    check_effort(reasoning)
    expand(messages, tools, vocab_size)


def check_effort(reasoning: Any) -> None:
    """Raise UserError unless `reasoning` is one of `EFFORTS`."""
    if reasoning not in EFFORTS:
        raise UserError(f"reasoning is {reasoning!r}: it is one of {', '.join(EFFORTS)}")


def expand(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    vocab_size: int,
) -> list[Part]:
    """Turn JSON messages into Harmony messages.

    Raises UserError that names the message and the field.
    """
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence) or not messages:
        raise UserError("messages is empty or no list")
    functions = dialects.read_tools(tools)
    tools_text = render_tools(functions) if functions else ""
    parts: list[Part] = []
    calls = _Calls(dialects.declared_arguments(functions))
    for i, given in enumerate(dialects.with_call_ids(messages)):
        where = f"messages[{i}]"
        message = dialects.read_message(given, where)
        role = _check_message(message, where)
        if role == "assistant":
            new = _expand_assistant(message, where, calls)
        elif role == "tool":
            new = [_expand_tool(message, where, calls)]
        elif role == "user":
            new = [Part(role, _text(message, "content", where))]
        else:
            text = _text(message, "content", where)
            sections = [f"{INSTRUCTIONS}{text}"] if text else []
            if tools_text and i == 0:
                sections.append(tools_text)
            keep = sections or "ids" in message
            new = [Part("developer", "\n\n".join(sections))] if keep else []
        if i == 0 and tools_text and role not in ("system", "developer"):
            parts.append(Part("developer", tools_text))
        if "ids" in message:
            new = [_with_ids(new, message["ids"], where, vocab_size=vocab_size)]
        if "weight" in message:
            weight = _weight(message["weight"], where)
            new = [dataclasses.replace(part, weight=weight) for part in new]
        parts += new
    return parts


def _weight(value: Any, where: str) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf:
        raise UserError(f"{where}.weight is {value!r}: it must be a number, and not negative")
    return float(value)


def _with_ids(new: list[Part], ids: Any, where: str, *, vocab_size: int) -> Part:
    if not isinstance(ids, list | tuple) or len(new) != 1:
        raise UserError(f"{where}.ids is no list, or the message has more parts than one")
    if not all(isinstance(i, Integral) for i in ids):
        raise UserError(f"{where}.ids has an item that is no integer: token ids are integers")
    try:
        check_ids(ids, vocab_size)
    except UserError as error:
        raise UserError(f"{where}.ids: {error}") from None
    return dataclasses.replace(new[0], ids=tuple(ids))


def _check_message(message: Message, where: str) -> str:
    """Return the role of a message; refuse fields that its role does not have."""
    role = message.get("role")
    if role not in ROLES:
        problem = f"is {role!r}" if "role" in message else "is missing"
        raise UserError(f"{where}.role {problem}: it is one of {', '.join(ROLES)}")
    for name in ("thinking", "tool_calls", "recipient", "content_type", "channel"):
        if role == "assistant" or (role == "tool" and name == "channel"):
            continue
        if message.get(name) is not None:
            raise UserError(f"{where}.{name}: a message of role {role} has none")
    channel = message.get("channel")
    if channel is not None and channel not in CHANNELS:
        raise UserError(f"{where}.channel is {channel!r}: it is one of {', '.join(CHANNELS)}")
    return role


def _text(message: Message, name: str, where: str) -> str:
    value = message.get(name)
    if value is None:
        raise UserError(f"{where}.{name} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where}.{name} is {dialects.kind(value)}: it must be text")
    return value


def _word(message: Message, name: str, where: str) -> str:
    """Return a field for the header. It must be one word: white space would split it."""
    value = _text(message, name, where)
    if not value or _SPACE.search(value):
        raise UserError(f"{where}.{name} is {value!r}: it must be one word, without white space")
    return value


def _expand_assistant(message: Message, where: str, calls: _Calls) -> list[Part]:
    """Return an assistant's analysis, text and tool calls as messages; add the calls to `calls`."""
    parts: list[Part] = []
    if message.get("thinking"):
        parts.append(Part("assistant", _text(message, "thinking", where), channel="analysis"))
    tool_calls = message.get("tool_calls") or []
    if not isinstance(tool_calls, list):
        raise UserError(f"{where}.tool_calls is no list")
    if not tool_calls or message.get("content"):
        recipient, content_type = (
            None if message.get(name) is None else _word(message, name, where)
            for name in ("recipient", "content_type")
        )
        part = Part(
            "assistant",
            _text(message, "content", where),
            channel=message.get("channel") or ("commentary" if tool_calls else "final"),
            recipient=recipient,
            content_type=content_type,
        )
        parts.append(part)
        if recipient is not None:
            calls.add(None, recipient)
    for j, call in enumerate(tool_calls):
        call_id, part = _read_call(call, f"{where}.tool_calls[{j}]", calls)
        calls.add(call_id, str(part.recipient))
        parts.append(part)
    return parts


def _read_call(call: Any, where: str, calls: _Calls) -> tuple[Any, Part]:
    """Return the id of a tool call, and the message that makes it."""
    function = dialects.read_call(call, where)
    name = _word(function, "name", where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict):
        raise UserError(f"{where}.arguments is missing, or neither JSON text nor an object")
    recipient = calls.recipient(name)
    if isinstance(arguments, dict):
        schema = calls.declared.get(recipient.removeprefix("functions."))
        arguments = dialects.without_null_arguments(arguments, schema)
        arguments = json.dumps(arguments, ensure_ascii=False)
    content_type: str | None = f"{CONSTRAIN}json"
    if "content_type" in function:
        content_type = function["content_type"] and _word(function, "content_type", where)
    part = Part("assistant", arguments, "", "commentary", recipient, content_type)
    return function.get("id"), part


def _expand_tool(message: Message, where: str, calls: _Calls) -> Part:
    """Return a tool's result, with the recipient of the call it answers as its author.

    That call is removed from `calls.waiting`.
    """
    content = _text(message, "content", where)
    call_id = message.get("tool_call_id")
    if message.get("name") is not None:
        name = _word(message, "name", where)
        author = name if name in calls.recipients else calls.recipient(name)
    else:
        author = next((n for i, n in calls.waiting if call_id is None or i == call_id), None)
    if author is None and call_id is not None and calls.waiting:
        raise UserError(
            f"{where}.tool_call_id is {call_id!r}: no tool call before it that awaits a result has "
            "this id"
        )
    if author is None:
        raise UserError(f"{where}.name is missing, and no tool call before it awaits a result")
    answered = (k for k, (i, n) in enumerate(calls.waiting) if n == author and call_id in (None, i))
    at = next(answered, None)
    if at is not None:
        del calls.waiting[at]
    return Part("tool", content, author, message.get("channel") or "commentary", "assistant")
