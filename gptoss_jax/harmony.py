"""Chats as Harmony tokens: what openai-harmony 0.0.8 renders, with a loss weight for each token.

A chat is a list of messages, each `{"role", "content"}` with the role system, developer, user,
assistant or tool. "system" and "developer" both mean a developer's instructions, as in Hugging
Face's template; Harmony's own system message (identity, date, reasoning effort, channels) is
generated. An assistant's message may have
- "thinking": its analysis, rendered as a message of its own before it;
- "tool_calls": `{"name", "arguments"}`, or OpenAI's `{"id", "function": {"name", "arguments"}}`,
  arguments as JSON text or an object; "content" is then optional: words before the call;
- "channel": analysis, commentary or final (the default; commentary where tools are called);
- "recipient" and "content_type": for calls of what is no function tool;
- "ids": the tokens as they were sampled, which are rendered instead (`harmony_parser`).
A tool's message has the result as its "content", and "name" or "tool_call_id" where it does not
answer the calls before it in their order.

A message is `<|start|>role[ to=recipient][<|channel|>channel][ type]<|message|>content<|end|>`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import tiktoken

from gptoss_jax.errors import UserError
from gptoss_jax.harmony_parser import CHANNELS, ROLES
from gptoss_jax.harmony_parser import StreamParser as StreamParser
from gptoss_jax.harmony_parser import to_messages as to_messages
from gptoss_jax.harmony_tools import render_tools
from gptoss_jax.tokenizer import check_ids, encode, get_tokenizer, special_id

Message = dict[str, Any]

EFFORTS = ("low", "medium", "high")

_IDENTITY = "You are ChatGPT, a large language model trained by OpenAI."
_KNOWLEDGE_CUTOFF = "2024-06"
_CONSTRAIN = "<|constrain|>"


@dataclass(frozen=True)
class _Part:
    """One Harmony message: what a JSON message, its thinking or one of its tool calls becomes."""

    role: str
    content: str
    author: str = ""  # what the header calls the role; "" is the role itself
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    ids: tuple[int, ...] | None = None

    @property
    def calls(self) -> bool:
        return self.role == "assistant" and self.recipient is not None


def render(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    reasoning: str = "medium",
    date: str | None = None,
    *,
    train_on: Sequence[str] = ("assistant",),
    tokenizer: tiktoken.Encoding | None = None,
) -> tuple[list[int], list[float]]:
    """Render a whole chat for training: its ids, and for each the weight it has as a target.

    The last turn (all after the last user message) keeps its analysis. What is before it is as
    `render_prompt` renders it, so earlier analysis is dropped where Harmony drops it, and the ids
    up to the turn are those of the prompt. A final answer at the very end ends in `<|return|>`,
    tool calls end in `<|call|>`, all else in `<|end|>`.

    `train_on` has roles or role/channel pairs such as "assistant/final". Of their messages the
    weight is 1 for what the model samples: all after `<|start|>assistant`, the end token included,
    and `<|start|>assistant` itself where the model goes on after its own analysis or commentary. It
    is 0 for the `<|end|>` of an earlier final answer, where the model is to sample `<|return|>`,
    and for the generated system message, always. Of another role's messages it is 1 for all after
    the role's name. Raises UserError that names the message and the field.
    """
    encoding = tokenizer or get_tokenizer()
    parts = _expand(messages, tools, encoding)
    trained = _parse_train_on(train_on)
    turn = 1 + max((i for i, part in enumerate(parts) if part.role == "user"), default=-1)
    parts = _drop_analysis(parts[:turn]) + parts[turn:]

    tokens = list(_system(encoding, reasoning, date, bool(tools)))
    weights = [0.0] * len(tokens)
    end, end_of_turn = special_id(encoding, "<|end|>"), special_id(encoding, "<|return|>")
    goes_on = False
    for i, part in enumerate(parts):
        head, body = _render_part(part, encoding)
        final = part.role == "assistant" and part.channel == "final"
        if final and i == len(parts) - 1 and body[-1] == end:
            body[-1] = end_of_turn
        weight = float(part.role in trained or f"{part.role}/{part.channel}" in trained)
        tokens += head + body
        weights += [weight * goes_on] * len(head) + [weight] * len(body)
        if final and body[-1] == end:
            weights[-1] = 0.0
        goes_on = part.role == "assistant" and not final and body[-1] == end
    return tokens, weights


def render_prompt(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None = None,
    reasoning: str = "medium",
    date: str | None = None,
    *,
    tokenizer: tiktoken.Encoding | None = None,
) -> list[int]:
    """Render a chat to be answered: its ids, up to and with `<|start|>assistant`.

    Where the assistant's last message is a final answer, analysis before the first final answer is
    dropped, as in Harmony. Raises UserError that names the message and the field.
    """
    encoding = tokenizer or get_tokenizer()
    tokens = list(_system(encoding, reasoning, date, bool(tools)))
    for part in _drop_analysis(_expand(messages, tools, encoding)):
        head, body = _render_part(part, encoding)
        tokens += head + body
    return [*tokens, special_id(encoding, "<|start|>"), *_short(encoding, "assistant")]


@lru_cache(maxsize=4096)
def _short(encoding: tiktoken.Encoding, text: str) -> tuple[int, ...]:
    """Encode text that comes again in chat after chat."""
    return tuple(encode(encoding, text))


@lru_cache(maxsize=256)
def _system(
    encoding: tiktoken.Encoding, reasoning: str, date: str | None, with_tools: bool
) -> tuple[int, ...]:
    """Return the ids of the generated system message."""
    if reasoning not in EFFORTS:
        raise UserError(f"reasoning is {reasoning!r}: it is one of {', '.join(EFFORTS)}")
    lines = [_IDENTITY, f"Knowledge cutoff: {_KNOWLEDGE_CUTOFF}"]
    if date is not None:
        lines.append(f"Current date: {date}")
    lines += ["", f"Reasoning: {reasoning}", ""]
    lines.append(
        f"# Valid channels: {', '.join(CHANNELS)}. Channel must be included for every message."
    )
    if with_tools:
        lines.append("Calls to these tools must go to the commentary channel: 'functions'.")
    head, body = _render_part(_Part("system", "\n".join(lines)), encoding)
    return (*head, *body)


def _render_part(part: _Part, encoding: tiktoken.Encoding) -> tuple[list[int], list[int]]:
    """Return `<|start|>` with the role's name, and all that follows up to the end token."""
    start, end = special_id(encoding, "<|start|>"), special_id(encoding, "<|end|>")
    head = [start, *_short(encoding, part.author or part.role)]
    if part.ids is not None:
        return _render_ids(part, head, encoding)
    body: list[int] = []
    if part.recipient is not None:
        body += _short(encoding, f" to={part.recipient}")
    if part.channel is not None:
        body += [special_id(encoding, "<|channel|>"), *_short(encoding, part.channel)]
    if part.content_type is not None:
        if part.content_type.startswith(_CONSTRAIN):
            body += [*_short(encoding, " "), special_id(encoding, _CONSTRAIN)]
            body += _short(encoding, part.content_type.removeprefix(_CONSTRAIN))
        else:
            body += _short(encoding, f" {part.content_type}")
    body.append(special_id(encoding, "<|message|>"))
    body += encode(encoding, part.content)
    body.append(special_id(encoding, "<|call|>") if part.calls else end)
    return head, body


def _render_ids(
    part: _Part, head: list[int], encoding: tiktoken.Encoding
) -> tuple[list[int], list[int]]:
    """Return sampled ids, `<|return|>` and a missing end token made `<|end|>`."""
    ids = list(part.ids or ())
    if ids[: len(head)] == head:
        ids = ids[len(head) :]
    elif ids[:1] == head[:1]:  # the model wrote a header of its own
        head, ids = ids[:1], ids[1:]
    end = special_id(encoding, "<|end|>")
    if ids and ids[-1] == special_id(encoding, "<|return|>"):
        ids[-1] = end
    if not ids or ids[-1] not in (end, special_id(encoding, "<|call|>")):
        ids.append(end)
    return head, ids


def _drop_analysis(parts: list[_Part]) -> list[_Part]:
    """Drop the analysis before the first final answer, if the assistant's last message is one.

    Not that of later turns: so does Harmony.
    """
    spoken = [part.channel for part in parts if part.role == "assistant"]
    if not spoken or spoken[-1] != "final":
        return parts
    first = next(i for i, part in enumerate(parts) if part.channel == "final")
    return [part for part in parts[:first] if part.channel != "analysis"] + parts[first:]


def _parse_train_on(train_on: Sequence[str]) -> set[str]:
    trained = set()
    for item in train_on:
        role, slash, channel = item.partition("/")
        if role not in ROLES or (slash and channel not in CHANNELS):
            raise UserError(
                f"train_on has {item!r}: it takes a role ({', '.join(ROLES)}), alone or with a "
                f"channel ({', '.join(CHANNELS)}), such as assistant/final"
            )
        trained.add(f"developer{slash}{channel}" if role == "system" else item)
    return trained


def _expand(
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]] | None,
    encoding: tiktoken.Encoding,
) -> list[_Part]:
    """Turn JSON messages into Harmony's, and check them."""
    if isinstance(messages, str | dict) or not isinstance(messages, Sequence) or not messages:
        raise UserError("messages is empty or no list")
    if tools is not None and not isinstance(tools, list | tuple):
        raise UserError("tools is no list")
    tools_text = render_tools(list(tools)) if tools else ""
    parts: list[_Part] = []
    open_calls: list[tuple[Any, str]] = []  # id and name of the calls that await their results
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        role = _check_message(message, where)
        if role == "assistant":
            new = _expand_assistant(message, where, open_calls)
        elif role == "tool":
            new = [_expand_tool(message, where, open_calls)]
        elif role == "user":
            new = [_Part(role, _text(message, "content", where))]
        else:
            text = _text(message, "content", where)
            sections = [f"# Instructions\n\n{text}"] if text else []
            if tools_text and i == 0:
                sections.append(tools_text)
            keep = sections or "ids" in message
            new = [_Part("developer", "\n\n".join(sections))] if keep else []
        if i == 0 and tools_text and role not in ("system", "developer"):
            parts.append(_Part("developer", tools_text))
        if "ids" in message:
            ids = message["ids"]
            if not isinstance(ids, list | tuple) or len(new) != 1:
                raise UserError(f"{where}.ids is no list, or the message has more parts than one")
            try:
                check_ids(ids, encoding.n_vocab)
            except UserError as error:
                raise UserError(f"{where}.ids: {error}") from None
            new = [dataclasses.replace(new[0], ids=tuple(ids))]
        parts += new
    return parts


def _check_message(message: Any, where: str) -> str:
    """Return the role of a message; refuse fields that its role does not have."""
    if not isinstance(message, dict):
        raise UserError(f"{where} is no object")
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


def _text(message: Message, field: str, where: str) -> str:
    value = message.get(field)
    if value is None:
        raise UserError(f"{where}.{field} is missing")
    if not isinstance(value, str):
        raise UserError(f"{where}.{field} is a {type(value).__name__}: it must be text")
    return value


def _expand_assistant(
    message: Message, where: str, open_calls: list[tuple[Any, str]]
) -> list[_Part]:
    """Return an assistant's analysis, words and tool calls; note its calls in `open_calls`."""
    parts: list[_Part] = []
    if message.get("thinking"):
        parts.append(_Part("assistant", _text(message, "thinking", where), channel="analysis"))
    calls = message.get("tool_calls") or []
    if not isinstance(calls, list):
        raise UserError(f"{where}.tool_calls is no list")
    if not calls or message.get("content"):
        recipient, content_type = (
            None if message.get(field) is None else _text(message, field, where)
            for field in ("recipient", "content_type")
        )
        part = _Part(
            "assistant",
            _text(message, "content", where),
            channel=message.get("channel") or ("commentary" if calls else "final"),
            recipient=recipient,
            content_type=content_type,
        )
        parts.append(part)
        if part.calls:
            open_calls.append((None, str(recipient)))
    for j, call in enumerate(calls):
        call_id, name, arguments = _read_call(call, f"{where}.tool_calls[{j}]")
        open_calls.append((call_id, name))
        parts.append(_Part("assistant", arguments, "", "commentary", name, f"{_CONSTRAIN}json"))
    return parts


def _read_call(call: Any, where: str) -> tuple[Any, str, str]:
    """Return id, recipient and arguments of a tool call."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f"{where} is no object with a name and arguments")
    name = _text(function, "name", where)
    arguments = function.get("arguments")
    if not isinstance(arguments, str | dict):
        raise UserError(f"{where}.arguments is missing, or neither JSON text nor an object")
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return call.get("id"), _qualify(name), arguments


def _expand_tool(message: Message, where: str, open_calls: list[tuple[Any, str]]) -> _Part:
    """Return a tool's result, addressed from the call that it answers; close that call."""
    content = _text(message, "content", where)
    call_id = message.get("tool_call_id")
    if message.get("name") is not None:
        author = _qualify(_text(message, "name", where))
    else:
        author = next((n for i, n in open_calls if call_id is None or i == call_id), None)
    if author is None:
        raise UserError(f"{where}.name is missing, and no tool call before it awaits a result")
    answered = (k for k, (i, n) in enumerate(open_calls) if n == author and (call_id in (None, i)))
    at = next(answered, None)
    if at is not None:
        del open_calls[at]
    channel = message.get("channel") or "commentary"
    return _Part("tool", content, author, channel, "assistant")


def _qualify(name: str) -> str:
    """Return a function's name with its namespace; a name with one already stays."""
    return name if "." in name else f"functions.{name}"
