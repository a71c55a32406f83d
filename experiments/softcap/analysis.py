"""What a softcap changes: losses, how large logits get, and the weights in the other model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from matplotlib.figure import Figure

import gptoss_jax
from experiments import common
from experiments.common import Measured, Results, Run
from experiments.sinks.analysis import LONGER, attention_logits, draw_batch, find_sources
from experiments.sinks.config import PAIRS
from experiments.softcap import softcap
from experiments.softcap.model.softcapped import CAP
from gptoss_jax.model import Transformer
from gptoss_jax.ops.attention.reference import MASKED
from gptoss_jax.types import Batch, Params

# What builds a variant's model, and what builds the other one's.
MAKE_MODEL = {
    "baseline": (Transformer, softcap.make_model),
    "softcap": (softcap.make_model, Transformer),
}
NEAR = 1.13  # a held-out loss near the least there is, about 1.122: symbols that are drawn
BINS = np.linspace(-20, 20, 81)  # of logits; what is beyond counts in the last


def measure(run: Run) -> Measured:
    """Read the losses of the run's model and of the other one with its weights, and the logits."""
    own, other = MAKE_MODEL[run.variant]
    model, params = gptoss_jax.load(run.workdir, dtype=jnp.float32, make_model=own)
    batch, longer = draw_batch(2, pairs=PAIRS), draw_batch(3, pairs=LONGER * PAIRS)
    logits = np.asarray(jax.jit(attention_logits, static_argnums=0)(model, params, batch))
    logits = logits[logits > MASKED / 2]
    if run.variant == "softcap":
        logits = CAP * np.tanh(logits / CAP)
    x, y = common.curve(run, "held_out_loss")
    numbers = {
        "held-out loss": y[-1],
        f"first step below {NEAR}": next(
            step for step, loss in zip(x, y, strict=True) if loss < NEAR
        ),
        "of what is copied": copied_loss(model, params, batch),
        f"the same, rows x{LONGER}": copied_loss(model, params, longer),
        "of what is copied, by the other model": copied_loss(other(model.config), params, batch),
        "largest logit": float(np.abs(logits).max()),
    }
    counts = np.histogram(np.clip(logits, BINS[0], BINS[-1]), BINS)[0]
    shares = counts / counts.sum()
    centres = (BINS[:-1] + BINS[1:]) / 2
    curves = {"held_out_loss": (x, y), "logits": (centres.tolist(), shares.tolist())}
    return Measured(numbers, curves)


def copied_loss(model: Transformer, params: Params, batch: Batch) -> float:
    """Return the mean loss where a symbol is copied."""
    copied = find_sources(np.asarray(batch.tokens)) >= 0
    return float(np.asarray(_losses(model, params, batch))[copied].mean())


@partial(jax.jit, static_argnums=0)
def _losses(model: Transformer, params: Params, batch: Batch) -> Float[Array, "B T"]:
    logits: Any = model.apply({"params": params}, batch.tokens, batch.segment_ids)
    found = jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
    return -found[..., 0]


def draw(results: Results) -> Figure:
    """Draw the loss over the steps, and how logits are spread."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    common.plot_seeds(left, results, "held_out_loss")
    left.set(title="held-out loss", xlabel="step", ylabel="nats a token", ylim=(1.0, 2.0))
    left.legend(title="thin: a seed; thick: the mean")
    common.plot_seeds(right, results, "logits")
    right.set(
        title="logits of attention, after the cap",
        xlabel="logit",
        ylabel="share of all that a query sees",
        yscale="log",
    )
    return figure
