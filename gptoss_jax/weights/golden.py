"""Reference log-probabilities of the two published models, from transformers' integration test."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from gptoss_jax.config import ModelConfig
from gptoss_jax.errors import UserError

PROMPT = "Roses are red, violets"
TOLERANCE = 0.1
_20B = ModelConfig()
_120B = dataclasses.replace(_20B, num_layers=36, num_experts=128)
# fmt: off
LOGPROBS = {  # of the 12 tokens that each model decodes greedily after PROMPT
    "20b": (-0.0374, -0.0815, -1.2188, -1.9531, -2.2344, -0.9688, -1.5469, -1.6406, -0.9336,
            -1.6094, -1.6250, -0.8555),
    "120b": (-0.9023, -0.6602, -1.5469, -2.7031, -2.0781, -1.2188, -2.4844, -0.0320, -0.8477,
             -1.8906, -0.1924, -2.0469),
}
# fmt: on


def size_of(config: ModelConfig) -> str:
    """Return "20b" or "120b". Raises UserError for any other model, which has no reference."""
    for name, known in (("20b", _20B), ("120b", _120B)):
        if config.architecture == known.architecture:
            return name
    raise UserError(
        f"verify knows gpt-oss-20b and gpt-oss-120b, and this is neither: {config.num_layers} "
        f"layers, {config.num_experts} experts, d_model {config.d_model}, vocabulary "
        f"{config.vocab_size}"
    )


def agrees(logprobs: Sequence[float], golden: Sequence[float]) -> list[bool]:
    """Say for each golden value whether ours is within `TOLERANCE`; missing and NaN are not."""
    padded = [*logprobs, *[float("nan")] * (len(golden) - len(logprobs))]
    return [abs(ours - known) <= TOLERANCE for ours, known in zip(padded, golden, strict=False)]
