"""Every implementation of every op: right first, then timed against the reference and the roofline.

    python benchmarks/kernels.py                # small sizes, about 2 minutes on two CPU cores
    python benchmarks/kernels.py --device       # a model's sizes, within 10 minutes on an H200
    python benchmarks/kernels.py --ops attention experts --out FILE

What the dispatcher refuses on the chip it runs on is listed with the reason. Medians of calls that
rotate over at least 1 GB of arguments (64 sets at most), so that no cache serves them. Needs jax
and flax; with torch and transformers there, their eager attention and grouped experts are timed on
the same shapes. An implementation that is off by more than 2e-2 (bfloat16) or 1e-5 (float32) in
relative norm is not timed, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the references take what they can

import jax  # noqa: E402
import kernel_cases  # noqa: E402
import kernel_timing  # noqa: E402
from kernel_acceptance import acceptance  # noqa: E402
from kernel_case import FULL, FULL_CHECK, QUICK, SMALL, SMALL_CHECK, Case  # noqa: E402

from gptoss_jax import chips  # noqa: E402

PEAK = {"h200": 790e12, "h100": 790e12}  # dense bfloat16 that a product reaches; else as measured
LAST = 20  # seconds kept for what has been started, and for writing


def main() -> None:
    arguments = _arguments()
    began = time.perf_counter()
    load = os.getloadavg()[0]
    theirs = _theirs(arguments)
    chip = chips.current()
    timed, checked = (FULL, FULL_CHECK) if arguments.device else (SMALL, SMALL_CHECK)
    if arguments.quick:
        timed = checked = QUICK
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/kernels.py", *sys.argv[1:]]),
        "chip": chip.kind,
        "device": jax.devices()[0].device_kind,
        "machine": {
            "cores": len(os.sched_getaffinity(0)),
            "load before": round(load, 2),
            "busy with other work": load > len(os.sched_getaffinity(0)) / 2,
        },
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "sizes": timed.__dict__,
    }
    result["measured roofline"] = kernel_timing.roofline(full=arguments.device)
    peak = {**result["measured roofline"]}
    peak["flops"] = PEAK.get(chip.kind, peak["flops"])
    result["roofline"] = peak
    print(f"{result['device']}: copy {peak['bytes'] / 1e12:.3f} TB/s, "
          f"product {result['measured roofline']['flops'] / 1e12:.3f} TFLOP/s")  # fmt: skip
    pairs = list(zip(kernel_cases.cases(timed), kernel_cases.cases(checked), strict=True))
    pairs = [pair for pair in pairs if not arguments.ops or pair[0].op in arguments.ops]
    work = [(case, small, *v) for case, small in pairs for v in case.variants()]
    if arguments.device:  # first what is to be measured
        work.sort(key=lambda item: item[2] == "reference")
    rotation = 1e9 if arguments.device else 1e6 if arguments.quick else 64e6
    result["rotation bytes"] = rotation
    result["checks"], result["timings"], result["left out"] = [], [], []
    end = began + 60 * (arguments.minutes or (9.5 if arguments.device else 2)) - LAST
    _run(work, result, rotation=rotation, end=end, most=0.05 if arguments.quick else 1.5)
    _compare(result, theirs)
    # What is asked is asked of a model's sizes on an H200.
    result["acceptance"] = acceptance(result["timings"] if arguments.device else [], peak)
    for line in result["acceptance"]:
        print(f"asked {line['asked']}: {line['reached']}")
    out = Path(arguments.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {out}, {time.perf_counter() - began:.0f} s in all")
    wrong = [c for c in result["checks"] if not c["right"]]
    sys.exit(f"{len(wrong)} wrong or failed" if wrong else 0)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check and time every implementation of every op")
    parser.add_argument("--device", action="store_true", help="a model's sizes, for an accelerator")
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run?")
    parser.add_argument("--ops", nargs="+", metavar="OP", help="attention, experts, ...")
    parser.add_argument("--minutes", type=float, help="to be done in: 9.5 with --device, else 2")
    parser.add_argument("--out", default=str(HERE / "results" / "kernels.json"))
    return parser.parse_args()


def _theirs(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time transformers in a process of its own, which gives its memory back."""
    command = [sys.executable, str(HERE / "kernel_theirs.py"), "--sizes"]
    command.append("quick" if arguments.quick else "full" if arguments.device else "small")
    if arguments.ops and not {"attention", "experts"} & set(arguments.ops):
        return {"left out": "not asked for", "timings": []}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except subprocess.TimeoutExpired:
        return {"left out": "it took more than 120 s", "timings": []}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        why = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"left out": why, "timings": []}
    return json.loads(lines[-1])


def _run(
    work: list[tuple[Case, Case, str, str | None]],
    result: dict[str, Any],
    *,
    rotation: float,
    end: float,
    most: float,
) -> None:
    """Check, then time, each; start no new one after `end`."""
    title, want = "", (None, None)
    for done, (case, small, name, layout) in enumerate(work):
        entry = {"op": case.op, "case": case.name, "way": case.way, "implementation": name}
        entry |= {} if layout is None else {"layout": layout}
        if case.title != title:
            title = case.title
            print(title, flush=True)
        try:
            why = kernel_timing.refusal(case, name, layout)
            if why is None and time.perf_counter() > end:
                why = "the time was up"
            if why is None and name != "reference":
                if want[0] is not small:
                    want = (small, kernel_timing.expected(small))
                found = kernel_timing.check(small, name, layout, want[1])
                result["checks"].append({**entry, **found})
                why = None if found["right"] else f"WRONG: off by {found['apart']:.1e}"
            if why is None:
                # Compiling takes the rest.
                share = (end - time.perf_counter()) / (len(work) - done) / 3
                seconds = min(max(share, 0.05), most)
                timing = kernel_timing.measure(
                    case, name, layout, rotation=rotation, seconds=seconds
                )
                result["timings"].append({**entry, **_rates(case, timing, result["roofline"])})
                _print(result["timings"][-1])
                continue
        except Exception as error:  # out of memory, a compiler's refusal: the others go on
            why = kernel_timing.reason(error)
            if name != "reference":
                result["checks"].append({**entry, "right": False, "error": why})
        result["left out"].append({**entry, "why": why})
        print(f"  {_label(entry):<24} left out: {why[:150]}", flush=True)


def _label(row: dict[str, Any]) -> str:
    return row["implementation"] + (f" ({row['layout']})" if "layout" in row else "")


def _rates(case: Case, timing: kernel_timing.Timing, peak: dict[str, float]) -> dict[str, Any]:
    moved = case.read + case.written
    ideal = max(case.flops / peak["flops"], moved / peak["bytes"])
    return {
        "ms": timing.seconds * 1e3,
        "TFLOP/s": case.flops / timing.seconds / 1e12,
        "TB/s": moved / timing.seconds / 1e12,
        "of roofline": ideal / timing.seconds,
        "samples": timing.samples,
        "calls": timing.calls,
        "sets": timing.sets,
    }


def _print(row: dict[str, Any]) -> None:
    print(
        f"  {_label(row):<24} {row['ms']:10.3f} ms {row['TFLOP/s']:9.3f} TFLOP/s "
        f"{row['TB/s']:7.3f} TB/s {row['of roofline']:6.1%} of roofline",
        flush=True,
    )


def _compare(result: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Add the ratios to the reference and to transformers, and print them."""
    result["transformers"] = theirs
    if theirs.get("left out"):
        print(f"transformers was left out: {theirs['left out']}")
    times = {_key(r): r["ms"] for r in result["timings"] if r["implementation"] == "reference"}
    other: dict[Any, float] = {}
    for row in theirs["timings"]:
        if "ms" in row:
            other[_key(row)] = min(row["ms"], other.get(_key(row), row["ms"]))
    print("\ntimes as fast as   reference  transformers' best")
    for row in result["timings"]:
        if row["implementation"] == "reference":
            continue
        columns = []
        for name, known in (("reference", times), ("transformers", other)):
            if _key(row) in known:
                row[f"times as fast as {name}"] = known[_key(row)] / row["ms"]
            columns.append(row.get(f"times as fast as {name}"))
        text = " ".join(f"{c:12.2f}" if c else f"{'-':>12}" for c in columns)
        print(f"{text}   {row['op']} {row['case']}, {row['way']}: {_label(row)}")


def _key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["op"], row["case"], row["way"]


if __name__ == "__main__":
    main()
