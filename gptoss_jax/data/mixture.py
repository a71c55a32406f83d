"""Weighted mixtures: which source the next row is from, so that each gets its share of the tokens.

Each source is shuffled, packed and repeated by itself, so a row holds records of one source. The
next row is always from the source that is furthest behind its share of the tokens given so far;
padding does not count. So the tokens of any prefix are right within about a row a source, however
long the records are, and the sequence depends on nothing but the rows.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_jax.config import Config
from gptoss_jax.data.examples import Source
from gptoss_jax.data.packing import Segment
from gptoss_jax.data.windows import Windows


class Mixture:
    """The turns of the sources. `tokens`, what each has given so far, is all its state."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Share the tokens out as `weights`, of any positive sum."""
        self.shares = shares(weights)
        self.tokens = [0] * len(weights)

    def pick(self) -> int:
        """Return the source of the next row: the one furthest behind, the first of equals."""
        total = sum(self.tokens)
        behind = [w * total - n for w, n in zip(self.shares, self.tokens, strict=True)]
        return behind.index(max(behind))

    def count(self, source: int, row: Sequence[Segment]) -> None:
        """Note a row given."""
        self.tokens[source] += sum(len(segment.tokens) for segment in row)


def shares(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum."""
    return [w / sum(weights) for w in weights]


def plan(source: Source, config: Config) -> Windows:
    """Plan the windows of a source of the training data: no two of a mixture have one order."""
    seed, examples = config.train.seed, source.examples
    if not config.data.weights:
        return Windows(examples, seed=seed)
    epochs = max(1, config.data.pack_window // len(examples))
    return Windows(examples, seed=f"{seed}/{source.index}", epochs=epochs)
