"""Group relative policy optimisation (GRPO): the loss (Shao et al. 2024, arXiv:2402.03300).

Let x = log p(token) under the trained model and q = log p(token) under the sampler when it drew the
token, both at the temperature of sampling. With r = exp(x - q), and A the answer's advantage over
its group,

    loss = mean over all answer tokens of the step of
           -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl * (exp(b - x) - (b - x) - 1)

where b = log p(token) under the reference, the same model without its adapters, computed as in DPO,
so that new adapters begin at a divergence of 0. The second term is
the "k3" estimate of the divergence from the reference. As in GRPO, the gradient is that of this
estimate.

As in DAPO (Yu et al. 2025, arXiv:2503.14476), the mean is over the tokens of all answers together,
and the two clipping bounds may differ. So every token counts the same, while GRPO's mean over
answers makes the tokens of long answers count less. If all answers of a group have the same reward,
their advantage is 0; they still count in the mean, and no others are sampled in their place.

q comes from the sampler, not from the trainer before the first update. The two differ by rounding:
different kernels compute prompts, cached steps and training, and in bfloat16 a near tie may route a
token to another expert. With the sampler's q, r is the importance weight of the tokens that were in
fact drawn, it is clipped where the two are far apart, and no extra pass over the answers is needed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gptoss_jax.config import Config
from gptoss_jax.config.objective import GRPOConfig
from gptoss_jax.lora import adapters
from gptoss_jax.objectives import sft
from gptoss_jax.objectives.objective import Objective
from gptoss_jax.objectives.reinforcement import rollouts
from gptoss_jax.objectives.reinforcement.rollouts import ADVANTAGES, FRESH, SAMPLED
from gptoss_jax.objectives.token_loss import LossSums, forward, router_penalty, weighted_nll
from gptoss_jax.types import Batch, Params

# Log ratios are limited to this: its exponential fits float32, and larger ones are broken numbers.
_FARTHEST = 30.0


def objective(config: Config) -> Objective:
    """Return the objective of a config whose `objective.name` is grpo. Raises UserError."""
    rollouts.check(config)
    return sft.objective(config)._replace(
        open_batches=lambda rows=None: rollouts.open_questions(config),
        first_batches=partial(rollouts.unanswered, config),
        make_prepare=partial(rollouts.Rollouts, config),
        loss=partial(grpo_loss, grpo=config.objective.grpo, **sft.router_losses(config)),
        compares_with_base=config.objective.grpo.kl > 0,
        compares_models=True,
        complete=rollouts.complete,
    )


def grpo_loss(
    model: Any,
    params: Params,
    batch: Batch,
    *,
    grpo: GRPOConfig,
    balance_loss: float = 0.0,
    z_loss: float = 0.0,
) -> LossSums:
    """Run the model on a batch of `rollouts.make_batch` and sum the loss over the answers' tokens.

    `extra` has, as sums over tokens:
    - `clipped`: tokens whose gradient is 0 because of clipping;
    - `kl`: the estimate of the divergence from the reference, if grpo.kl is above 0;
    - in the first step on a set of answers (else NaN): `sampler_gap`, |x - q|; `sampler_gap_max`,
      its maximum over the batch (with accumulation: the mean of the microbatches' maxima);
      `sampler_kl`, the k3 estimate of the divergence of the trainer from the sampler.
    """
    given = batch
    batch, out = forward(model, params, given)
    assert batch.per_token is not None and batch.shared is not None
    weights = jnp.asarray(batch.weights, jnp.float32)
    # This divides the logits. In bfloat16 it rounds once more than the sampler does, which
    # `sampler_gap` includes.
    hidden = out.hidden / grpo.temperature

    def logprobs(params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T"]:
        frozen = jax.lax.stop_gradient((params, hidden))
        return -weighted_nll(model, *frozen, batch.targets, weights)[1]

    x = logprobs(params, hidden)
    reference = None
    if grpo.kl:
        base = jax.lax.stop_gradient(adapters.switched_off(params))
        reference = logprobs(base, forward(model, base, given)[1].hidden / grpo.temperature)
    each, slope, extra = token_losses(
        x,
        batch.per_token[SAMPLED],
        batch.per_token[ADVANTAGES],
        reference=reference,
        grpo=grpo,
    )
    value = jnp.sum(weights * each)
    # The gradient with respect to x goes through the unembedding like a weighted likelihood's.
    surrogate, _ = weighted_nll(model, params, hidden, batch.targets, -weights * slope)
    loss = surrogate + jax.lax.stop_gradient(value - surrogate)
    tokens, penalty = router_penalty(batch, out, balance_loss=balance_loss, z_loss=z_loss)
    weight = jnp.sum(weights)
    sums = {name: jnp.sum(weights * value) for name, value in extra.items()}
    sums["sampler_gap_max"] = jnp.max(weights * extra["sampler_gap"]) * weight
    fresh = batch.shared[FRESH] > 0
    sums = {k: jnp.where(fresh, v, jnp.nan) if k[:7] == "sampler" else v for k, v in sums.items()}
    return LossSums(loss, weight, penalty, tokens, out.router, extra=sums)


def token_losses(
    x: Float[Array, "B T"],
    sampled: Float[Array, "B T"],
    advantages: Float[Array, "B T"],
    *,
    reference: Float[Array, "B T"] | None,
    grpo: GRPOConfig,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], dict[str, Float[Array, "B T"]]]:
    """Return each token's loss, its derivative with respect to `x`, and the values to log."""
    gap = jnp.clip(x - sampled, -_FARTHEST, _FARTHEST)
    ratio = jnp.exp(gap)
    bounded = jnp.clip(ratio, 1 - grpo.clip_low, 1 + grpo.clip_high)
    cut = bounded * advantages < ratio * advantages  # where min takes the side that has no gradient
    each = -jnp.minimum(ratio * advantages, bounded * advantages)
    slope = jnp.where(cut, 0.0, -ratio * advantages)
    extra = {
        "clipped": cut.astype(jnp.float32),
        "sampler_gap": jnp.abs(x - sampled),
        "sampler_kl": jnp.expm1(gap) - gap,  # expm1: no cancellation for small gaps
    }
    if reference is not None:
        away = jnp.clip(reference - x, -_FARTHEST, _FARTHEST)
        extra["kl"] = jnp.expm1(away) - away
        each = each + grpo.kl * extra["kl"]
        slope = slope - grpo.kl * jnp.expm1(away)
    return each, slope, extra
