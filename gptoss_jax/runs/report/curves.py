"""Choose the curves of a page."""

from __future__ import annotations

import dataclasses

from gptoss_jax.runs.report.charts import COLOURS, Line, chart
from gptoss_jax.runs.report.runs import Points, Run

# Numbers that have a chart of their own, or are of no use as a curve.
_KNOWN = {
    "loss", "held_out_loss", "held_out_perplexity", "exact_match", "learning_rate", "grad_norm",
    "tokens_per_second", "flops_per_second", "mfu", "tokens", "trained_tokens", "step_seconds",
    "load_entropy", "load_entropy_min", "dead_experts", "load_max", "dropped", "balance_loss",
    "z_loss", "skipped_steps",
}  # fmt: skip


def training(runs: list[Run]) -> str:
    """Return the charts of loss, exact match, learning rate, gradient norm and speed."""
    marks = _rewinds(runs)
    rates = [Line(r.name, r.points("learning_rate"), _colour(i)) for i, r in enumerate(runs)]
    losses: list[Line] = []
    for i, run in enumerate(runs):
        first, second = (i, i) if len(runs) > 1 else (0, 1)
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        losses += [
            Line(f"{prefix}training", run.points("loss"), _colour(first), noisy=True),
            Line(f"{prefix}held out", run.points("held_out_loss"), _colour(second), marked=True),
        ]
    return _grid(
        chart("Loss", losses, note="nats a token", low=0, marks=marks),
        chart(
            "Exact match", _lines(runs, "exact_match", marked=True), low=0, high=1,
            note="share of the held-out questions", marks=marks,
        ),
        chart("Learning rate", rates, low=0, log=False),
        chart("Gradient norm", _lines(runs, "grad_norm"), note="before clipping", marks=marks),
        chart("Tokens a second", _lines(runs, "tokens_per_second"), low=0, log=False),
        chart("MFU", _lines(runs, "mfu"), note="share of the device's peak", low=0, log=False),
    )  # fmt: skip


def sources(runs: list[Run]) -> str:
    """Return the charts of the sources of a data mixture: loss, and share of the tokens so far."""
    losses: list[Line] = []
    shares: list[Line] = []
    for run in runs:
        names = [n.split("/", 1)[1].rsplit("/", 1)[0] for n in run.names() if _is_source(n)]
        names = list(dict.fromkeys(names))
        tokens = {name: dict(run.points(f"source/{name}/tokens")) for name in names}
        totals: dict[float, float] = {}
        for counts in tokens.values():
            for step, count in counts.items():
                totals[step] = totals.get(step, 0.0) + count
        for name in names:
            shown = f"{run.name}, {name}" if len(runs) > 1 else name
            colour = _colour(len(losses))
            points = run.points(f"source/{name}/loss")
            losses.append(Line(shown, points, colour, noisy=True))
            share: Points = [(s, n / totals[s]) for s, n in tokens[name].items() if totals[s]]
            shares.append(Line(shown, share, colour))
    return _grid(
        chart("Loss by source", losses, note="nats a token", low=0),
        chart("Tokens by source", shares, note="share since the run began", low=0, high=1),
    )


def routing(runs: list[Run]) -> str:
    """Return the charts of how evenly the routers spread tokens."""
    entropies = _lines(runs, "load_entropy")
    for i, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        colour = _colour(i if len(runs) > 1 else 1)
        least = run.points("load_entropy_min")
        entropies.append(Line(f"{prefix}worst layer", least, colour, noisy=True, dashed=True))
    if len(runs) == 1:
        entropies[0] = dataclasses.replace(entropies[0], name="mean over layers")
    lost = _lines(runs, "dropped")
    return _grid(
        chart("Load entropy", entropies, note="1 is even", low=0, high=1, log=False),
        chart("Dead experts", _lines(runs, "dead_experts"), note="of all layers", low=0, log=False),
        chart("Largest load", _lines(runs, "load_max"), note="x fair share", low=0, log=False),
        chart("Dropped", lost, note="share of routed pairs", low=0, log=False),
        chart("Balance loss", _lines(runs, "balance_loss"), note="1 is even; no coefficient"),
        chart("z-loss", _lines(runs, "z_loss"), note="no coefficient"),
    )


def other(runs: list[Run]) -> str:
    """Return charts of the numbers that no other chart shows."""
    names = dict.fromkeys(n for run in runs for n in run.names())
    wanted = [n for n in names if n not in _KNOWN and not _is_source(n)]
    return _grid(*(chart(n.replace("_", " "), _lines(runs, n)) for n in wanted))


def _lines(runs: list[Run], name: str, *, marked: bool = False) -> list[Line]:
    return [
        Line(run.name, run.points(name), _colour(i), marked=marked, noisy=not marked)
        for i, run in enumerate(runs)
    ]


def _rewinds(runs: list[Run]) -> list[float]:
    """Return the steps of the loss spikes after which a run rewound; [] for several runs."""
    if len(runs) > 1:
        return []
    found = []
    for event in runs[0].events:
        spike = event.get("spike")
        step = spike.get("step") if isinstance(spike, dict) else event["step"]
        if event.get("event") == "rewind" and isinstance(step, int | float):
            found.append(float(step))
    return found


def _is_source(name: str) -> bool:
    return name.startswith("source/") and name.count("/") >= 2


def _colour(i: int) -> int:
    return i % COLOURS


def _grid(*charts: str) -> str:
    body = "".join(charts)
    return f'<div class="charts">{body}</div>' if body else ""
