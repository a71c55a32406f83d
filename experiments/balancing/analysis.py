"""How even the experts' load stays, and what evenness costs or brings."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments import common
from experiments.common import Measured, Results, Run
from gptoss_jax.runs import metrics
from gptoss_jax.training import expert_load

LAST = 50  # steps that the numbers are means of


def measure(run: Run) -> Measured:
    """Read the load, what was dropped, and the held-out loss."""
    records = [r for r in metrics.read(run.workdir) if "expert_load" in r]
    last = [r for r in records if r["step"] > run.config.train.steps - LAST]
    load = np.mean([r["expert_load"] for r in last], axis=0)
    stats = expert_load.load_stats(load)
    numbers = {
        "load entropy": common.mean([r["load_entropy"] for r in last]),
        "least in the run": min(r["load_entropy"] for r in records),
        "dead experts": float(stats["dead_experts"]),
        "largest load / mean": stats["load_max"],
        "dropped": common.mean([r.get("dropped", 0.0) for r in last]),
        "held-out loss": common.curve(run, "held_out_loss")[1][-1],
    }
    curves = {name: common.curve(run, name) for name in ("load_entropy", "held_out_loss")}
    # Every expert of every layer, the busiest first: what the bars show.
    ordered = -np.sort(-load, axis=1) * load.shape[1]
    for layer, row in enumerate(ordered):
        curves[f"load_layer_{layer}"] = list(range(1, len(row) + 1)), row.tolist()
    return Measured(numbers, {name: (list(map(float, x)), y) for name, (x, y) in curves.items()})


def draw(results: Results) -> Figure:
    """Draw the entropy over the steps, the load by rank at the end, and the held-out loss."""
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    entropy, load, loss = figure.subplots(1, 3)
    common.plot_seeds(entropy, results, "load_entropy")
    entropy.axhline(0.9, color="gray", linewidth=0.8, linestyle=":")
    entropy.set(title="load entropy H / log E", xlabel="step", ylim=(0, 1.02))
    entropy.legend(fontsize=8, loc="center right", bbox_to_anchor=(1.0, 0.68))
    _plot_load(load, results)
    common.plot_seeds(loss, results, "held_out_loss")
    loss.set(title="held-out loss, nats a token", xlabel="step", ylim=(0.25, 1.0), xlim=(45, None))
    return figure


def _plot_load(axis: Axes, results: Results) -> None:
    """Draw the mean over layers and seeds of the load, the busiest expert of each first."""
    for i, (variant, runs) in enumerate(results.items()):
        rows = [y for m in runs for name, (_, y) in m.curves.items() if name.startswith("load_l")]
        x = range(1, len(rows[0]) + 1)
        axis.plot(x, np.mean(rows, axis=0), color=f"C{i}", label=variant, marker=".")
    title = f"load of an expert / mean, last {LAST} steps"
    axis.set(title=title, xlabel="experts of a layer, the busiest first", xticks=[1, 4, 8, 12, 16])
