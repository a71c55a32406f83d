"""Draw charts as inline SVG. `page.css` sets their colours, and `page.js` shows their values."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from dataclasses import dataclass
from html import escape

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.image import imsave
from matplotlib.ticker import LogLocator, MaxNLocator

from gptoss_jax.runs.report.runs import Points

MAX_POINTS = 600
_SMOOTHED = 150  # a curve with at least this many points can have a running mean
MAX_COLUMNS = 120  # the most columns of a heatmap over time
COLOURS = 8  # the page defines --c0 to --c7

_WIDTH, _HEIGHT = 380, 225
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 10, 10, 26
_COLOURMAP = "viridis"
_BYTE = 16  # a heatmap stores its values as bytes, in units of 1/16


@dataclass(frozen=True)
class Line:
    """One curve. `marked`: draw its points as dots; `noisy`: add a running mean if it is long."""

    name: str
    points: Points
    colour: int = 0
    marked: bool = False
    noisy: bool = False
    dashed: bool = False


@dataclass(frozen=True)
class _Axis:
    """The scale of an axis, from values to pixels."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    def at(self, value: float) -> float:
        """Return the pixel of a value."""
        low, high, value = (
            (math.log10(x) for x in (self.low, self.high, value))
            if self.log
            else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Return about five round values."""
        if self.log:
            decades = math.log10(self.high / self.low)
            found = LogLocator(subs=(1.0, 2.0, 5.0) if decades < 2 else (1.0,), numticks=6)
            ticks = found.tick_values(self.low, self.high)
        else:
            ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        slack = 1e-9 * (self.high - self.low)
        return [float(t) for t in ticks if self.low - slack <= t <= self.high + slack]


def chart(
    title: str,
    lines: list[Line],
    *,
    note: str = "",
    low: float | None = None,
    high: float | None = None,
    log: bool | None = None,
    marks: list[float] | None = None,
) -> str:
    """Draw curves over steps as a figure; return "" if there is no point.

    Args:
        title: The text above the chart.
        lines: The curves; those without points are left out. A curve of more than `MAX_POINTS`
            points is thinned out: the least and the largest value of each stretch of steps stay.
        note: A few words beside the title.
        low: The lower end of the axis of values, unless a value is less; None: the least value.
        high: The upper end, likewise.
        log: A logarithmic axis; None: if all values are above 0 and span a factor of over 30.
        marks: Steps that get a vertical line.
    """
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    values = [v for line in lines for _, v in line.points]
    steps = [s for line in lines for s, _ in line.points]
    if log is None:
        log = min(values) > 0 and max(values) > 30 * min(values)
    log = log and min(values) > 0
    x = _Axis(*_range(min(steps), max(steps), pad=0), False, _LEFT, _WIDTH - _RIGHT)
    bottom, top = min(values), max(values)
    if not log:
        bottom = bottom if low is None else min(low, bottom)
        top = top if high is None else max(high, top)
    pad = 0 if low is not None and high is not None else 0.04
    y = _Axis(*_range(bottom, top, pad=pad, log=log), log, _HEIGHT - _BOTTOM, _TOP)
    if low is not None and low <= bottom and not log:
        y = _Axis(low, y.high, log, y.start, y.end)
    body = [_axes(x, y)]
    body += [_mark(x.at(s)) for s in marks or [] if x.low <= s <= x.high]
    series = []
    for line in lines:
        points = thin(line.points)
        mean = smooth(line.points) if line.noisy else []
        body.append(_draw(line, points, x, y, faint=bool(mean)))
        body.append(_draw(line, mean, x, y) if mean else "")
        xs, ys = zip(*points, strict=True)
        xs = [int(s) if s == int(s) else s for s in xs]
        series.append({"n": line.name, "c": line.colour, "x": xs, "y": [_short(v) for v in ys]})
    data = {"l": _LEFT, "r": _WIDTH - _RIGHT, "lo": x.low, "hi": x.high, "s": series}
    legend = "".join(
        f'<span class="key"><i style="background:var(--c{line.colour})"></i>'
        f"{escape(line.name)}</span>"
        for line in lines
    )
    if log:
        note = f"{note}, log scale" if note else "log scale"
    return _figure(title, note, legend if len(lines) > 1 else "", "".join(body), data)


def thin(points: Points) -> Points:
    """Return at most `MAX_POINTS` points: the least and the largest of each stretch."""
    if len(points) <= MAX_POINTS:
        return points
    kept: Points = []
    stretches = MAX_POINTS // 2
    edges = [round(i * len(points) / stretches) for i in range(stretches + 1)]
    for start, end in itertools.pairwise(edges):
        some = points[start:end]
        kept += sorted({min(some, key=lambda p: p[1]), max(some, key=lambda p: p[1])})
    return kept


def smooth(points: Points) -> Points:
    """Return the running mean of a curve of many points, at some of its steps; [] for a few."""
    if len(points) < _SMOOTHED:
        return []
    width = len(points) // 40
    sums = np.cumsum([0.0] + [v for _, v in points])
    found: Points = []
    for i in range(0, len(points), max(1, len(points) // 200)):
        start, end = max(0, i - width // 2), min(len(points), i + width // 2 + 1)
        found.append((points[i][0], float(sums[end] - sums[start]) / (end - start)))
    return found


def heatmap(
    title: str,
    values: Float[np.ndarray, "rows columns"],
    *,
    top: float,
    columns: list[float],
    row: str,
    column: str,
    note: str = "",
    span: tuple[float, float] | None = None,
) -> str:
    """Draw a matrix as a figure, row 0 on top; `top` is the value of the brightest colour.

    `row` and `column` name the two axes. Rows are numbered from 0, and `columns` labels the
    columns. If the columns are times, `span` is the range of steps.
    """
    rows, count = values.shape
    x = _Axis(0, count, False, _LEFT, _WIDTH - _RIGHT)
    y = _Axis(rows, 0, False, _HEIGHT - _BOTTOM, _TOP)
    colours = matplotlib.colormaps[_COLOURMAP](np.clip(values / top, 0, 1))
    buffer = io.BytesIO()
    imsave(buffer, colours, format="png")
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    body = (
        f'<image x="{_LEFT}" y="{_TOP}" width="{width}" height="{height}" '
        f'preserveAspectRatio="none" href="data:image/png;base64,{_base64(buffer.getvalue())}"/>'
    )
    for i in _few(rows):
        body += _text(_LEFT - 6, y.at(i + 0.5) + 4, str(i), "end")
    if span is None:
        for i in _few(count):
            body += _text(x.at(i + 0.5), _HEIGHT - 8, _short_text(columns[i]), "middle")
    else:
        body += _step_labels(_Axis(*span, False, x.start, x.end))
    body += _text(4, _TOP + 4, row, "start", turned=True)
    raw = np.clip(np.round(values * _BYTE), 0, 255).astype(np.uint8).tobytes()
    data = {
        "l": _LEFT, "r": _WIDTH - _RIGHT, "t": _TOP, "b": _HEIGHT - _BOTTOM,
        "rows": rows, "cols": columns, "row": row, "col": column, "u": _BYTE, "v": _base64(raw),
    }  # fmt: skip
    return _figure(title, note, "", body, data, kind="heat")


def colour_bar(top: float, text: str) -> str:
    """Return the colour key of heatmaps, from 0 to `top`."""
    stops = matplotlib.colormaps[_COLOURMAP](np.linspace(0, 1, 9))
    shown = ", ".join(matplotlib.colors.to_hex(c) for c in stops)  # pyright: ignore[reportAttributeAccessIssue]
    return (
        f'<p class="bar">0 <i style="background:linear-gradient(90deg, {shown})"></i> '
        f"{_short_text(top)}+ {escape(text)}</p>"
    )


def over_time(
    records: list[tuple[float, Float[np.ndarray, " rows"]]],
) -> tuple[Float[np.ndarray, "rows columns"], list[float], tuple[float, float]]:
    """Return (columns, the columns' steps, first and last step) from (step, values) records.

    Records that fall into one column are averaged. Columns are evenly spaced in steps, so a gap or
    a change of the logging interval keeps its true width.
    """
    steps = np.array([s for s, _ in records])
    values = np.stack([v for _, v in records], axis=1)
    count = min(MAX_COLUMNS, len(records))
    edges = np.linspace(steps[0], steps[-1], count + 1)
    column = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, count - 1)
    shown = np.zeros((len(values), count))
    for i in range(count):
        here = values[:, column == i]
        shown[:, i] = here.mean(axis=1) if here.size else shown[:, i - 1]
    span = _range(float(steps[0]), float(steps[-1]), pad=0)
    return shown, [float(round(s)) for s in (edges[1:] + edges[:-1]) / 2], span


def _figure(title: str, note: str, legend: str, body: str, data: dict, kind: str = "lines") -> str:
    # "</" would end the script element, even inside a string.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<figure class="{kind}"><figcaption><b>{escape(title)}</b> '
        f"<small>{escape(note)}</small>{f'<div class=legend>{legend}</div>' if legend else ''}"
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{body}</svg>'
        f'<script type="application/json">{text}</script></figure>\n'
    )


def _axes(x: _Axis, y: _Axis) -> str:
    parts = []
    for value in y.ticks():
        at = y.at(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{at:.1f}" ')
        parts.append(f'y2="{at:.1f}"/>' + _text(_LEFT - 6, at + 4, _short_text(value), "end"))
    return "".join(parts) + _step_labels(x)


def _step_labels(x: _Axis) -> str:
    return "".join(
        _text(
            x.at(value), _HEIGHT - 8, _short_text(value),
            "end" if x.at(value) > _WIDTH - 30 else "middle",
        )
        for value in x.ticks() if value == int(value)
    )  # fmt: skip


def _draw(line: Line, points: Points, x: _Axis, y: _Axis, *, faint: bool = False) -> str:
    where = [(x.at(s), y.at(v)) for s, v in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in where)
    kinds = " ".join(["faint"] * faint + ["dashed"] * line.dashed)
    drawn = f'<polyline class="{kinds}" style="stroke:var(--c{line.colour})" points="{path}"/>'
    if line.marked or len(points) == 1:
        drawn += "".join(
            f'<circle style="fill:var(--c{line.colour})" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
            for a, b in where[:: max(1, len(where) // 40)]
        )
    return drawn


def _mark(at: float) -> str:
    return f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'


def _text(x: float, y: float, text: str, anchor: str, *, turned: bool = False) -> str:
    if turned:
        x, y = 11, _HEIGHT / 2
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    anchor = "middle" if turned else anchor
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(text)}</text>'


def _range(low: float, high: float, *, pad: float, log: bool = False) -> tuple[float, float]:
    """Widen a range by `pad` times its width; an empty one to a width of 0.5 or 1.

    With `log` this holds for the logarithms (base 10).
    """
    if log:
        low, high = math.log10(low), math.log10(high)
    if high - low < 1e-12 * max(1.0, abs(high)):
        low, high = low - (0.5 if low else 0), high + 0.5
    else:
        low, high = low - pad * (high - low), high + pad * (high - low)
    return (10**low, 10**high) if log else (low, high)


def _few(count: int) -> list[int]:
    """Return evenly spaced indices below `count`, for labels."""
    stride = next(s for s in (1, 2, 5, 10, 20, 50, 100, count) if count <= 9 * s)
    return list(range(0, count, stride))


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _short_text(value: float) -> str:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= scale:
            return f"{value / (1e3 if unit == 'k' else scale):.4g}{unit}"
    return f"{value:.4g}".replace("e-0", "e-")


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
