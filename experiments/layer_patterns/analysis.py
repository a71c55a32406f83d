"""From how far back each layer pattern copies: held-out accuracy by distance."""

from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from matplotlib.figure import Figure

import gptoss_jax
from experiments import common
from experiments.common import Measured, Results, Run
from experiments.layer_patterns.config import LAGS
from gptoss_jax import data
from gptoss_jax.harmony import tokenizer
from gptoss_jax.types import Batch, Params

# The letter that stands right before the copy sees its source over this many tokens.
DISTANCES = {letter: 2 * lag - 1 for letter, lag in LAGS.items()}


def measure(run: Run) -> Measured:
    """Read the loss, and have the model copy what it never saw."""
    model, params = gptoss_jax.load(run.workdir, dtype=jnp.float32)
    encoding = tokenizer.get_tokenizer(run.config.model.vocab_size)

    @jax.jit
    def predict(params: Params, batch: Batch) -> Int[jax.Array, "B T"]:
        logits: Any = model.apply({"params": params}, batch.tokens, batch.segment_ids)
        return jnp.argmax(logits, axis=-1)

    right: dict[str, list[np.ndarray]] = {letter: [] for letter in LAGS}
    guessed: dict[str, list[np.ndarray]] = {letter: [] for letter in LAGS}
    for batch in data.eval_batches(run.config):
        hits = np.asarray(predict(params, batch)) == np.asarray(batch.targets)
        guesses = guess_commonest(np.asarray(batch.tokens)) == np.asarray(batch.targets)
        for letter in LAGS:
            at = np.asarray(batch.tokens) == encoding.encode_single_token(letter)
            right[letter].append(hits[at])
            guessed[letter].append(guesses[at])
    share = {DISTANCES[letter]: float(np.concatenate(r).mean()) for letter, r in right.items()}
    guess = [float(np.concatenate(r).mean()) for r in guessed.values()]
    window, layers = run.config.model.window, run.config.model.num_layers
    reach = layers * (window - 1)
    groups = {
        f"copied over < {window} tokens": [s for d, s in share.items() if d < window],
        f"over {window} to {reach}": [s for d, s in share.items() if window <= d <= reach],
        f"over > {reach}": [s for d, s in share.items() if d > reach],
    }
    x, y = common.curve(run, "held_out_loss")
    numbers = {"held-out loss": y[-1]}
    numbers |= {name: common.mean(shares) for name, shares in groups.items()}
    return Measured(
        numbers,
        {
            "held_out_loss": (x, y),
            "accuracy": ([float(d) for d in share], list(share.values())),
            "guess": ([float(d) for d in share], guess),
        },
    )


def guess_commonest(tokens: Int[np.ndarray, "B T"]) -> Float[np.ndarray, "B T"]:
    """Guess, at every letter, the symbol that the row has had most often so far."""
    guesses = np.full(tokens.shape, -1)
    for b, row in enumerate(tokens):
        seen: Counter[int] = Counter()
        for t in range(0, len(row) - 1, 2):
            guesses[b, t] = seen.most_common(1)[0][0] if seen else -1
            seen[int(row[t + 1])] += 1
    return guesses


def draw(results: Results) -> Figure:
    """Draw the loss over the steps, and accuracy by distance."""
    figure = Figure(figsize=(12.5, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    common.plot_seeds(left, results, "held_out_loss")
    left.set(title="held-out loss", xlabel="step", ylabel="nats a token", ylim=(1.0, 3.0))
    left.legend(title="thin: a seed; thick: the mean")
    common.plot_seeds(right, results, "accuracy", dodge=0.03, marker="o", markersize=5)
    x, y = next(iter(results.values()))[0].curves["guess"]
    right.plot(x, y, ":", color="black", label="the commonest so far")
    for place, text in ((7.5, "1 banded layer "), (42.5, "6 banded layers ")):
        right.axvline(place, color="gray", linewidth=1, linestyle="--")
        right.text(place, 0.04, text, color="gray", fontsize=8, ha="right")
    right.set(
        title="held-out symbols copied, after training",
        xlabel="distance of what is copied, tokens",
        ylabel="share right",
        xscale="log",
        ylim=(0, 1.03),
    )
    right.set_xticks(x, [f"{d:.0f}" for d in x])
    right.minorticks_off()
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
