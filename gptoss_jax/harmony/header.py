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

CHANNEL, CONSTRAIN = "<|channel|>", "<|constrain|>"

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


def parse_header(
    encoding: tiktoken.Encoding, ids: Iterable[int], role: str | None, *, started: bool = True
) -> Header:
    """Read a header that `<|message|>` closed.

    `role` is the role that the prompt gave, or None if the header itself begins with a role. The
    recipient may be before the channel (as rendered) or after it (as sampled). The last word is the
    content type, unless `<|constrain|>` marks the content type. A word before the content type, or
    a function's name alone, is the recipient even without "to=". If the header has more than one
    channel or marked content type, the last one counts.

    `started=False` says that `<|start|>` is missing before the header: words may be before it that
    are no part of it, and the role is the assistant's unless the first word is another.
    """
    (_, before), *sections = _sections(encoding, ids)
    words, name, meant = _WORD.findall(before), None, None
    irregular = not started or _repeats(sections)
    if not started:
        words, role = _words_of_header(words), None
    if role is None:
        word = words.pop(0) if words else "assistant"
        role, name = _read_role(word)
        if word != "assistant" and (fused := _read_fused(word)) is not None:
            role, name, meant, irregular = "assistant", None, fused or None, True
    elif words[:1] == [role]:  # the prompt gave the role, and the model wrote it again
        del words[0]
    while role == "assistant" and words and (fused := _read_fused(words[0])) is not None:
        del words[0]
        meant, irregular = fused or meant, True
    channel, marked_type, constrained, typed = meant, "", False, []
    for mark, text in sections:
        found = _WORD.findall(text)
        if mark == CONSTRAIN:
            constrained, typed = True, [*typed, *found]
            marked_type = next((w for w in found if not w.startswith("to=")), marked_type)
            continue
        if found and not found[0].startswith("to="):
            channel = found.pop(0)
        words += found
    marked = [word for word in [*words, *typed] if word.startswith("to=")]
    words = [word for word in words if not word.startswith("to=")]
    recipient = marked[0].removeprefix("to=") or None if marked else None
    content_type = None
    if constrained:
        content_type = CONSTRAIN + marked_type
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
    """Read a header that no `<|message|>` closed; return it and the text that is not part of it.

    A channel's name directly after "assistant" may be broken off: then there is no channel.
    """
    (_, before), *sections = _sections(encoding, ids)
    name = recipient = channel = content_type = None
    irregular = _repeats(sections)
    word, rest = _take_word(before)
    if role is None or word == role:
        fused = _read_fused(word, open_=True) if role is None and word != "assistant" else None
        role, name = _read_role(word or "assistant")
        if word and fused is not None:
            role, name, channel, irregular = "assistant", None, fused or None, True
        before = rest
        word, rest = _take_word(before)
    while role == "assistant" and word.startswith("assistant"):
        if (fused := _read_fused(word, open_=True)) is None:
            break
        channel, irregular, before = fused or channel, True, rest
        word, rest = _take_word(before)
    if word.startswith("to="):
        recipient, before = word.removeprefix("to="), rest
    content = before
    for mark, text in sections:
        word, rest = _take_word(text)
        if mark == CONSTRAIN:
            content_type = CONSTRAIN + word if word or content_type is None else content_type
            content += rest
            continue
        if not word.startswith("to="):
            channel, text = word or channel, rest
            word, rest = _take_word(text)
        if word.startswith("to="):
            recipient, text = recipient or word.removeprefix("to="), rest
        content += text
    return Header(role, name, channel, recipient or None, content_type, irregular), content


def _sections(encoding: tiktoken.Encoding, ids: Iterable[int]) -> list[tuple[str, str]]:
    """Split a header's text at `<|channel|>` and `<|constrain|>`.

    Returns each of these tokens' names with the text that follows it; first "" with the text before
    them.
    """
    marks = {special_id(encoding, name): name for name in (CHANNEL, CONSTRAIN)}
    sections: list[tuple[str, list[int]]] = [("", [])]
    for i in ids:
        if i in marks:
            sections.append((marks[i], []))
        else:
            sections[-1][1].append(i)
    return [(mark, decode(encoding, section)) for mark, section in sections]


def _repeats(sections: list[tuple[str, str]]) -> bool:
    """Whether a section comes more than once."""
    return len({mark for mark, _ in sections}) < len(sections)


def _words_of_header(words: list[str]) -> list[str]:
    """Return the words of a header without `<|start|>`: they begin with the role."""
    named = [i for i, word in enumerate(words) if _read_fused(word) is not None]
    if named:
        return words[named[-1] :]
    if words and words[0].partition(":")[0] in ROLES:
        return words
    return ["assistant", *(word for word in words if word.startswith("to="))]


def _read_fused(word: str, *, open_: bool = False) -> str | None:
    """Return the channel that a word in place of a role means; "" for none, None if it is no such.

    It is a channel's name, or "assistant" once or more, directly before a channel's name or alone.
    With `open_`, the name after "assistant" may be broken off.
    """
    rest = word
    while rest.startswith("assistant"):
        rest = rest.removeprefix("assistant")
    if rest in CHANNELS:
        return rest
    broken = open_ and any(channel.startswith(rest) for channel in CHANNELS)
    return "" if rest != word and (not rest or broken) else None


def _read_role(word: str) -> tuple[str, str | None]:
    """Return role and name of `user:name`, or "tool" and the name of a tool's message."""
    role, _, name = word.partition(":")
    return (role, name or None) if role in ROLES else ("tool", word)


def _take_word(text: str) -> tuple[str, str]:
    """Return the first word and the text after it and one space; "" and the text if no word."""
    match = _FIRST_WORD.match(text)
    return (match[1], text[match.end() :]) if match else ("", text)
