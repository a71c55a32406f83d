"""What a run is judged by while it trains: held-out loss, and questions answered greedily."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax

from gptoss_jax import data, harmony_parser, tokenizer
from gptoss_jax.config import Config
from gptoss_jax.loss import loss_fn
from gptoss_jax.model import Transformer
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
) -> dict[str, Any]:
    """Return held-out loss and perplexity, and the share of questions answered exactly."""
    sums = jax.device_get([_held_out(model, params, batch) for batch in batches])
    nll, weight = (sum(float(s[i]) for s in sums) for i in (0, 1))
    loss = nll / weight if weight else math.nan
    scores: dict[str, Any] = {
        "held_out_loss": loss,
        "held_out_perplexity": math.exp(min(loss, 700.0)),
    }
    if questions:
        sampler = Sampler(model, params)
        encoding = tokenizer.get_tokenizer(config.model.vocab_size)
        right = 0
        for at in range(0, len(questions), _QUESTIONS_AT_ONCE):
            some = questions[at : at + _QUESTIONS_AT_ONCE]
            out = sampler.generate(
                [q.prompt for q in some], max_tokens=config.train.eval_max_tokens, temperature=0.0
            )
            said = [_final_text(ids, encoding) for ids in out.tokens]
            right += sum(text == q.answer.strip() for text, q in zip(said, some, strict=True))
        scores["exact_match"] = right / len(questions)
    return scores


@partial(jax.jit, static_argnums=0)
def _held_out(model: Transformer, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    sums = loss_fn(model, params, batch)
    return sums.nll, sums.weight


def _final_text(ids: list[int], encoding: Any) -> str | None:
    """Return what sampled ids say in the final channel, None if they never come to it."""
    parser = harmony_parser.StreamParser(encoding)
    for token in ids:
        parser.process(token)
    parser.finish()
    final = [m.content for m in parser.messages if m.header.channel == "final"]
    return final[-1].strip() if final else None
