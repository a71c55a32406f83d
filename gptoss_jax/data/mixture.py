"""Weighted mixtures: choose the source of each row so that every source gets its token share.

Each source is shuffled, packed and repeated by itself, so a row holds records of one source. The
next row always comes from the source that is furthest behind its share of the tokens so far;
padding does not count. So after any number of rows, each source is within about one row of its
share, however long its records are. The sequence depends on the rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence

from gptoss_jax.config import Config
from gptoss_jax.data.examples import Source
from gptoss_jax.data.packing import Segment
from gptoss_jax.data.windows import Windows


class Mixture:
    """Picks the source of each row. Its whole state is `tokens`: the tokens so far, per source."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Share the tokens out in proportion to `weights`, whose sum may be any positive number."""
        self.shares = shares(weights)
        self.tokens = [0] * len(weights)

    def pick(self) -> int:
        """Return the source of the next row: the one furthest behind; the first one on a tie."""
        total = sum(self.tokens)
        behind = [w * total - n for w, n in zip(self.shares, self.tokens, strict=True)]
        return behind.index(max(behind))

    def count(self, source: int, row: Sequence[Segment]) -> None:
        """Count the tokens of a row that was taken from a source."""
        self.tokens[source] += sum(len(segment.tokens) for segment in row)


def shares(weights: Sequence[float]) -> list[float]:
    """Divide weights by their sum."""
    return [w / sum(weights) for w in weights]


def plan(source: Source, config: Config) -> Windows:
    """Plan the windows of a source of the training data.

    Each source of a mixture is shuffled with a seed of its own.
    """
    seed, examples = config.train.seed, source.examples
    if not config.data.weights:
        return Windows(examples, seed=seed)
    epochs = max(1, config.data.pack_window // len(examples))
    return Windows(examples, seed=f"{seed}/{source.index}", epochs=epochs)
