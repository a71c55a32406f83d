"""A run's page: headline numbers, curves, expert load, samples, events, config."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_jax.config import Config
from gptoss_jax.errors import UserError
from gptoss_jax.runs import model_source
from gptoss_jax.runs.report import answers, curves
from gptoss_jax.runs.report.charts import colour_bar, heatmap, over_time
from gptoss_jax.runs.report.runs import Run

_HERE = Path(__file__).parent

# The page fetches nothing, even if an answer of the model or a name in the data holds HTML.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def render(runs: list[Run]) -> str:
    """Return the HTML page of one run, or of several side by side."""
    title = runs[0].name if len(runs) == 1 else " and ".join(r.name for r in runs)
    sections = {
        "numbers": ("", "".join(_numbers(run, len(runs) > 1) for run in runs)),
        "rewards": ("Rewards", curves.rewards(runs)),
        "curves": ("Curves", curves.training(runs)),
        "sources": ("Sources", curves.sources(runs)),
        "routing": ("Routing", curves.routing(runs)),
        "load": ("Expert load", "".join(_load(run, len(runs) > 1) for run in runs)),
        "answers": ("Sampled answers", _for_each(runs, answers.rounds)),
        "samples": ("Answers to held-out questions", _for_each(runs, answers.samples)),
        "events": ("Events", "".join(_events(run, len(runs) > 1) for run in runs)),
        "other": ("Other numbers", curves.other(runs)),
        "config": ("Config", _config(runs)),
        "go-on": ("How to go on", _commands(runs)),
    }
    shown = {name: part for name, part in sections.items() if part[1]}
    links = "".join(f'<a href="#{n}">{escape(head)}</a>' for n, (head, _) in shown.items() if head)
    body = "".join(
        f'<section id="{name}">{f"<h2>{escape(head)}</h2>" if head else ""}{content}</section>\n'
        for name, (head, content) in shown.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>\n{_asset('page.css')}</style></head><body>\n"
        f"<h1>{escape(title)}</h1><nav>{links}</nav>\n{_problems(runs)}{body}"
        "<footer>Made from the files in the workdir by python -m gptoss_jax.report</footer>\n"
        f"<script>\n{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _problems(runs: list[Run]) -> str:
    lines = [f"{run.workdir}: {problem}" for run in runs for problem in run.problems]
    lines += [f"{run.workdir}: nothing has been logged yet" for run in runs if not run.records]
    return "".join(f'<p class="warn">{escape(line)}</p>\n' for line in lines)


def _heading(run: Run, several: bool) -> str:
    return f"<h3>{escape(run.name)}</h3>" if several else ""


def _for_each(runs: list[Run], show: Callable[[Run], str]) -> str:
    """Join what `show` returns of each run, where it returns something."""
    parts = ((run, show(run)) for run in runs)
    return "".join(_heading(run, len(runs) > 1) + part for run, part in parts if part)


# --- Headline numbers --------------------------------------------------------------------------


def _numbers(run: Run, several: bool) -> str:
    tiles: list[tuple[str, str]] = []
    if run.records:
        of = run.field("train.steps")
        tiles.append((f"{run.records[-1]['step']:,}", f"steps of {of:,}" if of else "steps"))
    tiles += _rewards(run)
    if held_out := run.points("held_out_loss"):
        step, best = min(held_out, key=lambda p: p[1])
        where = f"best {best:.4f}, at step {step:,.0f}"
        tiles.append((f"{held_out[-1][1]:.4f}", f"held-out loss; {where}"))
    if exact := run.points("exact_match"):
        tiles.append((f"{exact[-1][1]:.1%}", f"exact match; best {max(v for _, v in exact):.1%}"))
    if (loss := run.last("loss")) is not None:
        tiles.append((f"{loss:.4f}", "training loss, last"))
    if speed := [v for _, v in run.points("tokens_per_second")]:
        tiles.append((f"{np.median(speed):,.0f}", "tokens/s, median"))
    if mfu := [v for _, v in run.points("mfu")]:
        tiles.append((f"{np.median(mfu):.1%}", "MFU, median"))
    if seconds := _seconds(run):
        tiles.append((_duration(seconds), "in training steps"))
    if total := _parameters(run):
        tiles.append((_millions(total[0]), f"parameters; {_millions(total[1])} active"))
    body = "".join(f"<div><b>{escape(v)}</b><span>{escape(n)}</span></div>" for v, n in tiles)
    return f'{_heading(run, several)}<div class="tiles">{body}</div>' if tiles else ""


def _rewards(run: Run) -> list[tuple[str, str]]:
    """Return the headline numbers of DPO and GRPO, which come before the loss."""
    tiles = []
    for name in ("reward_accuracy", "reward_margin", "reward"):
        of, points = "held out", run.points(f"held_out_{name}")
        if not points:
            of, points = "training", run.points(name)
        if points:
            text = f"{name.replace('_', ' ')}, {of}; first {points[0][1]:.3f}"
            tiles.append((f"{points[-1][1]:.3f}", text))
    if alike := [v for _, v in run.points("groups_alike")]:
        text = "of the questions taught nothing: their answers had equal rewards"
        tiles.append((f"{np.mean(alike):.0%}", text))
    return tiles


def _seconds(run: Run) -> float:
    """Return the seconds spent in training steps.

    Each record with `step_seconds` counts for the steps since the last record with a loss.
    """
    total, before = 0.0, 0.0
    for record in run.records:
        total += (record["step"] - before) * float(record.get("step_seconds") or 0)
        before = record["step"] if "loss" in record else before
    return total


def _parameters(run: Run) -> tuple[int, int] | None:
    from gptoss_jax.config import command_line
    from gptoss_jax.model import Transformer

    if (run.workdir / model_source.FOLDER).is_dir():  # the user's own model
        return None
    try:
        config = command_line.from_json(json.dumps(run.config))
    except UserError:  # another version of the package wrote the config
        return None
    return Transformer(config.model).num_parameters() if run.config else None


def _millions(count: float) -> str:
    return f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M"


def _duration(seconds: float) -> str:
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


# --- Expert load -------------------------------------------------------------------------------


def _load(run: Run, several: bool) -> str:
    """Draw each expert's load as a multiple of its fair share."""
    found: list[tuple[float, np.ndarray]] = []
    for record in run.records:
        try:
            load = np.array(record.get("expert_load"), float)
        except (TypeError, ValueError):
            continue
        if load.ndim == 2 and load.size and (not found or load.shape == found[0][1].shape):
            found.append((float(record["step"]), load * load.shape[1]))
    if not found:
        return ""
    layers, experts = found[0][1].shape
    top = round(max(2.0, float(np.quantile([x for _, x in found], 0.999))), 1)
    step, last = found[-1]
    every = heatmap(
        "layer by expert", last, top=top, columns=[float(i) for i in range(experts)],
        row="layer", column="expert", note=f"step {step:,.0f}",
    )  # fmt: skip
    parts = []
    for i in range(layers):
        shown, columns, span = over_time([(s, x[i]) for s, x in found])
        parts.append(
            heatmap(
                f"layer {i}",
                shown,
                top=top,
                columns=columns,
                span=span,
                row="expert",
                column="step",
            )
        )
    return (
        f"{_heading(run, several)}<p>A multiple of an expert's fair share, 1/{experts} of the "
        f'routed pairs.</p>{colour_bar(top, "times its share")}<div class="charts">{every}'
        f"{''.join(parts)}</div>"
    )


# --- Events ------------------------------------------------------------------------------------


def _events(run: Run, several: bool) -> str:
    """List the run's events, and the steps that were skipped because they were not finite."""
    found = [(e["step"], {k: v for k, v in e.items() if k != "step"}) for e in run.events]
    for r in run.records:
        if r.get("skipped_steps"):
            found.append((r["step"], {"event": "steps not finite", "count": r["skipped_steps"]}))
    rows = []
    for step, event in sorted(found, key=lambda e: e[0]):
        what, when = event.pop("event", "event"), event.pop("time", "")
        rest = "; ".join(
            f"{name.replace('.', ' ').replace('_', ' ')} {_value(v)}"
            for name, v in _flat(event).items()
        )
        cells = (f"{step:,}", str(what).replace("_", " "), rest, str(when).replace("T", " "))
        rows.append("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("step", "what", "more", "when"))
    return (
        f'{_heading(run, several)}<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


# --- Config and commands -----------------------------------------------------------------------


def _config(runs: list[Run]) -> str:
    """Show the config by section; mark values that are not the default, or differ between runs."""
    if not any(run.config for run in runs):
        return ""
    defaults = _flat(json.loads(json.dumps(dataclasses.asdict(Config()))))
    values = [_flat(run.config) for run in runs]
    names = list(dict.fromkeys(name for v in (defaults, *values) for name in v))
    several = len(runs) > 1
    heads = ["field", *((run.name for run in runs) if several else ["value"]), "default"]
    head = "".join(f"<th>{escape(h)}</th>" for h in heads)
    parts = []
    for section in dict.fromkeys(map(_section, names)):
        rows = []
        for name in (n for n in names if _section(n) == section):
            shown = [_value(v[name]) if name in v else "" for v in values]
            default = _value(defaults[name]) if name in defaults else ""
            is_set = len(set(shown)) > 1 if several else shown[0] != default
            cells = [name.split(".", 1)[-1], *shown, default if {*shown} != {default} else ""]
            row = "".join(f"<td>{escape(c)}</td>" for c in cells)
            rows.append(f'<tr{" class=set" if is_set else ""} title="{escape(name)}">{row}</tr>')
        parts.append(
            f"<details><summary>{escape(section)}</summary><div class=scroll><table class=mono>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div></details>"
        )
    what = "what differs between the runs" if several else "what is not the default"
    return (
        '<div class="config card"><input type="search" placeholder="search the config" '
        f'aria-label="search the config"><label><input type="checkbox"> only {what}</label>'
        f"{''.join(parts)}</div>"
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _section(name: str) -> str:
    return name.split(".")[0] if "." in name else "run"


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _commands(runs: list[Run]) -> str:
    workdir = shlex.quote(str(runs[0].workdir))
    others = [shlex.quote(str(run.workdir)) for run in runs[1:]] or ["OTHER"]
    module = "python -m gptoss_jax."
    go_on = "Go on: the same command again, with a larger --train.steps if the run is complete."
    lines = {
        f"{go_on} Ask it something:": f"{module}sample --checkpoint {workdir} --prompt TEXT",
        "Write it as other programs read it:": f"{module}convert {workdir} DIR --to hf",
        "Make this page anew, also while the run goes on; put runs on one page:": (
            f"{module}report {workdir}\n"
            f"{module}report {workdir} {' '.join(others)} --out comparison.html"
        ),
    }
    return "".join(
        f"<p>{escape(text)}</p><pre>{escape(code)}</pre>" for text, code in lines.items()
    )
