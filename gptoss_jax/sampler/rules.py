"""Choose tokens from logits, by temperature, top-k, top-p and min-p, with log-probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from gptoss_jax.errors import UserError

# What the compiled code does. Within a mode, another value of a rule compiles nothing. "greedy"
# draws nothing, "draw" (temperature, min-p) does not sort the logits, "sorted" does.
Mode = Literal["greedy", "draw", "sorted"]

_COLDEST = 1e-6  # the lowest temperature that is used: a logit divided by it fits float32


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen. Rules apply in this order, each to the tokens that are left.

    temperature: divides the logits; 0 takes the likeliest token and ignores the other rules.
    top_k: keep the k likeliest tokens (more where the last ones tie).
    top_p: keep the likeliest tokens until their probability reaches top_p.
    min_p: keep tokens of at least min_p times the probability of the likeliest.

    tempered: record log-probabilities of the tempered logits: those that tokens were drawn with, if
        no rule cut any off. Otherwise record the model's own, whatever the rules.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    tempered: bool = False

    def __post_init__(self) -> None:
        """Refuse invalid values."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise UserError(
                f"temperature is {self.temperature}: it is a number of at least 0 (0 is greedy)"
            )
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it is at least 1, or None for no limit")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be in (0, 1]")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: it must be in [0, 1]")

    @property
    def mode(self) -> Mode:
        """Which code these rules need."""
        if self.temperature == 0:
            return "greedy"
        return "draw" if self.top_k is None and self.top_p == 1 else "sorted"

    def values(self, vocab_size: int) -> RuleValues:
        """Return the rules as host numbers, which are the same on every host of a run."""
        values: Any = (
            np.float32(self.temperature),
            np.int32(min(self.top_k or vocab_size, vocab_size)),
            np.float32(self.top_p),
            np.float32(self.min_p),
            np.float32(self.temperature if self.tempered and self.temperature else 1.0),
        )
        return RuleValues(*values)


@struct.dataclass
class RuleValues:
    """`Rules` as arguments of compiled code."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    recorded: Float[Array, ""]  # the temperature of the log-probabilities that are recorded


def kept(
    scaled: Float[Array, "B V"], values: RuleValues, *, ordered: bool = True
) -> Bool[Array, "B V"]:
    """Return which tokens top-k, top-p and min-p keep; they always keep the likeliest.

    `scaled` are tempered logits with maximum 0 in each row. `ordered=False` skips top-k and top-p,
    and with them the sort.
    """
    floor = jnp.log(values.min_p)  # -inf for 0: keeps everything
    if ordered:
        down = -jnp.sort(-scaled, axis=-1)
        in_k = jnp.arange(down.shape[-1]) < values.top_k
        probs = jax.nn.softmax(down, axis=-1, where=in_k)
        before = jnp.cumsum(probs, axis=-1) - probs  # probability of the likelier tokens
        # With top_p 1, a sum that rounding has brought to 1 must not cut the tail off.
        in_p = (before < values.top_p) | (values.top_p >= 1)
        lowest = jnp.min(down, axis=-1, keepdims=True, where=in_k & in_p, initial=0.0)
        floor = jnp.maximum(floor, lowest)
    return scaled >= floor


def choose(
    logits: Float[Array, "B V"],
    keys: PRNGKeyArray,
    values: RuleValues,
    *,
    mode: Mode,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Choose a token for each row, and return it with its log-probability.

    The log-probability is the model's own, log_softmax(logits) in float32, whatever the rules; with
    `Rules.tempered`, it is that of the tempered logits. `keys` [B] has a random key for each row: a
    row's token depends only on its own logits and key.
    """
    logits = logits.astype(jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    centred = logits - top
    recorded = centred / jnp.maximum(values.recorded, _COLDEST)
    log_sum = jnp.log(jnp.sum(jnp.exp(recorded), axis=-1))
    if mode == "greedy":
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), -log_sum
    scaled = centred / jnp.maximum(values.temperature, _COLDEST)
    keep = kept(scaled, values, ordered=mode == "sorted")
    tokens = jax.vmap(jax.random.categorical)(keys, jnp.where(keep, scaled, -jnp.inf))
    chosen = jnp.take_along_axis(recorded, tokens[:, None], axis=-1)[:, 0]
    return tokens.astype(jnp.int32), chosen - log_sum
