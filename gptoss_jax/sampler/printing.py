"""Print tokens as they are sampled, by Harmony channel or as plain text; measure the speed."""

from __future__ import annotations

import codecs
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from gptoss_jax.harmony import tokenizer
from gptoss_jax.harmony.parser import MessageEnd, MessageStart, StreamParser, TextDelta
from gptoss_jax.sampler.sampler import Sampled

if TYPE_CHECKING:
    import tiktoken


def print_channels(
    console: Console, stream: Iterable[Sampled], *, encoding: tiktoken.Encoding
) -> StreamParser:
    """Print Harmony messages as they are sampled; all channels but final are dim and named.

    Returns the parser, which holds the messages.
    """
    parser = StreamParser(encoding)

    def show(events: Iterable[Any]) -> None:
        nonlocal style
        for event in events:
            if isinstance(event, MessageStart):
                header = event.header
                final = header.channel == "final"
                style = None if final else "dim"
                if not final:
                    to = f" to {header.recipient}" if header.recipient else ""
                    console.print(f"[{header.channel or header.role}{to}]", style="dim bold")
            elif isinstance(event, TextDelta):
                console.print(event.text, style=style, end="", soft_wrap=True)
            elif isinstance(event, MessageEnd):
                console.print()

    style = None
    for item in stream:
        show(parser.process(item.token))
    show(parser.finish())
    return parser


def print_text(console: Console, stream: Iterable[Sampled], *, encoding: tiktoken.Encoding) -> None:
    """Print the text of ids as they are sampled, special tokens by name."""
    utf8 = codecs.getincrementaldecoder("utf-8")("replace")
    for item in stream:
        text = utf8.decode(tokenizer.token_bytes(encoding, item.token))
        console.print(text, end="", soft_wrap=True)
    console.print(utf8.decode(b"", final=True))


class Clocked:
    """A stream that counts and times its tokens."""

    def __init__(self, stream: Iterable[Sampled]) -> None:
        self._stream = stream
        self._times: list[float] = []

    def __iter__(self):
        for item in self._stream:
            self._times.append(time.perf_counter())
            yield item

    def summary(self) -> str:
        """Return one line; the speed leaves out the first token, with prompt and compilation."""
        count = len(self._times)
        if count < 2:
            return f"{count} token"
        speed = (count - 1) / (self._times[-1] - self._times[0])
        return f"{count} tokens, {speed:.1f} tokens/s"
