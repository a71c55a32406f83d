"""Show what a run's model answered: to held-out questions, and to the questions of GRPO."""

from __future__ import annotations

import itertools
from html import escape
from typing import Any

from gptoss_jax.runs import metrics
from gptoss_jax.runs.report.runs import Run

_SHOWN = 12  # answers shown for a held-out question; earlier ones are folded away
_ROUNDS = 24  # rounds of GRPO on a page, spread over the run
_LONGEST = 3_000  # characters of an answer of GRPO that a page shows


def samples(run: Run) -> str:
    """Show the answers to each held-out question; equal answers in a row are one entry."""
    by_question: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for _, group in itertools.groupby(run.samples, key=lambda s: s["step"]):
        for i, sample in enumerate(group):
            by_question.setdefault((i, str(sample.get("question"))), []).append(sample)
    cards = []
    for (_, question), answers in by_question.items():
        rows = []
        for _, some in itertools.groupby(answers, key=lambda s: (s.get("answer"), s.get("right"))):
            same = list(some)
            steps = f"{same[0]['step']:,}" + (f" \u2013 {same[-1]['step']:,}" if same[1:] else "")
            right = bool(same[0].get("right"))
            sign = f'<span class="{"ok" if right else "no"}">{"✓" if right else "✗"}</span>'
            rows.append(_row(steps, sign, str(same[0].get("answer"))))
        shown = _table(rows[-_SHOWN:])
        if early := rows[:-_SHOWN]:
            summary = f"<summary>{len(early)} earlier answers</summary>"
            shown = f"<details>{summary}{_table(early)}</details>{shown}"
        expected = f'<span class="mono">{escape(str(answers[-1].get("expected")))}</span>'
        cards.append(_card(question, f'<p class="soft pre">expected: {expected}</p>{shown}'))
    return f'<div class="samples">{"".join(cards)}</div>' if cards else ""


def rounds(run: Run) -> str:
    """Show the best and the worst answer of rounds of GRPO, with their rewards, from first to last.

    A long run shows rounds evenly spaced over it, and the beginnings of long answers.
    """
    every = [(step, list(some)) for step, some in itertools.groupby(run.answers, key=_step)]
    if not every:
        return ""
    count = min(_ROUNDS, len(every))
    shown = [every[round(i * (len(every) - 1) / max(count - 1, 1))] for i in range(count)]
    cards = []
    for step, group in shown:
        rows = []
        for answer in sorted(group, key=lambda a: -_reward(a)):
            text = str(answer.get("answer"))
            if text[_LONGEST:]:
                text = f"{text[:_LONGEST]} [and {len(text) - _LONGEST:,} characters more]"
            rows.append(_row(f"reward {_reward(answer):.4g}", "", text))
        only = "" if group[1:] else '<p class="soft">all answers got this reward</p>'
        cards.append(_card(str(group[0].get("question")), only + _table(rows), f"step {step:,}"))
    of = f"{count} of {len(every):,} rounds" if count < len(every) else "every round"
    text = f"The best and the worst answer to one question, {of}; all rounds are in "
    text += f"{metrics.ANSWERS}."
    return f'<p>{text}</p><div class="samples">{"".join(cards)}</div>'


def _step(answer: dict[str, Any]) -> float:
    return answer["step"]


def _reward(answer: dict[str, Any]) -> float:
    value = answer.get("reward")
    return float(value) if isinstance(value, int | float) else float("nan")


def _card(question: str, body: str, heading: str = "") -> str:
    heading = f'<p class="soft">{escape(heading)}</p>' if heading else ""
    return f'<div class="card">{heading}<p class="pre">{escape(question)}</p>{body}</div>'


def _table(rows: list[str]) -> str:
    return f'<table class="fixed"><tbody>{"".join(rows)}</tbody></table>'


def _row(what: str, sign: str, text: str) -> str:
    cells = f"<td>{escape(what)}</td><td>{sign}</td>"
    return f'<tr>{cells}<td class="mono pre">{escape(text)}</td></tr>'
