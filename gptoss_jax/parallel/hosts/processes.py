"""Several processes as one run: how they find each other, agree, stop, and end together.

It is `jax.distributed`. What is added: whether it is wanted at all, so that a process alone never
waits for others; one line for what goes wrong; and that where one process ends with an error, or is
killed, the others end too. They watch JAX's key-value store for that, and JAX's own heartbeats find
what died without a word. All of it is for one thread of each process, in the same order on all.

Three things here are not public, and jax 0.10 to 0.12 have nothing public in their place:
- The client of the key-value store, from `jax._src`. `multihost_utils` passes arrays by programs on
  the devices: it can't be asked from a second thread, nor before there are devices, and waits for a
  process that has failed.
- The handler of SIGABRT, by ctypes. JAX calls `abort` where a process has lost another, in a thread
  of its own; a handler in Python runs in the main thread alone, which waits for the others.
- pickle, between the processes of one run alone: what is passed are exceptions, which callers catch
  by their type, paths, records and arrays.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn, TypeVar

import jax
from jax.experimental import multihost_utils

from gptoss_jax.config import DistributedConfig
from gptoss_jax.errors import UserError
from gptoss_jax.parallel.hosts import launchers

T = TypeVar("T")

HEARTBEAT_SECONDS = 30  # without a sign of life, after which JAX takes a process for dead
_DAY_MS = 24 * 3600 * 1000  # JAX ends the process long before, where another is gone
_GO_ON = "the same command goes on from the newest checkpoint"
_ENDED = "gptoss_jax/ended"  # key of what the first process to fail said
# What collectives and JAX's services say when a process at the other end is gone.
_LOST = re.compile(
    r"Gloo .* failed|Connection (closed|reset)|Socket closed|NCCL|coordination service"
)


class _Job(NamedTuple):
    client: Any  # of JAX's key-value store
    process: int
    processes: int


class _End(NamedTuple):
    process: int
    code: int
    text: str


_job: _Job | None = None  # None: this process is alone
_calls = 0  # of what all processes call in the same order
_ending = threading.Lock()  # who has it says why this process ends
_last: tuple[str | None, int] = (None, 1)  # what that is, and the exit code


def index() -> int:
    """Return the number of this process, from 0."""
    return _job.process if _job else 0


def count() -> int:
    """Return how many processes the run has."""
    return _job.processes if _job else 1


def is_first() -> bool:
    """Say whether this is the process that logs, prints and writes."""
    return index() == 0


# --- Beginning and end ------------------------------------------------------------------------


@contextlib.contextmanager
def start(config: DistributedConfig) -> Iterator[None]:
    """Join the processes of this run, if it has several, before JAX looks for devices.

    An exception that leaves the `with` on one of them ends all of them within seconds, with one
    line that says which process it was; a process that dies without a word within a minute.

    Raises:
        UserError: not all of the three flags, or the others were not found in `wait_seconds`.
    """
    global _job
    kind = launchers.find(config, os.environ)
    if kind is None or jax.distributed.is_initialized():
        yield
        return
    _handle_abort()
    _initialize(config, kind)
    from jax._src.distributed import global_state

    _job = _Job(global_state.client, global_state.process_id, int(global_state.num_processes))
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(_job, over), daemon=True)
    watcher.start()
    try:
        same({"processes": _job.processes}, "--distributed.num-processes")
        yield
    except BaseException as error:
        _fail(_job, error)
    over.set()
    watcher.join()
    jax.distributed.shutdown()  # waits for the others
    _job = None


def _initialize(config: DistributedConfig, kind: str) -> None:
    """Connect, or end: where JAX gives up it aborts the process, so this gives up before it."""
    options = launchers.options(kind, os.environ)
    if kind == "flags":
        options = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",  # else it looks for `local_device_ids`
        }
    if "JAX_CPU_COLLECTIVES_IMPLEMENTATION" not in os.environ:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    timer = threading.Timer(config.wait_seconds, _give_up, args=(config,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **options,
            initialization_timeout=config.wait_seconds + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=600,  # the first process writes its report meanwhile
        )
    except Exception as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the processes of this run can't be joined ({kind}): {said}") from None
    finally:
        timer.cancel()


def unwinding(_kind: Any, error: BaseException | None, _trace: Any) -> None:
    """Fail in 20 seconds, whatever is still being closed: for an `ExitStack`'s `push`.

    Where an error ends one of several processes, what it closes may wait for the others.
    """
    if _job and error is not None:
        timer = threading.Timer(20, _fail, args=(_job, error))
        timer.daemon = True
        timer.start()


def _give_up(config: DistributedConfig) -> None:
    where, number = config.coordinator or "the coordinator", config.num_processes
    text = f"not all {number or ''} processes came in {config.wait_seconds} s".replace("  ", " ")
    if config.coordinator and config.process_id:
        host, _, port = config.coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            text = f"{where} was not reached in {config.wait_seconds} s ({error})"
    _ending.acquire()
    _exit(f"{_me(config.process_id)}{text}; start all of them, with the same coordinator", 2)


def _me(i: int | None) -> str:
    return f"process {i}: " if i else ""


def _watch(job: _Job, over: threading.Event) -> None:
    """End this process when another has failed."""
    silent = 0
    while not over.wait(1):
        try:
            ended = _read_end(job)
        except Exception:  # JAX ends the process itself if the coordinator is gone for good
            silent += 1
            if silent > HEARTBEAT_SECONDS:
                _ending.acquire()
                _exit(f"{_me(job.process)}process 0 does not answer; {_GO_ON}", 1)
            continue
        silent = 0
        if ended and ended.process != job.process and not over.is_set():
            if not _ending.acquire(blocking=False):
                return  # the main thread has found it too
            _follow(job, ended)


def _read_end(job: _Job) -> _End | None:
    try:
        return _End(*pickle.loads(job.client.key_value_try_get_bytes(_ENDED)))
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _follow(job: _Job, ended: _End) -> NoReturn:
    """End because another process did; the first one repeats what it said."""
    text = f"process {ended.process}: {ended.text}" if job.process == 0 else None
    _leave(job, text, ended.code)


def _fail(job: _Job, error: BaseException) -> None:
    """Tell the others that this process fails, and end it; not for an exit without an error."""
    global _last
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the watcher is at it
    code, text = _describe(job, error)
    said = isinstance(error, SystemExit)  # by whoever raised it
    _last = (None if said else f"{_me(job.process)}{text}", code)
    if job.process:
        time.sleep(1)  # what all of them find, the first one says
    try:
        job.client.key_value_set_bytes(_ENDED, pickle.dumps((job.process, code, text)))
    except Exception:
        with contextlib.suppress(Exception):
            ended = _read_end(job)
            if ended:
                _follow(job, ended)
    if not isinstance(error, UserError | SystemExit | KeyboardInterrupt) and not _is_lost(error):
        traceback.print_exception(error)
    _leave(job, _last[0] if job.process == 0 else f"{_me(job.process)}{text}", code)


def _describe(job: _Job, error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line for an exception."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, f"ended with exit code {code}"
    said = (str(error).strip().splitlines() or [""])[0][:200]
    if _is_lost(error):
        return 1, f"another of the {job.processes} processes is gone ({said}); {_GO_ON}"
    return 1, f"{type(error).__name__}: {said}"


def _is_lost(error: BaseException) -> bool:
    return not isinstance(error, UserError) and _LOST.search(str(error)) is not None


def _leave(job: _Job, text: str | None, code: int) -> NoReturn:
    """Wait until all that live know, and end; the first process last, for it serves them."""
    with contextlib.suppress(Exception):
        job.client.wait_at_barrier("gptoss_jax/leave", 10_000)
    if job.process == 0:
        time.sleep(1)
    _exit(text, code)


def _exit(text: str | None, code: int) -> NoReturn:
    """End at once: Python's own end would wait for processes that are gone."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if text is not None:
        with contextlib.suppress(Exception):
            print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Say in a line what JAX's report is about: it aborts a process that has lost another."""
    if not _ending.acquire(blocking=False):
        _exit(*_last)
    text = "JAX could not join the processes of this run"
    if _job:
        text = f"{_me(_job.process)}another of the {_job.processes} processes is gone; {_GO_ON}"
    _exit(f"{text} (JAX's report is above)", 1)


def _handle_abort() -> None:
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _aborted)


# --- Agreement --------------------------------------------------------------------------------


def from_first(do: Callable[[], T]) -> T:
    """Return on every process what `do()` returns on the first, or raise what it raises there.

    For what is read from a disk and decided by: no two processes see another state of it.
    """
    if _job is None:
        return do()
    key = _next_key()
    if _job.process == 0:
        ok, value = _tried(do)
        _job.client.key_value_set_bytes(key, _packed(ok, value))
    else:
        ok, value = pickle.loads(_job.client.blocking_key_value_get_bytes(key, _DAY_MS))
    if not ok:
        raise value
    return value


def together(do: Callable[[], T]) -> T:
    """Call `do()` on every process, and return what it returns; all wait for all.

    Where it raises on some, all raise what the one of the lowest number does.
    """
    if _job is None:
        return do()
    client, key, number = _job.client, _next_key(), _job.processes
    ok, value = _tried(do)
    client.key_value_set_bytes(f"{key}/{_job.process}", _packed(ok, None if ok else value))

    def raise_first() -> None:
        for i in range(number):
            ok, error = pickle.loads(client.blocking_key_value_get_bytes(f"{key}/{i}", _DAY_MS))
            if not ok:
                raise error

    from_first(raise_first)
    return value


def same(values: Mapping[str, Any], what: str) -> None:
    """Refuse `values` that are not those of the first process. Raises UserError on all.

    `what` is what they belong to, such as "the config".
    """
    if _job is None:
        return
    first = from_first(lambda: dict(values))
    differ = [k for k in {**first, **values} if first.get(k) != values.get(k)]

    def check() -> None:
        if differ:
            k = differ[0]
            raise UserError(
                f"{what} is not the same on all processes: {k} is {first.get(k)!r} on process 0, "
                f"and {values.get(k)!r} on process {index()}"
            )

    together(check)


def _tried(do: Callable[[], Any]) -> tuple[bool, Any]:
    try:
        return True, do()
    except Exception as error:
        return False, error


def _packed(ok: bool, value: Any) -> bytes:
    try:
        packed = pickle.dumps((ok, value))
        pickle.loads(packed)  # some exceptions can be written, and not read
        return packed
    except Exception:
        if ok:
            raise
        return pickle.dumps((False, RuntimeError(f"{type(value).__name__}: {value}")))


def _next_key() -> str:
    global _calls
    _calls += 1
    return f"gptoss_jax/{_calls}"


def stop_now(iteration: int) -> bool:
    """Say whether all processes stop after this iteration, since one of them was sent SIGTERM.

    For a run of several processes, once an iteration on each: it looks at a number, and waits for
    the others only once, when the signal came, until all know at which iteration to stop. JAX takes
    SIGTERM itself for this, from the beginning on.
    """
    return multihost_utils.reached_preemption_sync_point(iteration)
