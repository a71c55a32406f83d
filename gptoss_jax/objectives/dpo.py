"""Direct preference optimisation (DPO): a loss on pairs of answers, without a reward model.

Rafailov et al. 2023, arXiv:2305.18290, equation 7. With w the weights of an answer's tokens and
p_0 the reference, which is the same model without its adapters,

    reward(answer) = beta * sum_t w_t (log p(token_t) - log p_0(token_t))
    margin         = reward(chosen) - reward(rejected)
    loss of a pair = -(1 - s) log sigmoid(margin) - s log sigmoid(-margin)
                     + sft_weight * mean_t of -log p over the chosen answer, weighted by w

The reference keeps its adapters, with B = 0 (`adapters.switched_off`), and the step is compiled
with `objective.ROUND_AS_WRITTEN`. So new adapters begin at a loss of log 2 exactly, in bfloat16
too.

s is `label_smoothing`, the chance that a pair is the wrong way round (Mitchell 2023, "A note on DPO
with noisy preferences"). The loss of a batch is the mean over its pairs. In a row, pair k is the
segments 2k + 1, chosen, and 2k + 2, rejected: see `data/preferences.py`.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gptoss_jax.config import Config
from gptoss_jax.config.objective import DPOConfig
from gptoss_jax.errors import UserError
from gptoss_jax.lora import adapters
from gptoss_jax.objectives import sft
from gptoss_jax.objectives.objective import Loss, Objective
from gptoss_jax.objectives.token_loss import LossSums, forward, router_penalty, weighted_nll
from gptoss_jax.types import Batch, Params


def objective(config: Config) -> Objective:
    """Return the objective of a config whose `objective.name` is dpo. Raises UserError."""
    check(config)
    return sft.objective(config)._replace(
        loss=partial(dpo_loss, dpo=config.objective.dpo, **sft.router_losses(config)),
        total=total_pairs,
        held_out_loss=_held_out_loss(config.objective.dpo),
        has_perplexity=False,
        compares_with_base=True,
        compares_models=True,
    )


@cache
def _held_out_loss(dpo: DPOConfig) -> Loss:
    return partial(dpo_loss, dpo=dpo)


def check(config: Config) -> None:
    """Refuse a config that leaves no reference. Raises `UserError`."""
    if not config.model.lora.targets:
        raise UserError(
            "objective.name is dpo, whose reference is the model without its adapters, and there "
            "are none: give --model.lora.targets attention, or others"
        )
    others = [text for text in config.optimizer.only if not text.startswith("lora/")]
    if others:
        raise UserError(
            "objective.name is dpo, whose reference is the model without its adapters, and "
            f"optimizer.only ({', '.join(others)}) would train that, too: leave it "
            "out"
        )


def dpo_loss(
    model: Any,
    params: Params,
    batch: Batch,
    *,
    dpo: DPOConfig,
    balance_loss: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Sum the loss over the pairs of a batch; `LossSums.weight` counts the pairs.

    The gradient, for the adapters and for what else in `params` is trained, comes from the adapted
    model alone: the reference has no gradient. `extra` has these sums over pairs: the margin, how
    often it is positive (a margin of 0 counts half), and the rewards of both sides.
    """
    ordered, out = forward(model, params, batch)
    weights = jnp.asarray(ordered.weights, jnp.float32)
    _, nll = weighted_nll(model, params, out.hidden, ordered.targets, weights)
    with jax.named_scope("reference"):
        base = jax.lax.stop_gradient(adapters.switched_off(params))
        hidden = forward(model, base, batch)[1].hidden
        _, reference = weighted_nll(model, base, hidden, ordered.targets, weights)

    nll, reference = jax.lax.stop_gradient((nll, reference))
    gains = dpo.beta * _by_pair(weights * (reference - nll), ordered.segment_ids)
    is_pair = jnp.arange(gains.shape[1]) < count_pairs(batch.segment_ids)[:, None]
    margins = gains[..., 0] - gains[..., 1]
    losses, slopes = preference(margins, dpo.label_smoothing)
    # The derivative with respect to each token's nll. A higher nll lowers its side's reward, so
    # the chosen side gets the opposite sign.
    slopes = jnp.where(is_pair, slopes, 0)
    by_side = dpo.beta * jnp.stack([-slopes, slopes], axis=-1)
    if dpo.sft_weight:
        size = _by_pair(weights, ordered.segment_ids)[..., 0]
        each = dpo.sft_weight / jnp.where(size > 0, size, 1)
        losses += each * _by_pair(weights * nll, ordered.segment_ids)[..., 0]
        by_side = by_side.at[..., 0].add(jnp.where(is_pair, each, 0))
    factors = weights * _of_tokens(by_side, ordered.segment_ids)
    surrogate, _ = weighted_nll(model, params, out.hidden, ordered.targets, factors)

    def total(x: Array) -> Float[Array, ""]:
        return jnp.sum(jnp.where(is_pair, x, 0))

    value = total(losses) + (surrogate - jax.lax.stop_gradient(surrogate))
    tokens, penalty = router_penalty(batch, out, balance_loss=balance_loss, z_loss=z_loss)
    extra = {
        "reward_margin": total(margins),
        "reward_accuracy": total((margins > 0) + 0.5 * (margins == 0)),
        "reward_chosen": total(gains[..., 0]),
        "reward_rejected": total(gains[..., 1]),
    }
    return LossSums(value, total_pairs(batch), penalty, tokens, out.router, extra=extra)


def total_pairs(batch: Batch) -> Float[Array, ""]:
    """Count the pairs of a batch: the divisor of its loss."""
    return jnp.sum(count_pairs(batch.segment_ids)).astype(jnp.float32)


def count_pairs(segment_ids: Int[Array, "B T"]) -> Int[Array, " B"]:
    """Count the pairs of each row."""
    return jnp.max(segment_ids, axis=1) // 2


def preference(
    margins: Float[Array, "..."], label_smoothing: float
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Return the loss of each margin, and its derivative."""
    s = label_smoothing
    loss = -(1 - s) * jax.nn.log_sigmoid(margins) - s * jax.nn.log_sigmoid(-margins)
    return loss, s * jax.nn.sigmoid(margins) - (1 - s) * jax.nn.sigmoid(-margins)


def _by_pair(values: Float[Array, "B T"], segment_ids: Int[Array, "B T"]) -> Array:
    """Sum over the tokens of each segment: [B, pairs, 2], with all pairs that a row could have."""
    slots = 2 * (values.shape[1] // 2)
    sums = jax.vmap(lambda x, at: jax.ops.segment_sum(x, at, 1 + slots))(values, segment_ids)
    return sums[:, 1:].reshape(len(values), -1, 2)


def _of_tokens(by_side: Float[Array, "B pairs 2"], segment_ids: Int[Array, "B T"]) -> Array:
    """Give each token the value of its segment; padding gets 0."""
    slots = jnp.pad(by_side.reshape(len(by_side), -1), [(0, 0), (1, 0)])
    return jnp.take_along_axis(slots, segment_ids, axis=1)
