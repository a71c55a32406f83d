"""Run an experiment: every variant with every seed, then its table, results.json and figure.png.

    python experiments/run.py NAME [--seeds 0 1 2] [--variants ...] [--steps N] [--jobs 1]

A run is a training run like any other, with the options that the variant stands for; it lives in
runs/experiments/NAME/VARIANT-seedS. What is complete is not run again, and what was interrupted
goes on: stop with ctrl-C and give the same command. The whole of an experiment is written to
experiments/NAME/; a part of it (--variants, --steps) to runs/experiments/NAME/, or to --out.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import common  # noqa: E402
from experiments.common import Experiment, Measured, Results, Run  # noqa: E402
from gptoss_jax.config import command_line  # noqa: E402
from gptoss_jax.errors import Parser, UserError, run_entry  # noqa: E402
from gptoss_jax.runs import metrics  # noqa: E402

SEEDS = (0, 1, 2)
RECORD = "experiment.json"  # of a run, in its workdir: config, seconds, whether it is complete
POLL = 0.5  # seconds between looks at what runs
SAY_EVERY = 15.0  # seconds between progress lines


@dataclasses.dataclass
class Job:
    """A run to be made: the command, and how far it is."""

    run: Run
    command: list[str]  # what Python is started with
    log: Path
    seconds: float = 0.0  # what it has taken so far, over all attempts
    complete: bool = False
    after: Job | None = None  # the run that has to be complete before this one can start
    process: subprocess.Popen[bytes] | None = None
    began: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"{self.run.variant}, seed {self.run.seed}"

    @property
    def steps(self) -> int:
        """The steps of its config."""
        return self.run.config.train.steps

    def ended(self) -> bool:
        """Say whether its process has come to an end."""
        return self.process is not None and self.process.poll() is not None


def main(argv: list[str]) -> None:
    """Run an experiment from the command line's arguments to its table."""
    parser = Parser(
        prog="python experiments/run.py",
        description=f"Run an experiment. There are: {', '.join(common.names())}.",
        epilog="The log of all experiments, and how to add one: experiments/README.md",
    )
    parser.add_argument("name", help="the experiment: a folder of experiments/")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, help="of every run; default: the config's")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time; default: 1")
    parser.add_argument("--out", type=Path, help="a folder for the runs and all that is written")
    args = parser.parse_args(argv)
    experiment = common.load(args.name)
    for variant in args.variants or ():
        if variant not in experiment.variants:
            raise UserError(
                f"--variants {variant}: {args.name} has {', '.join(experiment.variants)}"
            )
    for option, value in (("--steps", args.steps), ("--jobs", args.jobs)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}: at least 1")
    runs = args.out.resolve() if args.out else ROOT / "runs" / "experiments" / args.name
    whole = not args.variants and args.steps is None and len(args.seeds) >= len(SEEDS)
    written = experiment.folder if whole and not args.out else runs

    console = Console(highlight=False)
    signal.signal(signal.SIGTERM, _stop)  # so that runs are stopped, too
    jobs = plan(
        experiment,
        variants=tuple(args.variants or experiment.variants),
        seeds=tuple(args.seeds),
        steps=args.steps,
        folder=runs,
    )
    run_jobs(jobs, at_once=args.jobs, console=console)
    console.print("measuring ...")
    measured = {(j.run.variant, j.run.seed): experiment.measure(j.run) for j in jobs}
    results: Results = {}
    for job in jobs:
        results.setdefault(job.run.variant, []).append(measured[job.run.variant, job.run.seed])
    written.mkdir(parents=True, exist_ok=True)
    record = describe(experiment, jobs, measured, command=argv)
    common.write_results(written / "results.json", record)
    experiment.draw(results).savefig(written / "figure.png", dpi=110)
    print_table(results, record["seconds"], console)
    for file in ("results.json", "figure.png"):
        path = written / file
        shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
        console.print(f"wrote {shown}", soft_wrap=True)


def _stop(*_: Any) -> None:
    print("stopped by SIGTERM; the same command goes on from there", file=sys.stderr)
    sys.exit(143)


def plan(
    experiment: Experiment,
    *,
    variants: tuple[str, ...],
    seeds: tuple[int, ...],
    steps: int | None,
    folder: Path,
) -> list[Job]:
    """List the runs, seed after seed, so that every variant has one early.

    Raises:
        UserError: a folder holds a complete run of another config; a variant starts from one that
            is not asked for.
    """
    jobs = []
    for seed in seeds:
        by_variant: dict[str, Job] = {}
        for variant in sorted(variants, key=lambda name: name in experiment.starts_from):
            config = experiment.get_config(variant)
            source = experiment.starts_from.get(variant)
            if source is not None:
                if source not in by_variant:
                    raise UserError(f"--variants {variant}: it starts from {source}; name both")
                config = dataclasses.replace(config, init=str(by_variant[source].run.workdir))
            train = dataclasses.replace(config.train, seed=seed, steps=steps or config.train.steps)
            config = dataclasses.replace(config, train=train)
            name = f"{variant.replace(':', '-')}-seed{seed}" + (f"-steps{steps}" if steps else "")
            run = Run(variant, seed, config, folder / name)
            command = ["-m", "gptoss_jax.train", "--config", experiment.config_file(variant)]
            command += [*experiment.options(variant, config), "--workdir", str(run.workdir)]
            log = folder / "logs" / f"{name}.txt"
            job = Job(run, command, log, after=by_variant.get(source or ""))
            by_variant[variant] = job
            _read_record(job)
            jobs.append(job)
    return jobs


def _read_record(job: Job) -> None:
    """Take over what earlier attempts at a run came to."""
    path = job.run.workdir / RECORD
    if not path.is_file():
        return
    record = json.loads(path.read_text())
    old = command_line.from_json(json.dumps(record["config"]), where=str(path))
    changed = [
        name
        for name in common.differences(job.run.config, old)
        if name != "init" and not name.startswith("data.")
    ]  # where data and runs lie depends on where the project does
    if changed:
        raise UserError(
            f"{job.run.workdir} is a run of another config ({', '.join(changed)} differ): "
            "remove it, or give another --out"
        )
    job.seconds, job.complete = float(record["seconds"]), bool(record["complete"])


def _write_record(job: Job) -> None:
    job.seconds += time.perf_counter() - job.began
    config = json.loads(command_line.to_json(job.run.config))
    record = {"complete": job.complete, "seconds": job.seconds, "config": config}
    if job.run.workdir.is_dir():
        (job.run.workdir / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def last_step(workdir: Path) -> int:
    """Return the last step in a run's metrics, 0 if there is none."""
    path = workdir / metrics.FILE
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - (1 << 16)))
        lines = file.read().splitlines()
    for line in reversed(lines):  # the last may be half a line
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


def run_jobs(jobs: list[Job], *, at_once: int, console: Console) -> None:
    """Run what is not complete, `at_once` at a time; an interrupt lets each save first.

    Raises:
        UserError: a run failed; the others are stopped, and go on at the next attempt.
    """
    waiting = [job for job in jobs if not job.complete]
    if len(waiting) < len(jobs):
        console.print(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are complete already")
    running: list[Job] = []
    clock = _Clock(jobs, console)
    try:
        while waiting or running:
            ready = [job for job in waiting if job.after is None or job.after.complete]
            for job in ready[: at_once - len(running)]:
                waiting.remove(job)
                running.append(job)
                _start(job)
            time.sleep(POLL)
            for job in [job for job in running if job.ended()]:
                running.remove(job)
                _finish(job)
                clock.show(running, finished=job)
            clock.show(running)
    finally:
        clock.stop()
        for job in running:
            if job.process is not None and not job.ended():
                job.process.send_signal(signal.SIGTERM)  # the trainer saves and stops
        for job in running:
            if job.process is not None:
                job.process.wait()
                _write_record(job)


def _start(job: Job) -> None:
    environment = os.environ.copy()
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")  # a quarter faster on Linux
    # What one seed compiled serves the others: a third of a short run's time.
    environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(job.log.parent.parent / "compiled"))
    job.log.parent.mkdir(parents=True, exist_ok=True)
    job.began = time.perf_counter()
    with job.log.open("ab") as log:
        job.process = subprocess.Popen(
            [sys.executable, *job.command],
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=ROOT,
        )


def _finish(job: Job) -> None:
    """Mark a run as complete, with what it took."""
    assert job.process is not None
    if job.process.returncode != 0 or last_step(job.run.workdir) != job.steps:
        lines = job.log.read_text(errors="replace").strip().splitlines()
        said = next((line for line in reversed(lines) if line.strip()), "nothing")
        raise UserError(f"{job.name} failed; {job.log} ends in: {said.removeprefix('error: ')}")
    job.complete = True
    _write_record(job)


class _Clock:
    """Says how far all is and how long it will take: a bar on a terminal, lines elsewhere."""

    def __init__(self, jobs: list[Job], console: Console) -> None:
        self._jobs, self._console = jobs, console
        self._total, self._first = len(jobs), self._done()
        self._began = self._said = time.perf_counter()
        self._bar = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("runs", total=self._total, text="starting", left="")
        self._bar.start()

    def show(self, running: list[Job], finished: Job | None = None) -> None:
        """Show how far all is; a run that has finished always gets a line."""
        left = f"left {self._left()}"
        if finished is not None:
            number = sum(job.complete for job in self._jobs)
            text = f"[{number}/{self._total}] {finished.name}: {finished.seconds:.0f} s"
            self._bar.console.print(f"{text}  {left}", soft_wrap=True, markup=False)
        text = "; ".join(f"{j.name}: step {last_step(j.run.workdir)}/{j.steps}" for j in running)
        self._bar.update(self._task, completed=self._done(), text=text, left=left)
        due = time.perf_counter() - self._said > SAY_EVERY
        if not self._console.is_terminal and due and running:
            self._said = time.perf_counter()
            self._console.print(f"{text}  {left}", soft_wrap=True)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        self._bar.stop()

    def _done(self) -> float:
        """Return how many runs are done, with the part that is of those that are not."""
        return sum(min(1.0, last_step(job.run.workdir) / job.steps) for job in self._jobs)

    def _left(self) -> str:
        """Estimate the time left from a whole run, or half of one: starting takes long, too."""
        done = self._done()
        if done - self._first < 0.5:
            return "unknown"
        pace = (time.perf_counter() - self._began) / (done - self._first)
        minutes, seconds = divmod(round(pace * (self._total - done)), 60)
        return f"{minutes}:{seconds:02}"


def describe(
    experiment: Experiment,
    jobs: list[Job],
    measured: dict[tuple[str, int], Measured],
    *,
    command: list[str],
) -> dict[str, Any]:
    """Return what results.json holds: every run's numbers, and what they were made with."""
    packages = ("jax", "jaxlib", "flax", "optax", "gptoss-jax")
    variants: dict[str, Any] = {}
    for job in jobs:
        run = job.run
        entry = variants.setdefault(run.variant, {"options": [], "seeds": {}})
        entry["options"] = experiment.options(run.variant)
        if run.variant in experiment.configs:
            entry["config"] = experiment.config_file(run.variant)
        entry["seeds"][str(run.seed)] = {
            "seconds": job.seconds,
            **dataclasses.asdict(measured[run.variant, run.seed]),
        }
    return {
        "experiment": experiment.name,
        "command": " ".join(["python experiments/run.py", *command]),
        "steps": jobs[0].steps,
        "seconds": sum(job.seconds for job in jobs),
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cores": _cores(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in packages},
        },
        "variants": variants,
    }


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def print_table(results: Results, seconds: float, console: Console) -> None:
    """Print mean and standard deviation over seeds, a column a variant."""
    first = next(iter(results.values()))
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for variant in results:
        table.add_column(variant, justify="right")
    for name in first[0].numbers:
        cells = []
        for runs in results.values():
            values = [m.numbers[name] for m in runs]
            cells.append(f"{common.mean(values):.3f} ± {common.spread(values):.3f}")
        table.add_row(name, *cells)
    console.print(table)
    console.print(
        f"mean ± standard deviation of {len(first)} seeds; {seconds / 60:.1f} minutes of training"
    )


if __name__ == "__main__":
    run_entry(main)
