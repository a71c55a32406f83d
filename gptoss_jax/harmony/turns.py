"""Turns of a chat: the analysis that a history leaves out, and which turns are trained then.

Also how a sampled message goes on in the same turn without its `<|start|>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptoss_jax.errors import UserError
from gptoss_jax.harmony.channels import HISTORIES, TURNS
from gptoss_jax.harmony.messages import Message, Part, expand
from gptoss_jax.harmony.tokenizer import VOCAB_SIZE, special_id, stop_ids

if TYPE_CHECKING:
    import tiktoken


def drop_analysis(parts: list[Part], history: str) -> list[Part]:
    """Drop the analysis that a prompt leaves out; see `render_prompt`."""
    if history not in HISTORIES:
        raise UserError(f"history is {history!r}: it is one of {', '.join(HISTORIES)}")
    finals = [i for i, part in enumerate(parts) if part.channel == "final"]
    spoken = [part.channel for part in parts if part.role == "assistant"]
    if not finals or (history == "harmony" and spoken[-1:] != ["final"]):
        return parts
    upto = finals[0] if history == "harmony" else finals[-1]
    return [part for part in parts[:upto] if part.channel != "analysis"] + parts[upto:]


def untrained_of(parts: list[Part], kept: list[Part], last: int, turns: str) -> list[Part]:
    """Return the messages of the assistant that `turns` leaves untrained; `last`: the last turn."""
    if turns not in TURNS:
        raise UserError(f"turns is {turns!r}: it is one of {', '.join(TURNS)}")
    if turns == "last":
        return [part for part in parts[:last] if part.role == "assistant"]
    rendered = {id(part) for part in kept}
    untrained: list[Part] = []
    dropped = False  # analysis of the turn that is looked at
    for part in parts:
        dropped = part.role != "user" and (dropped or id(part) not in rendered)
        if dropped and part.role == "assistant":
            untrained.append(part)
    return untrained


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """Return one chat for each turn of the assistant: what it saw, and the turn itself at the end.

    Rendered with turns="last", each turn is trained with its own analysis, after a history as it is
    when the model is asked.
    """
    roles = [message.get("role") if isinstance(message, dict) else None for message in messages]
    found, begin = [], 0
    for i, role in enumerate([*roles, "user"]):
        if role == "user":
            turn = roles[begin:i]
            if "assistant" in turn:  # a message for the next turn, such as a developer's, is not it
                end = max(k for k, who in enumerate(turn) if who in ("assistant", "tool"))
                found.append(list(messages[: begin + end + 1]))
            begin = i + 1
    return found or [list(messages)]


def count_untrained(
    messages: Sequence[Message], tools: Any = None, *, history: str = "harmony", given: int = 0
) -> int:
    """Count the turns that `render` leaves untrained because their analysis is dropped.

    Turns that begin among the first `given` messages are not trained anyway, and do not count.
    """
    parts = expand(messages, tools, VOCAB_SIZE)
    first = len(expand(messages[:given], tools, VOCAB_SIZE)) if given else 0
    turn = 1 + max((i for i, part in enumerate(parts) if part.role == "user"), default=-1)
    kept = drop_analysis(parts[:turn], history) + parts[turn:]
    untrained = {id(part) for part in untrained_of(parts, kept, turn, "all")}
    count, counted = 0, False
    for i, part in enumerate(parts):
        if part.role == "user":
            counted = False
        elif id(part) in untrained and not counted:
            count, counted = count + (i >= first), True
    return count


def continues(before: Sequence[int] | None, ids: Sequence[int], encoding: tiktoken.Encoding) -> int:
    """Return `borrowed` of ids if they follow the sampled ids `before`, which lack their end."""
    ends = (special_id(encoding, "<|end|>"), *stop_ids(encoding))
    if before is None or (before and before[-1] in ends):
        return 0
    return borrowed(ids, encoding)


def borrowed(ids: Sequence[int], encoding: tiktoken.Encoding) -> int:
    """Count the first ids that end the message before: 0, unless `<|start|>` is missing after it.

    `to_messages` gives such a message the `<|end|>` of the one before, to tell it from the first
    message of a turn, whose `<|start|>` is in the prompt.
    """
    end, size = special_id(encoding, "<|end|>"), 0
    if list(ids[:1]) != [end]:
        return 0
    opens = special_id(encoding, "<|channel|>"), special_id(encoding, "<|message|>")
    closes = special_id(encoding, "<|start|>"), *stop_ids(encoding)
    for k, token in enumerate(ids):
        if token in opens:
            return size
        if token in closes:
            break
        if token == end:
            size = k + 1
    return 0
