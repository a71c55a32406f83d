"""Where heads put their weight when there is nothing to copy, with sinks and without."""

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import gptoss_jax
from experiments import common
from experiments.common import Measured, Results, Run
from experiments.sinks.config import LAGS, PAIRS, draw_record, get_config
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.ops.attention.reference import MASKED, visible
from gptoss_jax.ops.norm import rms_norm
from gptoss_jax.ops.rope import cos_sin, inverse_frequencies, rotate
from gptoss_jax.parameters.tree import take_layer
from gptoss_jax.types import Batch, Params

# Where a head's weight goes, in the order of the bars.
PLACES = ("sink", "first token", "itself", "other tokens", "what is copied")
VOCAB_SIZE = get_config().model.vocab_size
RECORDS = 128  # that are looked at
LONGER = 4  # times as long as in training: the row that the length is tried on


def attention_weights(
    model: Transformer, params: Params, batch: Batch
) -> tuple[Float[Array, "L B N T S"], Float[Array, "L B N T"]]:
    """Return the weights of every head on every token, and on its sink, which sum to 1."""
    c = model.config
    weights, on_sink = [], []
    for layer, logits in enumerate(attention_logits(model, params, batch)):
        p = take_layer(params["layers"], layer)["attention"]
        sinks = {"zero": jnp.zeros(c.num_heads), "off": jnp.full(c.num_heads, MASKED)}
        sink = p["sinks"] if c.sinks == "learned" else sinks[c.sinks]
        sink = jnp.broadcast_to(sink[None, :, None, None], (*logits.shape[:3], 1))
        shares = jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)
        weights.append(shares[..., :-1])
        on_sink.append(shares[..., -1])
    return jnp.stack(weights), jnp.stack(on_sink)


def attention_logits(model: Transformer, params: Params, batch: Batch) -> Float[Array, "L B N T S"]:
    """Return the logits of every head, `MASKED` for what it does not see.

    The model keeps them to itself; they are made again from the residual stream that it captures.
    """
    c = model.config
    out = model.forward(params, batch.tokens, segment_ids=batch.segment_ids, capture=("residual",))
    # What the first layer reads is the embedding; what the others read is what the last one left.
    residual = jnp.concatenate(
        [params["embedding"]["weight"][batch.tokens][None], out.captured["residual"][:-1]]
    )
    inverse, concentration = inverse_frequencies(
        c.head_dim,
        theta=c.rope_theta,
        factor=c.yarn_factor,
        initial_context=c.initial_context,
        beta_fast=c.rope_beta_fast,
        beta_slow=c.rope_beta_slow,
    )
    cos, sin = cos_sin(batch.positions, inverse, concentration)
    places = batch.segment_ids, batch.segment_ids, batch.positions, batch.positions
    every = []
    for layer, window in enumerate(c.layer_windows):
        p = take_layer(params["layers"], layer)
        x = rms_norm(residual[layer], p["attention_norm"]["scale"], eps=c.rms_eps)
        q, k = (_project(p["attention"], name, x, (cos, sin)) for name in "qk")
        k = jnp.repeat(k, c.num_heads // c.num_kv_heads, axis=2)
        logits = jnp.einsum("BTNH,BSNH->BNTS", q, k) * c.head_dim**-0.5
        every.append(jnp.where(visible(*places, window)[:, None], logits, MASKED))
    return jnp.stack(every)


def _project(p: Params, name: str, x: Float[Array, "B T D"], angles: tuple[Array, Array]) -> Array:
    heads = jnp.einsum("BTD,NHD->BTNH", x, p[f"{name}_weight"]) + p[f"{name}_bias"]
    return rotate(heads, *angles)


def find_sources(tokens: Int[np.ndarray, "B T"]) -> Int[np.ndarray, "B T"]:
    """Say at every letter where the symbol to copy stands; -1: nowhere; -2: not such a letter."""
    encoding = tokenizer.get_tokenizer(VOCAB_SIZE)
    sources = np.full(tokens.shape, -2)
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    for letter, lag in LAGS.items():
        at = tokens == encoding.encode_single_token(letter)
        sources[at] = np.maximum(places[at] + 1 - 2 * lag, -1)
    return sources


def draw_batch(seed: int, *, pairs: int) -> Batch:
    """Draw records of `pairs` pairs, one a row, of which the training had none."""
    rng = random.Random(seed)
    encoding = tokenizer.get_tokenizer(VOCAB_SIZE)
    text = [draw_record(rng, pairs) for _ in range(RECORDS)]
    ids = jnp.asarray([encoding.encode_ordinary(t) for t in text])
    tokens, ones = ids[:, :-1], jnp.ones_like(ids[:, :-1])
    places = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return Batch(tokens, ids[:, 1:], ones.astype(jnp.float32), ones, places)


def measure(run: Run) -> Measured:
    """Read the losses, and where the weight goes at letters with a source and without."""
    model, params = gptoss_jax.load(run.workdir, dtype=jnp.float32)

    @jax.jit
    def look(params: Params, batch: Batch):
        logits: Any = model.apply({"params": params}, batch.tokens, batch.segment_ids)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
        return nll[..., 0], *attention_weights(model, params, batch)

    batch = draw_batch(2, pairs=PAIRS)
    nll, weights, on_sink = (np.asarray(a) for a in look(params, batch))
    source = find_sources(np.asarray(batch.tokens))
    x, y = common.curve(run, "held_out_loss")
    numbers = {"held-out loss": y[-1], "of what is copied": float(nll[source >= 0].mean())}
    longer = draw_batch(3, pairs=LONGER * PAIRS)
    far = find_sources(np.asarray(longer.tokens)) >= 0
    far_nll = np.asarray(look(params, longer)[0])
    numbers[f"the same, rows x{LONGER}"] = float(far_nll[far].mean())
    curves: dict[str, common.Curve] = {"held_out_loss": (x, y)}
    places = split_weight(weights, on_sink, source)
    layers = [float(layer) for layer in range(run.config.model.num_layers)]
    for kind, at in (("nothing", source == -1), ("copied", source >= 0)):
        table = places[:, :, at].mean(axis=-1)  # a row a place, a column a layer
        for place, row in zip(PLACES, table, strict=True):
            curves[f"{kind}: {place}"] = layers, row.tolist()
        if kind == "nothing":
            means = table.mean(axis=1)
            numbers |= {f"nothing: {p}": float(m) for p, m in zip(PLACES[:3], means, strict=False)}
    return Measured(numbers, curves)


def split_weight(
    weights: Float[np.ndarray, "L B N T S"],
    on_sink: Float[np.ndarray, "L B N T"],
    source: Int[np.ndarray, "B T"],
) -> Float[np.ndarray, "P L B T"]:
    """Split each query's weight, a mean over heads, into `PLACES`."""
    mean, sink = weights.mean(axis=2), on_sink.mean(axis=2)
    T = mean.shape[-1]
    copied = np.take_along_axis(mean, np.maximum(source, 0)[None, ..., None], axis=-1)[..., 0]
    copied = np.where(source >= 0, copied, 0.0)
    first, itself = mean[..., 0], mean[..., np.arange(T), np.arange(T)]
    itself = np.where(np.arange(T) > 0, itself, 0.0)  # that of the first token is `first`
    # What is copied may be the first symbol, never the first token, which is a letter.
    rest = 1 - sink - first - itself - copied
    return np.stack([sink, first, itself, rest, copied])


def draw(results: Results) -> Figure:
    """Draw the loss over the steps, and the places of the weight, layer by layer."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1))
    common.plot_seeds(left, results, "held_out_loss")
    left.set(title="held-out loss", xlabel="step", ylabel="nats a token", ylim=(1.0, 2.0))
    left.legend(title="thin: a seed; thick: the mean")
    _stack(middle, results, "nothing")
    middle.set(title="attention where there is nothing to copy", ylabel="share, mean over heads")
    _stack(right, results, "copied")
    right.set(title="attention where there is something to copy")
    right.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _stack(axis: Axes, results: Results, kind: str) -> None:
    """Draw a bar a layer and variant, of the places stacked, means over seeds."""
    colors = ("tab:red", "tab:orange", "tab:olive", "lightgray", "tab:blue")
    variants, width = list(results), 0.26
    layers = len(results[variants[0]][0].curves[f"{kind}: sink"][0])
    ticks, names = [], []
    for i, variant in enumerate(variants):
        bottom = np.zeros(layers)
        x = np.arange(layers) + (i - 1) * width
        for place, color in zip(PLACES, colors, strict=True):
            rows = [m.curves[f"{kind}: {place}"][1] for m in results[variant]]
            height = np.mean(rows, axis=0)
            axis.bar(x, height, width * 0.9, bottom, color=color, label=place if i == 0 else None)
            bottom += height
        ticks += list(x)
        names += [variant] * layers
    axis.set_xticks(ticks, names, rotation=90, fontsize=8)
    for layer in range(layers):
        kind_of_layer = "banded" if layer % 2 == 0 else "full"
        axis.text(layer, 1.02, f"{layer}, {kind_of_layer}", ha="center", fontsize=8)
    axis.set_ylim(0, 1.08)
