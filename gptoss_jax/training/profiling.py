"""Where the time of training steps goes: `python -m gptoss_jax.training.profiling WORKDIR`.

`train.profile_start` and `train.profile_steps` record a profile of a run's steps; this reads the
newest one in a workdir into a table by named scope. See docs/profiling.md.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from gptoss_jax.config import TrainConfig
from gptoss_jax.errors import Parser, UserError, run_entry

FOLDER = "profile"
STEP = "train"  # the name of a step's annotation in a trace
MODULE = "jit_step"  # the compiled step's: `train_step.make_train_step` jits a `step`
# The named scopes of a step; of nested ones the innermost counts.
SCOPES = ("embedding", "attention", "router", "experts", "loss", "optimizer")
_SCOPE = re.compile(rf"(?:^|[/(])({'|'.join(SCOPES)})(?=[/)]|$)")
_OTHER = "other"


class Window:
    """Records the steps that the config asks for, while the training loop runs.

    `begin` and `end` go around each step and do nothing outside the window. A run that goes on
    inside its window records what is left of it, one that ends inside it what there was. What goes
    wrong in recording is printed; it never stops a run.
    """

    def __init__(self, config: TrainConfig, workdir: str | Path, console: Console) -> None:
        """Take the window from `profile_start` and `profile_steps`; nothing is written yet."""
        self._folder, self._console = Path(workdir) / FOLDER, console
        first = config.profile_start
        self._steps = range(first, first + config.profile_steps) if first else range(0)
        self._running, self._done = False, False
        self._step: Any = None

    def begin(self, step: int, state: Any) -> None:
        """Start recording at the window's first step, once the device is through with `state`."""
        if self._running and step not in self._steps:  # the run went back to before its window
            jax.block_until_ready(state)
            self.close()
        if step not in self._steps or self._done:
            return
        if not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows the host, and hides it under its frames
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
            except (OSError, RuntimeError) as error:
                self._fail(error)
                return
            self._running = True
        self._step = jax.profiler.StepTraceAnnotation(STEP, step_num=step)
        self._step.__enter__()

    def end(self, step: int, state: Any) -> float:
        """Stop after the window's last step, whose result is `state`, and print the table.

        Returns the seconds that writing and reading the profile took: they are none of the step's.
        """
        if not self._running:
            return 0.0
        self._step.__exit__(None, None, None)
        if step != self._steps[-1]:
            return 0.0
        jax.block_until_ready(state)
        began = time.perf_counter()
        self.close()
        return time.perf_counter() - began

    def close(self) -> None:
        """Write what was recorded, if it was not yet: at the end of a run, however it ends.

        What the device has not done by then is not in it.
        """
        if not self._running:
            return
        self._running, self._done = False, True
        try:
            jax.profiler.stop_trace()
            times = read(self._folder)
        except (OSError, RuntimeError, UserError) as error:
            self._fail(error)
            return
        show(times, self._console)

    def _fail(self, error: Exception) -> None:
        self._done = True
        self._console.print(f"no profile: {str(error).splitlines()[0]}", soft_wrap=True)


@dataclasses.dataclass(frozen=True)
class Times:
    """The time of a trace's training steps, in seconds; of ops summed over threads or streams."""

    folder: Path  # that the trace lies in, with its viewers' files
    steps: int  # annotated in the trace; 0 if none is
    wall: float  # from the first op's start to the last one's end, without what ran between steps
    idle: float  # of that, when no op ran at all
    by_scope: dict[tuple[str, bool], float]  # (scope or "other", backward pass?) -> time
    ops: list[tuple[str, str, float]]  # (op, its path of scopes, time), the longest first


def read(folder: str | Path) -> Times:
    """Read the newest trace under a folder.

    An op's time is its own, without the ops that run within it (a loop's body). Its scope is by its
    metadata, else by that of what was fused into it, else that of the op that it runs within.

    Raises:
        UserError: no trace there, an unreadable one, or one in which no op says what it is.
    """
    files = sorted(Path(folder).glob("**/*.xplane.pb"), key=lambda p: p.stat().st_mtime)
    if not files:
        raise UserError(f"{folder}: no trace in it; record one with --train.profile_start STEP")
    if jax.__version_info__ >= (0, 12):  # its ProfileData ends the process at an event's stats
        raise UserError(f"jax {jax.__version__} can't read {files[-1]}: open it in a viewer")
    raw = files[-1].read_bytes()
    try:
        _check_whole(raw)
        paths = _op_paths(memoryview(raw))
        planes = list(jax.profiler.ProfileData.from_serialized_xspace(raw).planes)
    except (ValueError, IndexError, RuntimeError, UnicodeDecodeError):
        raise UserError(f"{files[-1]} is no whole trace") from None
    steps: set[int] = set()
    lanes: dict[bool, list[list[_Event]]] = {False: [], True: []}
    for plane in planes:
        on_device = plane.name.startswith("/device:")
        for line in plane.lines:
            events: list[_Event] = []
            for event in line.events:
                stats = dict(event.stats)
                if event.name == STEP and "step_num" in stats:
                    steps.add(int(stats["step_num"]))
                if "hlo_op" in stats:
                    op = (str(stats.get("hlo_module", "")), str(stats["hlo_op"]))
                    events.append((event.start_ns, event.start_ns + event.duration_ns, op))
            if events:
                lanes[on_device].append(sorted(events, key=lambda e: (e[0], -e[1])))
    ran = lanes[True] or lanes[False]  # where there is a device, the host only tells it what to do
    if not any(op[0] == MODULE for events in ran for _, _, op in events):
        raise UserError(f"{files[-1].parent}: no op of a training step in the trace; use a viewer")
    return _sum(ran, paths, folder=files[-1].parent, steps=len(steps))


def show(times: Times, console: Console) -> None:
    """Print where a trace lies, and its time by scope."""
    steps = max(times.steps, 1)
    total = sum(times.by_scope.values())
    console.print(
        f"profile   {times.folder}\n          {times.steps} steps, "
        f"{1e3 * times.wall / steps:,.1f} ms each: no op ran for {times.idle / times.wall:.0%} of "
        f"the time, in the rest {total / (times.wall - times.idle):.1f} at once; "
        "docs/profiling.md says more",
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2))
    table.add_column("scope, ms a step")
    for name in ("forward", "backward", "both", "share"):
        table.add_column(name, justify="right")
    for name in sorted((*SCOPES, _OTHER), key=lambda s: (s == _OTHER, -_both(times, s))):
        parts = [times.by_scope.get((name, back), 0.0) for back in (False, True)]
        shown = [f"{1e3 * t / steps:,.2f}" for t in (*parts, sum(parts))]
        table.add_row(name, *shown, f"{sum(parts) / total:.1%}" if total else "")
    console.print(table)
    console.print("longest ops, ms a step")
    for op, path, seconds in times.ops[:5]:
        # What is common to all is left out.
        shown = path.replace("jit(step)/", "").replace("/closed_call", "") or "no path"
        line = f"{1e3 * seconds / steps:9.2f}  {op}  {shown}"
        console.print(line, soft_wrap=True, markup=False)


def _both(times: Times, scope: str) -> float:
    return sum(times.by_scope.get((scope, back), 0.0) for back in (False, True))


_Op = tuple[str, str]  # module, instruction
_Event = tuple[float, float, _Op]  # start and end in ns


def _sum(lanes: list[list[_Event]], paths: dict[_Op, str], *, folder: Path, steps: int) -> Times:
    by_scope: defaultdict[tuple[str, bool], float] = defaultdict(float)
    ops: defaultdict[tuple[str, str], float] = defaultdict(float)
    for events in lanes:
        ends: list[float] = []  # of the ops that the present one runs within
        within: list[tuple[tuple[str, bool], tuple[str, str]]] = []
        for start, end, op in events:
            while ends and ends[-1] <= start:
                ends.pop()
                within.pop()
            if op[0] != MODULE:  # an evaluation between two steps
                continue
            path = paths.get(op, "")
            scope = scope_of(path)
            if scope[0] == _OTHER and within and not path:
                scope = within[-1][0]
            seconds = 1e-9 * (end - start)
            by_scope[scope] += seconds
            ops[op[1], path] += seconds
            if within:  # of the op around it this is no longer its own
                by_scope[within[-1][0]] -= seconds
                ops[within[-1][1]] -= seconds
            ends.append(end)
            within.append((scope, (op[1], path)))
    wall, idle = _wall(lanes)
    longest = sorted(((op, path, t) for (op, path), t in ops.items()), key=lambda o: -o[2])[:20]
    return Times(folder, steps, wall, idle, dict(by_scope), longest)


def _wall(lanes: list[list[_Event]]) -> tuple[float, float]:
    """Return the seconds of the steps, gaps between them included, and those without any op.

    What ran between steps, an evaluation say, counts in neither, nor do the gaps around it.
    """
    busy = idle = until = 0.0
    inside = False  # is what ran last of a step?
    for start, end, (module, _) in sorted(e for events in lanes for e in events):
        mine = module == MODULE
        if mine:
            busy += max(0.0, end - max(start, until))
            idle += max(0.0, start - until) if inside else 0.0
        if end > until:
            until, inside = end, mine
    return 1e-9 * (busy + idle), 1e-9 * idle


def scope_of(path: str) -> tuple[str, bool]:
    """Return the innermost named scope of an op's path, or "other"; and if it is backward."""
    found = _SCOPE.findall(path)
    return (found[-1] if found else _OTHER), "transpose(" in path


# --- What a trace says of its programs ---------------------------------------------------------
# A trace holds each program as it was compiled (xla/service/hlo.proto), and ops name their
# instruction; but `ProfileData` does not show it. So these few fields are read off the wire.

_PLANES = 1  # XSpace
_PLANE_NAME, _PLANE_METADATA = 2, 4  # XPlane
_MAP_VALUE, _METADATA_STATS, _STAT_BYTES = 2, 5, 6
_PROTO_MODULE, _MODULE_NAME, _MODULE_COMPUTATIONS = 1, 1, 3  # HloProto, HloModuleProto
_COMPUTATION_INSTRUCTIONS, _COMPUTATION_ID = 2, 5
_INSTRUCTION_NAME, _INSTRUCTION_METADATA, _INSTRUCTION_CALLS, _OP_NAME = 1, 7, 38, 2
_FUSION = b"fusion"
_INSTRUCTION_OPCODE = 2


def _check_whole(raw: bytes) -> None:
    """Raise ValueError unless the bytes are whole fields of an XSpace (all length-delimited)."""
    at = 0
    while at < len(raw):
        tag, size, shift = raw[at], 0, 0
        at += 1
        while True:
            byte = raw[at]
            at, size, shift = at + 1, size | (byte & 127) << shift, shift + 7
            if byte < 128:
                break
        at += size
        if tag >= 128 or tag & 7 != 2 or not 1 <= tag >> 3 <= 4 or at > len(raw):
            raise ValueError("not whole")
    if not raw:
        raise ValueError("empty")


def _op_paths(raw: memoryview) -> dict[_Op, str]:
    """Map (module, instruction) to the path of scopes that it was traced in, where it has one."""
    paths: dict[_Op, str] = {}
    for plane in _all(raw, _PLANES):
        if b"metadata" not in bytes(_first(plane, _PLANE_NAME)):
            continue
        for entry in _all(plane, _PLANE_METADATA):
            for stat in _all(_first(entry, _MAP_VALUE), _METADATA_STATS):
                for proto in _all(stat, _STAT_BYTES):
                    paths |= _module_paths(_first(proto, _PROTO_MODULE))
    return paths


def _module_paths(module: memoryview) -> dict[_Op, str]:
    name = bytes(_first(module, _MODULE_NAME)).decode()
    paths: dict[_Op, str] = {}
    inside: dict[int, list[str]] = {}  # computation -> the paths in it
    fused: list[tuple[_Op, int]] = []
    for computation in _all(module, _MODULE_COMPUTATIONS):
        found: list[str] = []
        for instruction in _all(computation, _COMPUTATION_INSTRUCTIONS):
            op = (name, bytes(_first(instruction, _INSTRUCTION_NAME)).decode())
            metadata = _first(instruction, _INSTRUCTION_METADATA)
            path = bytes(_first(metadata, _OP_NAME)).decode()
            if "/" in path:
                paths[op] = path
                found.append(path)
            elif bytes(_first(instruction, _INSTRUCTION_OPCODE)) == _FUSION:
                calls = _first(instruction, _INSTRUCTION_CALLS)
                fused.append((op, _varint(calls, 0)[0] if len(calls) else -1))
        for identity in _numbers(computation, _COMPUTATION_ID):
            inside[identity] = found
    for op, computation in fused:  # by most of what is in it
        if inside.get(computation):
            paths[op] = Counter(inside[computation]).most_common(1)[0][0]
    return paths


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    """Yield the numbers and values of a message's fields: bytes, or numbers (varints alone)."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(key & 7)
        if key & 7 == 2:
            size, at = _varint(message, at)
        if size is None or at + size > len(message):
            raise ValueError("no protocol buffer")
        yield key >> 3, message[at : at + size]
        at += size


def _all(message: memoryview, field: int) -> list[memoryview]:
    return [v for number, v in _fields(message) if number == field and not isinstance(v, int)]


def _numbers(message: memoryview, field: int) -> list[int]:
    return [v for number, v in _fields(message) if number == field and isinstance(v, int)]


def _first(message: memoryview, field: int) -> memoryview:
    return next(iter(_all(message, field)), message[:0])


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def main(argv: list[str]) -> None:
    """Print the table of the newest profile in a workdir.

    Raises:
        UserError: see `read`.
    """
    parser = Parser(
        prog="python -m gptoss_jax.training.profiling", description=(__doc__ or "").strip()
    )
    parser.add_argument("workdir", help="of a run that was profiled")
    folder = Path(parser.parse_args(argv).workdir)
    console = Console(highlight=False)
    show(read(folder / FOLDER if (folder / FOLDER).is_dir() else folder), console)


if __name__ == "__main__":
    run_entry(main)
