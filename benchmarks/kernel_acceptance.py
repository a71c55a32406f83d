"""What the kernels are to reach on an H200, from the timings of benchmarks/kernels.py."""

from __future__ import annotations

from typing import Any

BOTH = "forward + backward"


def acceptance(timings: list[dict[str, Any]], peak: dict[str, float]) -> list[dict[str, Any]]:
    """Return what was asked and what was reached, "not measured" where there is no timing."""

    def fastest(op: str, case: str, way: str, only: str | None = None) -> dict[str, Any] | None:
        rows = [
            row
            for row in timings
            if row["op"] == op and case in row["case"] and row["way"] == way
            if row["implementation"] != "reference"
            if only is None or row["implementation"].startswith(only)
        ]
        return min(rows, key=lambda row: row["ms"], default=None)

    def ratio(slow: dict[str, Any] | None, fast: dict[str, Any] | None) -> float | None:
        return slow["ms"] / fast["ms"] if slow and fast else None

    def of_peak(row: dict[str, Any] | None) -> float | None:
        return row["TFLOP/s"] * 1e12 / peak["flops"] if row else None

    banded = fastest("attention", "banded", BOTH, "pallas")
    lines = [
        _line(
            "banded attention, forward + backward, times as fast as our full kernel: 10",
            ratio(fastest("attention", "full", BOTH, "pallas"), banded), 10,
        ),
        _line(
            "banded attention, forward + backward, times as fast as chunked XLA: 3",
            ratio(fastest("attention", "banded", BOTH, "xla"), banded), 3,
        ),
    ]  # fmt: skip
    for way in ("forward", BOTH):
        full = of_peak(fastest("attention", "full", way))
        lines.append(_line(f"full attention, {way}, share of peak: 0.5", full, 0.5))
    for rows in (1, 4, 16):
        row = fastest("experts", f"M={rows} packed", "forward")
        share = row["TB/s"] * 1e12 / peak["bytes"] if row else None
        lines.append(_line(f"MXFP4 decode, {rows} rows, share of the copy: 0.6", share, 0.6))
    for matrix in ("gate_up", "down"):
        rows = [r for r in timings if r["op"] == "grouped matmul" and matrix in r["case"]]
        case = next((r["case"] for r in rows if "packed" in r["case"]), "packed")
        forward = fastest("grouped matmul", case, "forward")
        backward = fastest("grouped matmul", case, "d rows")
        lines.append(_line(f"packed {matrix}, prefill, share of peak: 0.5", of_peak(forward), 0.5))
        slower = ratio(backward, forward)
        lines.append(_line(f"packed {matrix}, d rows over forward: at most 1.3", slower, -1.3))
    return lines


def _line(asked: str, value: float | None, bound: float) -> dict[str, Any]:
    """Compare; a negative bound is one from above."""
    if value is None:
        return {"asked": asked, "reached": "not measured"}
    met = value >= bound if bound > 0 else value <= -bound
    return {"asked": asked, "reached": f"{value:.2f}", "met": met}
