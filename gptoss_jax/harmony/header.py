"""Read the header of a sampled message: its role, channel, recipient and content type."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptoss_jax.harmony.channels import CHANNELS, ROLES
from gptoss_jax.harmony.tokenizer import decode, special_id

if TYPE_CHECKING:
    import tiktoken

CONSTRAIN = "<|constrain|>"

_WORD = re.compile(r"[^ \t\n\f\r]+")
_FIRST_WORD = re.compile(r"[ \t\n\f\r]*([^ \t\n\f\r]+)[ \t\n\f\r]?")


@dataclass(frozen=True)
class Header:
    """The header of a message: what is before `<|message|>`.

    If the role is "tool", `name` is the tool's name; otherwise it is a participant: `user:name`.
    """

    role: str = "assistant"
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None  # begins with `<|constrain|>` if that was sampled
    # Not as Harmony writes it, but its meaning is clear.
    irregular: bool = dataclasses.field(default=False, compare=False)


def parse_header(encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None) -> Header:
    """Read a header that `<|message|>` closed.

    `role` is the role that the prompt gave, or None if the header itself begins with a role. The
    recipient may be before the channel (as rendered) or after it (as sampled). The last word is the
    content type, unless `<|constrain|>` marks the content type. A word before the content type, or
    a function's name alone, is the recipient even without "to=".
    """
    before, after, constrained = _sections(encoding, ids)
    words, name, meant = _WORD.findall(before), None, None
    irregular = False
    if role is None:
        word = words.pop(0) if words else "assistant"
        role, name = _read_role(word)
        if (fused := _read_fused(word)) is not None:
            role, name, meant, irregular = "assistant", None, fused or None, True
    elif words[:1] == [role]:  # the prompt gave the role, and the model wrote it again
        del words[0]
    elif words and (fused := _read_fused(words[0])) is not None:
        del words[0]
        meant, irregular = fused or None, True
    behind = _WORD.findall(after or "")
    channel = behind.pop(0) if behind and not behind[0].startswith("to=") else meant
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
    called = recipient is not None and recipient.startswith("functions.")
    irregular = irregular or (called and role == "assistant" and channel in ("analysis", "final"))
    return Header(role, name, channel, recipient, content_type, irregular)


def parse_open_header(
    encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None
) -> tuple[Header, str]:
    """Read a header that no `<|message|>` closed; return it and the text that is not part of it."""
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
    """Split a header's text: its start, the part after `<|channel|>`, that after `<|constrain|>`.

    A part is None if its token is missing. A second token of the same kind is ordinary text.
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


def _read_fused(word: str) -> str | None:
    """Return the channel that a word in place of a role means; "" for none, None if it is no such.

    It is a channel's name, or "assistant" directly before a channel's name or before itself.
    """
    rest = word.removeprefix("assistant")
    if rest in CHANNELS:
        return rest
    return "" if rest == "assistant" else None


def _read_role(word: str) -> tuple[str, str | None]:
    """Return role and name of `user:name`, or "tool" and the name of a tool's message."""
    role, _, name = word.partition(":")
    return (role, name or None) if role in ROLES else ("tool", word)


def _take_word(text: str) -> tuple[str, str]:
    """Return the first word and the text after it and one space; "" and the text if no word."""
    match = _FIRST_WORD.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)
