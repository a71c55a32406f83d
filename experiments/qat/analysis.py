"""What a run's model loses when it is written in MXFP4 and read back."""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import gptoss_jax
from experiments import common
from experiments.common import Measured, Results, Run
from experiments.qat.config import LETTERS
from gptoss_jax import data
from gptoss_jax.harmony import tokenizer
from gptoss_jax.model import Transformer
from gptoss_jax.ops import mxfp4
from gptoss_jax.parameters.tree import replace
from gptoss_jax.types import Batch, Params

MATRICES = ("gate_up_weight", "down_weight")


def measure(run: Run) -> Measured:
    """Score the model as it was trained, as it is exported, and as OCP's scales would leave it."""
    model = Transformer(run.config.model)
    params = gptoss_jax.load(run.workdir, dtype=jnp.float32)[1]
    plain = Transformer(dataclasses.replace(run.config.model, qat=False))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "model"
        gptoss_jax.save(exported, model, params, experts="mxfp4", force=True)
        packed, written = gptoss_jax.load(exported, experts="mxfp4", dtype=jnp.float32)
    experts = params["layers"]["experts"]
    by_ocp = {k: mxfp4.decode(mxfp4.encode(experts[k], scale_rule="ocp")) for k in MATRICES}
    ocp = replace(params, {"layers": {"experts": by_ocp}})
    trained, in_mxfp4 = score(run, model, params), score(run, packed, written)
    numbers = {
        "held-out loss": trained["loss"],
        "in MXFP4": in_mxfp4["loss"],
        "in MXFP4, OCP scales": score(run, plain, ocp)["loss"],
        "symbols' loss": trained["symbols"],
        "symbols' loss in MXFP4": in_mxfp4["symbols"],
        "symbols right in MXFP4": in_mxfp4["right"],
    }
    return Measured(numbers, {"held_out_loss": common.curve(run, "held_out_loss")})


def score(run: Run, model: Transformer, params: Params) -> dict[str, float]:
    """Return the held-out loss, that of the symbols, and the share of these that come first."""
    encoding = tokenizer.get_tokenizer(run.config.model.vocab_size)
    letters = [encoding.encode_single_token(x) for x in LETTERS]

    @jax.jit
    def look(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply({"params": params}, batch.tokens, batch.segment_ids)
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], axis=-1)
        return nll[..., 0], jnp.argmax(logits, axis=-1) == batch.targets

    parts: list[tuple[np.ndarray, ...]] = []
    for batch in data.eval_batches(run.config):
        nll, right = (np.asarray(a) for a in look(params, batch))
        known = np.isin(batch.tokens, letters) & ~np.isin(batch.targets, letters)
        parts.append((nll, right, np.asarray(batch.weights), known))
    nll, right, weights, known = (np.concatenate(each) for each in zip(*parts, strict=True))
    return {
        "loss": float((nll * weights).sum() / weights.sum()),
        "symbols": float(nll[known].mean()),
        "right": float(right[known].mean()),
    }


def draw(results: Results) -> Figure:
    """Draw the loss over the steps, and what each model has left of it in MXFP4."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    common.plot_seeds(left, results, "held_out_loss")
    left.set(title="held-out loss, as trained", xlabel="step", ylabel="nats a token", yscale="log")
    left.legend(title="thin: a seed; thick: the mean")
    for i, runs in enumerate(results.values()):
        for x, name in ((i - 0.2, "held-out loss"), (i + 0.2, "in MXFP4")):
            values = [m.numbers[name] for m in runs]
            alpha = 0.3 if name == "held-out loss" else 0.8
            label = (
                {"held-out loss": "as trained", "in MXFP4": "in MXFP4"}[name] if i == 0 else None
            )
            right.bar(x, common.mean(values), 0.36, color=f"C{i}", alpha=alpha, label=label)
            right.plot([x] * len(values), values, "ko", markersize=4)
    lowest = min(m.numbers["held-out loss"] for runs in results.values() for m in runs)
    right.set(title="held-out loss after training", ylim=(0.98 * lowest, None))
    right.set_xticks(range(len(results)), list(results))
    right.legend()
    return figure
