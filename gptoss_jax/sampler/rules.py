"""From logits to a token: temperature, top-k, top-p, min-p, and what is recorded of the choice."""

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

# What the compiled code does; within a mode no value of a rule compiles anything anew. "greedy"
# draws nothing, "draw" needs no order among the logits (temperature, min-p), "sorted" does.
Mode = Literal["greedy", "draw", "sorted"]

_COLDEST = 1e-6  # temperatures below are this: its inverse times a logit stays a float32


@dataclass(frozen=True)
class Rules:
    """How tokens are chosen; applied in this order, each to what the one before left.

    temperature: divides the logits; 0 takes the likeliest token and makes the rest irrelevant.
    top_k: keep the k likeliest tokens (more where the last ones tie).
    top_p: keep the likeliest tokens until their probability reaches top_p.
    min_p: keep tokens of at least min_p times the probability of the likeliest.

    tempered: record log-probabilities of the tempered logits, which is what was drawn from where
        nothing was cut off. Else they are the model's own, whatever the rules.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    tempered: bool = False

    def __post_init__(self) -> None:
        """Refuse what is no rule."""
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
        """Return the rules as numbers of the host, which every host of a run has alike."""
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
    """Say which tokens top-k, top-p and min-p leave; the likeliest is always among them.

    `scaled` are tempered logits with maximum 0 in each row. `ordered=False` leaves top-k and top-p
    out, and the sort with them.
    """
    floor = jnp.log(values.min_p)  # -inf for 0: keeps everything
    if ordered:
        down = -jnp.sort(-scaled, axis=-1)
        in_k = jnp.arange(down.shape[-1]) < values.top_k
        probs = jax.nn.softmax(down, axis=-1, where=in_k)
        before = jnp.cumsum(probs, axis=-1) - probs  # of the tokens that are likelier
        # A sum that rounding has brought to 1 must not cut the tail off where top_p is 1.
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
    """Choose a token a row, and return it with its log-probability.

    The log-probability is that of the model, log_softmax(logits) in float32, whatever the rules;
    with `Rules.tempered`, of the tempered logits. `keys` [B] is a random key a row: a row's token
    depends on its own logits and key alone.
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
