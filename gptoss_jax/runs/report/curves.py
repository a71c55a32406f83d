"""Choose the curves of a page."""

from __future__ import annotations

import dataclasses

from gptoss_jax.runs.headlines import Losses
from gptoss_jax.runs.report.charts import COLOURS, Line, chart
from gptoss_jax.runs.report.runs import Points, Run

# Numbers that have a chart of their own, or are of no use as a curve.
_KNOWN = {
    "loss", "held_out_loss", "held_out_perplexity", "exact_match", "learning_rate", "grad_norm",
    "tokens_per_second", "flops_per_second", "mfu", "tokens", "trained_tokens", "step_seconds",
    "load_entropy", "load_entropy_min", "dead_experts", "load_max", "dropped", "balance_loss",
    "z_loss", "skipped_steps", "reward", "reward_std", "groups_alike", "answer_tokens", "cut_off",
    *(f"{of}reward_{name}" for of in ("", "held_out_")
      for name in ("accuracy", "margin", "chosen", "rejected")),
}  # fmt: skip


def training(runs: list[Run]) -> str:
    """Return the charts of the losses, exact match, learning rate, gradient norm and speed."""
    marks = _rewinds(runs)
    rates = [Line(r.name, r.points("learning_rate"), _colour(i)) for i, r in enumerate(runs)]
    return _grid(
        *_losses(runs, marks),
        chart(
            "Exact match", _lines(runs, "exact_match", marked=True), low=0, high=1,
            note="share of the held-out questions", marks=marks,
        ),
        chart("Learning rate", rates, low=0, log=False),
        chart("Gradient norm", _lines(runs, "grad_norm"), note="before clipping", marks=marks),
        chart("Tokens a second", _lines(runs, "tokens_per_second"), low=0, log=False),
        chart("MFU", _lines(runs, "mfu"), note="share of the device's peak", low=0, log=False),
    )  # fmt: skip


def _losses(runs: list[Run], marks: list[float]) -> list[str]:
    """Return the charts of the losses; losses that measure different things share no chart."""
    charts: list[str] = []
    kinds = dict.fromkeys(run.losses for run in runs)
    for what in kinds:
        of = f" of {what.kind}" if len(kinds) > 1 else ""
        training, held_out = _pair_of(runs, "loss", only=what)
        if what.training == what.held_out:
            both = [line for pair in zip(training, held_out, strict=True) for line in pair]
            charts.append(chart(f"Loss{of}", both, note=what.training, low=0, marks=marks))
        else:
            charts += [
                chart(f"Training loss{of}", training, note=what.training, low=0, marks=marks),
                chart(f"Held-out loss{of}", held_out, note=what.held_out, low=0, marks=marks),
            ]
    return charts


def _pair_of(
    runs: list[Run], name: str, *, only: Losses | None = None
) -> tuple[list[Line], list[Line]]:
    """Return the lines of a number in training and held out, of the runs with the losses `only`."""
    training, held_out = [], []
    for i, run in enumerate(runs):
        if only is not None and run.losses != only:
            continue
        first, second = (i, i) if len(runs) > 1 else (0, 1)
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        points = run.points(name), run.points(f"held_out_{name}")
        training.append(Line(f"{prefix}training", points[0], _colour(first), noisy=True))
        held_out.append(Line(f"{prefix}held out", points[1], _colour(second), marked=True))
    return training, held_out


def rewards(runs: list[Run]) -> str:
    """Return the charts of what DPO and GRPO improve, and of what GRPO's answers are like."""
    marks = _rewinds(runs)

    def both(name: str) -> list[Line]:
        training, held_out = _pair_of(runs, name)
        return [line for pair in zip(training, held_out, strict=True) for line in pair]

    sides: list[Line] = []
    for i, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        for k, side in enumerate(("chosen", "rejected")):
            points = run.points(f"reward_{side}")
            colour = _colour(i if len(runs) > 1 else k)
            sides.append(Line(prefix + side, points, colour, noisy=True, dashed=bool(k)))
    return _grid(
        chart(
            "Reward", _lines(runs, "reward"), note="mean over a step's answers", log=False,
            marks=marks,
        ),
        chart(
            "Reward accuracy", both("reward_accuracy"), low=0, high=1, marks=marks,
            note="share of pairs whose chosen answer has the larger reward",
        ),
        chart(
            "Reward margin", both("reward_margin"), note="chosen minus rejected", low=0, log=False,
            marks=marks,
        ),
        chart("Rewards of both sides", sides, note="training", log=False, marks=marks),
        chart(
            "Spread of rewards", _lines(runs, "reward_std"), low=0, log=False,
            note="standard deviation over a step's answers",
        ),
        chart(
            "Groups alike", _lines(runs, "groups_alike"), low=0, high=1, log=False,
            note="share of questions that teach nothing: equal rewards",
        ),
        chart(
            "Answer length", _lines(runs, "answer_tokens"), note="tokens, mean", low=0, log=False
        ),
        chart(
            "Answers cut off", _lines(runs, "cut_off"), low=0, high=1, log=False,
            note="share as long as max_tokens",
        ),
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
