"""The load of the experts: measure how routers spread tokens, and summarise it for the log."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import jax
import numpy as np
from jaxtyping import Array, Float

from gptoss_jax.errors import UserError
from gptoss_jax.model import Transformer
from gptoss_jax.parallel import sharding
from gptoss_jax.types import Batch, Params


def load_stats(load: Float[np.ndarray, "L E"]) -> dict[str, float]:
    """Summarise each expert's share of the routed (token, expert) pairs: how even the shares are.

    `load_entropy` and `load_entropy_min` are the mean and the minimum over layers of H / log E,
    where H is the entropy of a layer's shares: 1 if all experts get the same, 0 if one gets all.
    `dead_experts` counts the experts without a routed pair, over all layers, so `load` should be a
    mean over the steps in question. `load_max` is the largest share, as a multiple of the mean
    share. Rows need not sum to 1. If a layer has no load at all, the entropies are NaN.
    """
    load = np.asarray(load, np.float64)
    experts = load.shape[1]
    total = load.sum(axis=1, keepdims=True)
    share = np.divide(load, total, out=np.full_like(load, np.nan), where=total > 0)
    bits = share * np.log(np.where(share > 0, share, 1.0))
    entropy = -bits.sum(axis=1) / np.log(experts) if experts > 1 else np.ones(len(load))
    return {
        "load_entropy": float(entropy.mean()),
        "load_entropy_min": float(entropy.min()),
        "dead_experts": int((load == 0).sum()),
        "load_max": float(share.max() * experts),
    }


@partial(jax.jit, static_argnums=0)
def _load(model: Transformer, params: Params, batch: Batch) -> Float[Array, "L E"]:
    out = model.forward(
        params, batch.tokens, segment_ids=batch.segment_ids, positions=batch.positions
    )
    return sharding.replicate(out.router.load)


def measure_load(
    model: Transformer, params: Params, batches: Iterable[Batch]
) -> Float[np.ndarray, "L E"]:
    """Run a model over batches and return each expert's share of the routed pairs, a row per layer.

    The shares are over all tokens that are not padding, in float64, and no expert drops tokens: so
    they show which experts the user's data need.

    Raises:
        UserError: the batches have no token.
    """
    model = model.dropless()
    total, tokens = np.zeros((model.config.num_layers, model.config.num_experts)), 0
    for batch in batches:
        count = int(np.sum(np.asarray(batch.segment_ids) != 0))
        total += count * np.asarray(_load(model, params, batch), np.float64)
        tokens += count
    if not tokens:
        raise UserError("the experts' load can't be measured: there is not one token in the data")
    return total / tokens
