"""Show packed batches as text: tokens that the loss counts are coloured, the others are dim.

Without colours, tokens that count are in [[ ]]. A loss weight other than 1 is shown before them:
[0.3[ ]]. Special tokens are shown by name, control characters by a symbol. A text that only spells
a special token has single angle quotation marks in place of < and >.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.text import Text

from gptoss_jax.data.preferences import SIDES
from gptoss_jax.harmony import tokenizer
from gptoss_jax.types import Batch

if TYPE_CHECKING:
    import tiktoken

TRAINED, TRAINED_SPECIAL = "bold green", "bold white on green"
OTHER, SPECIAL, HEAD = "dim", "cyan", "bold magenta"
FACTOR = "yellow"

# Replaced because a terminal would obey them: C0 except tab and newline, DEL, and C1.
_CONTROLS = {i: chr(0x2400 + i) for i in range(32) if chr(i) not in "\t\n"}
_CONTROLS |= {0x7F: "\u2421", **dict.fromkeys(range(0x80, 0xA0), "\ufffd")}

_OPEN, _CLOSE = "\u2039", "\u203a"  # of a text that spells a special token
_SPELLED = re.compile(r"<(\|[a-z]\w*\|)>")

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Packed batches</title>
<style>
body {{ margin: 2rem auto; max-width: 100ch; padding: 0 1rem; color: {foreground};
  background: {background}; }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.45;
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; font-size: 14px; }}
{stylesheet}
</style>
</head>
<body>
<pre>{code}</pre>
</body>
</html>
"""


def show(
    console: Console, batches: list[Batch], *, encoding: tiktoken.Encoding, **how: Any
) -> None:
    """Print batches as `describe` renders them, with its options; in colours on a terminal."""
    for text in describe(batches, encoding, plain=not console.is_terminal, **how):
        console.print(text, soft_wrap=True)


def write_page(
    path: Path, batches: list[Batch], *, encoding: tiktoken.Encoding, **how: Any
) -> None:
    """Write an HTML page, its style included, with what `show` prints in colours."""
    page = Console(file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor")
    show(page, batches, encoding=encoding, **how)
    path.write_text(page.export_html(code_format=_PAGE), encoding="utf-8")


def describe(
    batches: Iterable[Batch],
    encoding: tiktoken.Encoding,
    *,
    names: tuple[str, ...] = (),
    rows: int | None = None,
    plain: bool = False,
    pairs: bool = False,
) -> Iterator[Text]:
    """Yield a legend, then each batch, row and segment, each under a line with its token counts.

    `names` are the names of the sources. `rows` limits how many rows of a batch are shown. `plain`
    puts trained tokens in brackets. With `pairs`, two consecutive segments are the chosen and the
    rejected side of a pair.
    """
    yield _legend(plain)
    for number, batch in enumerate(batches):
        ids, tokens = np.asarray(batch.segment_ids), np.asarray(batch.tokens)
        weights = np.zeros(tokens.shape)  # at each token; the batch has them at the token before
        weights[:, 1:] = np.asarray(batch.weights)[:, :-1]
        trained = weights > 0
        size = f"{len(ids)} row{'s' * (len(ids) != 1)} of {ids.shape[1]:,}"
        yield Text(f"\n=== batch {number}: {size}; {_count(ids, trained)}", style=HEAD)
        for b in range(len(ids) if rows is None else min(rows, len(ids))):
            source = ""
            if batch.sources is not None:
                source = f", source {names[int(batch.sources[b])]}"
            segments = f"{ids[b].max()} segments, " if ids[b].max() != 1 else "1 segment, "
            yield Text(f"\n--- row {b}{source}: {segments}{_count(ids[b], trained[b])}", style=HEAD)
            for k in range(1, int(ids[b].max()) + 1):
                here = ids[b] == k
                name = f"segment {k}"
                if pairs:
                    name = f"pair {(k + 1) // 2}, {SIDES[(k + 1) % 2]}"
                size = _tokens(int(here.sum()), int(trained[b][here].sum()))
                yield Text(f"- {name}: {size}", style=HEAD)
                shown = tokens[b][here].tolist(), weights[b][here].tolist()
                yield _segment(*shown, encoding, plain=plain)


def _legend(plain: bool) -> Text:
    if plain:
        return Text(
            "[[trained]] (the loss counts these tokens; [0.3[these]] with weight 0.3)  other  "
            f"<|special|>  {_OPEN}|spelled|{_CLOSE} (text that only looks like a special token)"
        )
    return Text.assemble(
        ("trained", TRAINED),
        " and ",
        ("<|special|>", TRAINED_SPECIAL),
        ": the loss counts these tokens (with a weight, if one is shown before them); ",
        ("other", OTHER),
        " and ",
        ("<|special|>", SPECIAL),
        f": it does not; {_OPEN}|spelled|{_CLOSE}: text that only looks like a special token",
    )


def _count(ids: np.ndarray, trained: np.ndarray) -> str:
    real = int((ids > 0).sum())
    return f"{_tokens(real, int(trained.sum()))}, {ids.size - real:,} padding"


def _tokens(real: int, trained: int) -> str:
    return f"{real:,} tokens, {trained:,} trained"


@cache
def _special(encoding: tiktoken.Encoding) -> frozenset[int]:
    return frozenset(encoding.encode_single_token(name) for name in encoding.special_tokens_set)


def _segment(
    tokens: list[int], weights: list[float], encoding: tiktoken.Encoding, *, plain: bool
) -> Text:
    """Return a segment's text. Runs are decoded as a whole: a character may be several tokens."""
    special = _special(encoding)
    text = Text()
    kinds = ((t in special, weight) for t, weight in zip(tokens, weights, strict=True))
    for weight, spans in itertools.groupby(zip(tokens, kinds, strict=True), lambda x: x[1][1]):
        is_trained = weight > 0
        factor = f"{weight:.4g}" if is_trained and weight != 1 else ""
        if is_trained and plain:
            text.append(f"[{factor}[")
        elif factor:
            text.append(factor, FACTOR)
        for is_special, run in itertools.groupby(spans, lambda x: x[1][0]):
            style = (OTHER, SPECIAL) if not is_trained else (TRAINED, TRAINED_SPECIAL)
            decoded = tokenizer.decode(encoding, [token for token, _ in run])
            if not is_special:
                decoded = _SPELLED.sub(rf"{_OPEN}\1{_CLOSE}", decoded)
            text.append(decoded.translate(_CONTROLS), style[is_special])
        if is_trained and plain:
            text.append("]]")
    return text
