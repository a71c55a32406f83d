"""Pairs of answers to one prompt, one of them preferred: records of direct preference optimisation.

A record has "chosen" and "rejected". Each is an answer: text, a message or a list of messages. The
chat that they answer is "prompt" or "messages": a list of messages, or a question as text. "tools"
and "reasoning" are the same as in a chat. If "chosen" and "rejected" begin with a message that is
neither the assistant's nor a tool's, they are whole chats, and the messages at their beginning that
are the same are the prompt; "prompt" or "messages" may say it again. TRL has all of these formats
too. It also has whole chats as text, which are not read here.

A pair becomes two segments, chosen and rejected, which are always next to each other in one row.
Only the tokens of the answers have loss weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from gptoss_jax import harmony
from gptoss_jax.data.packing import Segment
from gptoss_jax.errors import UserError
from gptoss_jax.harmony.messages import expand
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE

Message = dict[str, Any]

SIDES = ("chosen", "rejected")
_ANSWERS = ("assistant", "tool")  # roles of the message that an answer can begin with


class Pair(NamedTuple):
    """A prompt and the two answers to it, as messages."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]


def split(record: dict[str, Any]) -> Pair:
    """Return the pair of a record in any of the formats. Raises `ValueError` if it is no pair."""
    for name in SIDES:
        if name not in record:
            what = "lacks chosen and rejected" if name == "chosen" else f"lacks {name}"
            raise ValueError(f"{what}: objective.name dpo trains on pairs of answers")
    name = "prompt" if record.get("prompt") is not None else "messages"
    sides = [_messages(record[name], "assistant", name) for name in SIDES]
    if has_whole_chats(record):
        shared = _shared(*sides)
        if not shared:
            raise ValueError("chosen and rejected are whole chats that begin differently")
        return Pair(sides[0][:shared], sides[0][shared:], sides[1][shared:])
    if record.get(name) is None:
        raise ValueError("lacks prompt (the chat that chosen and rejected answer)")
    return Pair(_messages(record[name], "user", name), sides[0], sides[1])


def has_whole_chats(record: dict[str, Any]) -> bool:
    """Say whether chosen and rejected have the prompt too. Raises `ValueError` if only one has."""
    sides = [_messages(record[k], "assistant", k) for k in SIDES if record.get(k) is not None]
    whole = {side[0].get("role") not in _ANSWERS for side in sides}
    if len(whole) > 1:
        raise ValueError("one of chosen and rejected is a whole chat, the other an answer")
    return whole == {True}


def check_asked(record: dict[str, Any]) -> None:
    """Raise `ValueError` if prompt or messages has a message that `split` would leave out."""
    asked = {
        name: [_bare(m) for m in _messages(record[name], "user", name)]
        for name in ("prompt", "messages")
        if record.get(name) is not None
    }
    if has_whole_chats(record):
        chosen = [_bare(m) for m in _messages(record["chosen"], "assistant", "chosen")]
        for name, messages in asked.items():
            if any(message not in chosen for message in messages):
                raise ValueError(
                    f"chosen and rejected are whole chats, and {name} has a message that they "
                    "lack: leave it out, or make them answers to it"
                )
    elif len(asked) > 1 and asked["prompt"] != asked["messages"]:
        raise ValueError("has prompt and messages, which differ: leave out one of them")


def _bare(message: Message) -> Message:
    return {k: v for k, v in message.items() if v is not None}


def check(record: dict[str, Any], check_chat: Callable[[dict[str, Any]], None]) -> None:
    """Raise `ValueError` for a record that is no pair, or whose chats `check_chat` refuses."""
    pair = split(record)
    chats = [{**record, "messages": [*pair.prompt, *answer]} for answer in pair[1:]]
    for name, answer, chat in zip(SIDES, pair[1:], chats, strict=True):
        try:
            check_chat(chat)
        except (ValueError, UserError) as error:
            raise ValueError(f"the chat with {name}: {error}") from None
        if not any(message.get("role") == "assistant" for message in answer):
            raise ValueError(f"{name} has no message of the assistant")
    chosen, rejected = (
        expand(chat["messages"], record.get("tools"), vocab_size=VOCAB_SIZE) for chat in chats
    )
    if chosen == rejected:
        raise ValueError("chosen and rejected are the same, as they are rendered")


def fit(chosen: Segment, rejected: Segment, capacity: int) -> tuple[Segment, Segment]:
    """Cut the ends of two segments so that both fit into a row; the longer one is cut first."""
    lengths = len(chosen.tokens), len(rejected.tokens)
    half = capacity // 2
    first = min(lengths[0], max(half, capacity - lengths[1]))
    second = min(lengths[1], capacity - first)
    cut = Segment(chosen.tokens[:first], chosen.weights[:first])
    return cut, Segment(rejected.tokens[:second], rejected.weights[:second])


def differ(chosen: Segment, rejected: Segment) -> bool:
    """Say whether the two segments differ, in their tokens or in their loss weights."""
    return any(a.shape != b.shape or (a != b).any() for a, b in zip(chosen, rejected, strict=True))


def question(record: dict[str, Any]) -> list[Message]:
    """Return a record as a chat: its prompt, then the chosen answer."""
    pair = split(record)
    return [*pair.prompt, *pair.chosen]


def render(record: dict[str, Any], **options: Any) -> tuple[Segment, Segment]:
    """Render both sides with `harmony.render`, to which `options` are passed."""
    pair = split(record)

    def side(answer: list[Message]) -> Segment:
        chat = [*pair.prompt, *answer]
        tokens, weights = harmony.render(chat, given=len(pair.prompt), **options)
        return Segment(np.array(tokens, np.int32), np.array(weights, np.float32))

    return side(pair.chosen), side(pair.rejected)


def _messages(value: Any, role: str, name: str) -> list[Message]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise ValueError(f"{name} is neither text nor a message nor a list of messages")
    if not messages:
        raise ValueError(f"{name} is empty")
    if not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"{name} has an item that is no message (an object with a role)")
    return messages


def _shared(chosen: list[Message], rejected: list[Message]) -> int:
    """Count the equal messages that two chats begin with; never all messages of either chat."""
    most = min(len(chosen), len(rejected)) - 1
    same = (i for i in range(most) if chosen[i] != rejected[i])
    return next(same, most)
