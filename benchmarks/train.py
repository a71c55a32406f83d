"""Training steps of this project beside those of transformers with PEFT: LoRA, and all of a model.

    pip install -e '.[parity]'
    python benchmarks/train.py             # tiny and small on a CPU; about 5 minutes on two cores
    python benchmarks/train.py --device    # 20b and 120b, an H200; under 10 minutes
    python benchmarks/train.py --quick     # that it runs: few steps of the tiny model

A step is forward, loss over every token, backward, clipping and AdamW, on the same tokens with the
same weights (packed MXFP4 or their values; on a device both random), adapters on the same weights
of the same rank, dtype and number of threads. On a CPU the sides take turns of a few steps, each in
a process of its own, and the loss of the first step must be the same; on a device they run one
after the other. Times are medians. transformers runs eagerly, as its users run it, with each of its
expert forms; the faster one counts. See README.md of this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
THREADS = len(os.sched_getaffinity(0))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, str(THREADS))

import numpy as np  # noqa: E402
import train_cases  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from train_cases import Case  # noqa: E402

LOSS = 1e-5  # that the sides' first losses may be apart, of the loss; float32
TURN = 3  # steps a turn that count


def main() -> None:
    arguments = _arguments()
    load = os.getloadavg()[0]
    cases = train_cases.DEVICE if arguments.device else train_cases.CPU
    chosen = [i for i, case in enumerate(cases) if not arguments.quick or case.size != "small"]
    if arguments.cases is not None:
        chosen = [i for i in arguments.cases if 0 <= i < len(cases)]
    result: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/train.py", *sys.argv[1:]]),
        "machine": {
            "cores": THREADS,
            "load before": round(load, 2),
            "busy with other work": load > THREADS / 2,
            "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
            "python": platform.python_version(),
        },
        "peak FLOP/s": None if arguments.device else _product_on_cpu(),
        "cases": [],
    }
    tiny = arguments.device and arguments.quick
    seconds = 1.0 if arguments.quick else arguments.seconds
    with tempfile.TemporaryDirectory(prefix="train.", dir=arguments.dir) as name:
        folder = None if arguments.device else Path(name)
        if folder is not None:
            for size in sorted({cases[i].size for i in chosen}):
                _child("train_ours.py", "--write", size, "--weights", str(folder / size))
        for i in chosen:
            case = train_cases.choose(i, device=arguments.device, tiny=tiny)
            sides = _measure(i, case, arguments, folder=folder, seconds=seconds)
            result["cases"].append(_record(case, sides, result["peak FLOP/s"]))
    Console(width=120).print(_table(result["cases"]))
    if not arguments.device:
        print("not measured: 20b and 120b, which --device times on an accelerator")
    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
    Path(arguments.out).write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {arguments.out}")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="gptoss_jax against transformers with PEFT")
    parser.add_argument("--device", action="store_true", help="20b and 120b, on an accelerator")
    parser.add_argument("--quick", action="store_true", help="a few steps, of the tiny model")
    parser.add_argument("--cases", type=int, nargs="+", help="by number; see train_cases.py")
    parser.add_argument("--seconds", type=float, default=10, help="of timing, a case")
    parser.add_argument("--dir", help="where weights are kept meanwhile")
    parser.add_argument("--out", help="default: benchmarks/results/train.json or train_device.json")
    arguments = parser.parse_args()
    if arguments.out is None:
        if arguments.quick:
            parser.error("--quick measures nothing that is to be kept: give --out")
        name = "train_device.json" if arguments.device else "train.json"
        arguments.out = str(HERE / "results" / name)
    return arguments


def _product_on_cpu() -> float:
    """Return the FLOP/s of a large float32 product by NumPy on all threads, the best of some."""
    n, best = 1536, 0.0
    a, b = (np.random.default_rng(i).standard_normal((n, n), np.float32) for i in range(2))
    for _ in range(8):
        start = time.perf_counter()
        _ = a @ b
        best = max(best, 2 * n**3 / (time.perf_counter() - start))
    return best


def _measure(
    number: int, case: Case, arguments: argparse.Namespace, *, folder: Path | None, seconds: float
) -> dict[str, dict[str, Any]]:
    """Run a case's sides, in turns or one after the other; return what each said."""
    commands: dict[str, list[str]] = {}
    for who, forms in (("ours", case.ours), ("theirs", case.theirs)):
        for form in forms:
            command = [f"train_{who}.py", "--case", str(number), "--form", form]
            command += ["--device"] if arguments.device else []
            command += ["--tiny"] if arguments.device and arguments.quick else []
            command += ["--weights", str(folder / case.size)] if folder else []
            commands[f"{who} {form}"] = command
    if folder is not None:
        return _in_turns(commands, seconds)
    found: dict[str, dict[str, Any]] = {}
    for name, command in commands.items():
        found |= _in_turns({name: command}, seconds)
    return found


def _in_turns(commands: dict[str, list[str]], seconds: float) -> dict[str, dict[str, Any]]:
    """Start a process a command, and let them run one at a time: so many seconds in all."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        started = {name: stack.enter_context(_started(c)) for name, c in commands.items()}
        sides = dict(started)

        def ask(name: str, count: int | None = None) -> dict[str, Any]:
            try:
                return _answer(sides[name], count)
            except _Failed as error:  # on a device: of memory, most likely
                del sides[name]
                return {"error": str(error)}

        for name in started:
            found[name] = {"seconds": [], "cpu seconds": [], **ask(name)}
        end = time.perf_counter() + seconds
        turns = 0
        while sides and (turns < 2 or time.perf_counter() < end):
            turns += 1
            for name in list(sides):
                said = ask(name, TURN)
                found[name]["seconds"] += said.pop("seconds", [])
                found[name]["cpu seconds"] += [said.pop("cpu seconds", 0.0)]
                found[name] |= said
        for name in list(sides):
            found[name] |= ask(name, 0)
    return found


class _Failed(Exception):
    """A side's process ended before it answered."""


@contextlib.contextmanager
def _started(command: list[str]) -> Iterator[subprocess.Popen]:
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(HERE / command[0]), *command[1:]],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, bufsize=1,
        )  # fmt: skip
        process.log = log  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def _answer(side: Any, ask: int | None = None) -> dict[str, Any]:
    """Ask for so many steps, if any, and return the next line that the process says.

    Raises:
        _Failed: it ended without.
    """
    if ask is not None:
        with contextlib.suppress(BrokenPipeError):
            side.stdin.write(f"{ask}\n")
    line = side.stdout.readline()
    if line:
        return json.loads(line)
    side.log.seek(0)
    lines = side.log.read().strip().splitlines()
    print("\n".join(lines[-20:]), file=sys.stderr)
    raise _Failed(lines[-1][:300] if lines else "it ended without a word")


def _child(script: str, *arguments: str) -> None:
    environment = {"JAX_PLATFORMS": "cpu", **os.environ}
    subprocess.run([sys.executable, str(HERE / script), *arguments], check=True, env=environment)


def _record(case: Case, sides: dict[str, dict[str, Any]], peak: float | None) -> dict[str, Any]:
    """Return what a case came to, ratios for each form of ours against the fastest of theirs.

    Raises:
        SystemExit: the sides do not compute the same.
    """
    for side in sides.values():
        if "error" not in side:
            data_sheet = [s["peak FLOP/s"] for s in sides.values() if s.get("peak FLOP/s")]
            side |= _figures(case, side, peak or next(iter(data_sheet), None))
    losses = {name: side["loss"] for name, side in sides.items() if "loss" in side}
    first = next(iter(losses.values()), 0.0)
    same_weights = case.dtype == "float32"
    if same_weights and any(abs(loss - first) > LOSS * first for loss in losses.values()):
        sys.exit(f"{case.name}: the first losses are not the same: {losses}")
    theirs = [s for name, s in sides.items() if name.startswith("theirs") and "error" not in s]
    for name, side in sides.items():
        if theirs and name.startswith("ours") and "error" not in side:
            best = min(theirs, key=lambda s: s["median seconds"])
            side["times as fast"] = best["median seconds"] / side["median seconds"]
            side["share of memory"] = side["peak bytes"] / min(s["peak bytes"] for s in theirs)
    return {
        "case": case.name, **dataclasses.asdict(case), "FLOP": train_cases.flops(case),
        "sides": sides,
    }  # fmt: skip


def _figures(case: Case, side: dict[str, Any], peak: float | None) -> dict[str, Any]:
    seconds = statistics.median(side["seconds"])
    return {
        "median seconds": seconds,
        "tokens per second": case.rows * case.tokens / seconds,
        "MFU": train_cases.flops(case) / seconds / peak if peak else None,
        "cpu seconds": statistics.median(side["cpu seconds"]),
    }


def _table(cases: list[dict[str, Any]]) -> Table:
    columns = (
        "case",
        "side",
        "ms a step",
        "tokens/s",
        "MFU",
        "peak, GiB",
        "times as fast",
        "asked",
    )
    table = Table(*columns)
    for case in cases:
        asked = ", ".join(f"{value:,} {what}" for what, value in case["to_reach"].items())
        for i, (name, side) in enumerate(case["sides"].items()):
            head = case["case"] if i == 0 else ""
            if "error" in side:
                table.add_row(head, name, side["error"])
                continue
            ratio = side.get("times as fast")
            table.add_row(
                head,
                name,
                f"{1e3 * side['median seconds']:.1f}",
                f"{side['tokens per second']:,.0f}",
                f"{side['MFU']:.1%}" if side["MFU"] else "",
                f"{side['peak bytes'] / 2**30:.2f}",
                f"{ratio:.2f}" if ratio else "",
                asked if i == 0 else "",
            )
    return table


if __name__ == "__main__":
    main()
