"""Check JSON messages and split them into Harmony messages, which `harmony.render` renders.

`gptoss_jax.harmony` describes the fields of a message.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from gptoss_jax.errors import UserError
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

    @property
    def calls(self) -> bool:
        """Whether the message is a tool call."""
        return self.role == "assistant" and self.recipient is not None


@dataclass
class _Calls:
    """The calls so far: the calls without a result yet (id and recipient), and all recipients."""

    waiting: list[tuple[Any, str]] = field(default_factory=list)
    recipients: set[str] = field(default_factory=set)

    def add(self, call_id: Any, recipient: str) -> None:
        self.waiting.append((call_id, recipient))
        self.recipients.add(recipient)


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
    messages: Sequence[Message], tools: Sequence[dict[str, Any]] | None, vocab_size: int
) -> list[Part]:
    """Turn JSON messages into Harmony messages.

    Raises UserError that names the message and the field.
    """
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence) or not messages:
        raise UserError("messages is empty or no list")
    if tools is not None and not isinstance(tools, list | tuple):
        raise UserError("tools is no list")
    tools_text = render_tools(list(tools)) if tools else ""
    parts: list[Part] = []
    calls = _Calls()
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
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
        parts += new
    return parts


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


def _check_message(message: Any, where: str) -> str:
    """Return the role of a message; refuse fields that its role does not have."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is {_kind(message)}: it must be an object")
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


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return "null" if value is None else names.get(type(value), "a number")


def _text(message: Message, name: str, where: str) -> str:
    value = message.get(name)
    if value is None:
        raise UserError(f"{where}.{name} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where}.{name} is {_kind(value)}: it must be text")
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
        call_id, part = _read_call(call, f"{where}.tool_calls[{j}]")
        calls.add(call_id, str(part.recipient))
        parts.append(part)
    return parts


def _read_call(call: Any, where: str) -> tuple[Any, Part]:
    """Return the id of a tool call, and the message that makes it."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f"{where} is no object with a name and arguments")
    name = _word(function, "name", where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict):
        raise UserError(f"{where}.arguments is missing, or neither JSON text nor an object")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    content_type: str | None = f"{CONSTRAIN}json"
    if "content_type" in function:
        content_type = function["content_type"] and _word(function, "content_type", where)
    return call.get("id"), Part(
        "assistant", arguments, "", "commentary", _qualify(name), content_type
    )


def _expand_tool(message: Message, where: str, calls: _Calls) -> Part:
    """Return a tool's result, with the recipient of the call it answers as its author.

    That call is removed from `calls.waiting`.
    """
    content = _text(message, "content", where)
    call_id = message.get("tool_call_id")
    if message.get("name") is not None:
        name = _word(message, "name", where)
        author = name if name in calls.recipients else _qualify(name)
    else:
        author = next((n for i, n in calls.waiting if call_id is None or i == call_id), None)
    if author is None:
        raise UserError(f"{where}.name is missing, and no tool call before it awaits a result")
    answered = (k for k, (i, n) in enumerate(calls.waiting) if n == author and call_id in (None, i))
    at = next(answered, None)
    if at is not None:
        del calls.waiting[at]
    return Part("tool", content, author, message.get("channel") or "commentary", "assistant")


def _qualify(name: str) -> str:
    """Return a function's name with its namespace; a name that has one stays as it is."""
    return name if "." in name else f"functions.{name}"
