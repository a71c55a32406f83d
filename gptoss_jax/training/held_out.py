"""Evaluation during training: held-out loss, and held-out questions answered greedily."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import jax

from gptoss_jax import data, harmony
from gptoss_jax.config import Config
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.objectives import make_objective
from gptoss_jax.objectives.objective import ROUND_AS_WRITTEN, Loss
from gptoss_jax.sampler import Sampler
from gptoss_jax.types import Batch, Params

_QUESTIONS_AT_ONCE = 64


def evaluate(
    model: Transformer,
    params: Params,
    batches: list[Batch],
    *,
    questions: list[data.Question],
    config: Config,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scores, and samples of the model's answers.

    The scores are held-out loss and perplexity, and the share of questions answered exactly. For
    preference pairs the loss is that of the pairs; the scores have their rewards, and no
    perplexity.

    The samples are the first `train.eval_samples` questions with their answers, as records for
    `MetricsLog.write_samples`. An answer is the text of the final channel, or all sampled text if
    the model never reached that channel.
    """
    # Fetch each result before the next batch starts. Several processes on CPUs may deadlock
    # otherwise: see `runs/checksums.py`.
    objective = make_objective(config)
    measure = _measure(objective.held_out_loss, objective.compares_models)
    sums = [jax.device_get(measure(model, params, batch)) for batch in batches]
    nll, weight = (sum(float(s[i]) for s in sums) for i in (0, 1))
    loss = nll / weight if weight else math.nan
    scores: dict[str, Any] = {"held_out_loss": loss}
    if objective.has_perplexity:
        scores["held_out_perplexity"] = math.exp(min(loss, 700.0))
    for name in sums[0][2] if weight else ():
        scores[f"held_out_{name}"] = sum(float(s[2][name]) for s in sums) / weight
    samples: list[dict[str, Any]] = []
    if questions:
        # Read packed experts in the layout of training: a relaid copy would take memory beside the
        # training state.
        sampler = Sampler(model, params, relay=False)
        encoding = tokenizer.get_tokenizer(config.model.vocab_size)
        right = 0
        for at in range(0, len(questions), _QUESTIONS_AT_ONCE):
            some = questions[at : at + _QUESTIONS_AT_ONCE]
            out = sampler.generate(
                [q.prompt for q in some], max_tokens=config.train.eval_max_tokens, temperature=0.0
            )
            answers = [_final_text(ids, encoding) for ids in out.tokens]
            for q, ids, text in zip(some, out.tokens, answers, strict=True):
                ok = text == q.answer.strip()
                right += ok
                if len(samples) < config.train.eval_samples:
                    samples.append(
                        {
                            "question": _last_user_text(q.prompt, encoding),
                            "expected": q.answer.strip(),
                            "answer": tokenizer.decode(encoding, ids) if text is None else text,
                            "right": ok,
                        }
                    )
        scores["exact_match"] = right / len(questions)
    return scores, samples


@cache
def _measure(loss: Loss, compares_models: bool) -> Callable[..., Any]:
    """Return a jitted function of (model, params, batch) that gives the sums nll, weight and extra.

    The cache has one function for each loss, so that each is compiled once.
    """

    def run(model: Transformer, params: Params, batch: Batch) -> Any:
        sums = loss(model, params, batch)
        return sums.nll, sums.weight, sums.extra

    options = ROUND_AS_WRITTEN if compares_models else None
    return jax.jit(run, static_argnums=0, compiler_options=options)


def _final_text(ids: list[int], encoding: Any) -> str | None:
    """Return the text of the final channel in sampled ids, or None if they never reach it."""
    final = [m.content for m in harmony.parse(ids, encoding) if m.header.channel == "final"]
    return final[-1].strip() if final else None


def _last_user_text(prompt: list[int], encoding: Any) -> str:
    """Return the last user message of a prompt, or the whole prompt if it has none."""
    read = harmony.parse(prompt, encoding, after_prompt=False)
    texts = [m.content for m in read if m.header.role == "user"]
    return texts[-1] if texts else tokenizer.decode(encoding, prompt)
