"""Several processes as one run: they find each other, agree, stop and end together.

This module uses `jax.distributed` and adds:
- It decides whether there are several processes at all, so that a process alone never waits.
- An error is reported in one line.
- If one process ends with an error or is killed, the others end too. They watch JAX's key-value
  store for errors, and JAX's heartbeats find processes that died silently.

Call these functions from one thread of each process, in the same order on all processes.

Three methods here are unusual, because jax 0.10 to 0.12 have no public way:
- The client of the key-value store comes from `jax._src`. `multihost_utils` passes arrays by
  programs on the devices: it can't be used from a second thread or before there are devices, and it
  waits for a process that has failed.
- The handler of SIGABRT is set by ctypes. If a process has lost another, JAX calls `abort` in a
  thread of its own. A Python handler would run only in the main thread, which waits for the others.
- pickle is used only between the processes of one run. It passes exceptions, which callers catch by
  their type, and paths, records and arrays.
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

HEARTBEAT_SECONDS = 30  # JAX considers a process dead after this time without a heartbeat
_DAY_MS = 24 * 3600 * 1000  # a timeout: JAX ends the process long before if another is gone
_GO_ON = "the same command goes on from the newest checkpoint"
_ENDED = "gptoss_jax/ended"  # key of the message from the first process that failed
# Error messages of collectives and of JAX's services when another process is gone.
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
_calls = 0  # number of calls that all processes make in the same order
_ending = threading.Lock()  # its holder reports why this process ends
_last: tuple[str | None, int] = (None, 1)  # the reported message, and the exit code


def index() -> int:
    """Return the number of this process, from 0."""
    return _job.process if _job else 0


def count() -> int:
    """Return the number of processes of the run."""
    return _job.processes if _job else 1


def is_first() -> bool:
    """Return whether this is the process that logs, prints and writes."""
    return index() == 0


# --- Beginning and end ------------------------------------------------------------------------


@contextlib.contextmanager
def start(config: DistributedConfig) -> Iterator[None]:
    """Join the processes of this run, if it has several. Call it before JAX looks for devices.

    If an exception leaves the `with` block on one process, all processes end within seconds, with
    one line that names the process. If a process dies silently, the others end within a minute.

    Raises:
        UserError: Some but not all of the three flags are given, or the other processes were not
            found in `wait_seconds`.
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
    """Connect, or end the process: JAX aborts it on a timeout, so this gives up earlier."""
    options = launchers.options(kind, os.environ)
    if kind == "flags":
        options = {
            "coordinator_address": config.coordinator,
            "num_processes": config.num_processes,
            "process_id": config.process_id,
            "cluster_detection_method": "deactivate",  # or JAX would look for `local_device_ids`
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
        message = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"the processes of this run can't be joined ({kind}): {message}") from None
    finally:
        timer.cancel()


def unwinding(_kind: Any, error: BaseException | None, _trace: Any) -> None:
    """Fail after 20 seconds, even if something is still being closed: for an `ExitStack`'s `push`.

    If an error ends one of several processes, closing its resources may wait for the others.
    """
    if _job and error is not None:
        timer = threading.Timer(20, _fail, args=(_job, error))
        timer.daemon = True
        timer.start()


def _give_up(config: DistributedConfig) -> None:
    where, number = config.coordinator or "the coordinator", config.num_processes
    text = f"not all {number or ''} processes joined in {config.wait_seconds} s".replace("  ", " ")
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
                return  # the main thread already reports an error
            _follow(job, ended)


def _read_end(job: _Job) -> _End | None:
    try:
        return _End(*pickle.loads(job.client.key_value_try_get_bytes(_ENDED)))
    except Exception as error:
        if "NOT_FOUND" in str(error):
            return None
        raise


def _follow(job: _Job, ended: _End) -> NoReturn:
    """End because another process did; the first process repeats its message."""
    text = f"process {ended.process}: {ended.text}" if job.process == 0 else None
    _leave(job, text, ended.code)


def _fail(job: _Job, error: BaseException) -> None:
    """Tell the others that this process failed, and end it; do nothing on an exit without error."""
    global _last
    if isinstance(error, SystemExit) and error.code in (None, 0):
        return
    if not _ending.acquire(blocking=False):
        time.sleep(60)  # the watcher already ends this process
    code, text = _describe(job, error)
    reported = isinstance(error, SystemExit)  # whoever raised it has printed the message
    _last = (None if reported else f"{_me(job.process)}{text}", code)
    if job.process:
        time.sleep(1)  # so that the first process reports an error that all have
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
    """Return the exit code and a one-line message for an exception."""
    if isinstance(error, UserError):
        return 2, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else 1
        return code, f"ended with exit code {code}"
    message = (str(error).strip().splitlines() or [""])[0][:200]
    if _is_lost(error):
        return 1, f"another of the {job.processes} processes is gone ({message}); {_GO_ON}"
    return 1, f"{type(error).__name__}: {message}"


def _is_lost(error: BaseException) -> bool:
    return not isinstance(error, UserError) and _LOST.search(str(error)) is not None


def _leave(job: _Job, text: str | None, code: int) -> NoReturn:
    """Wait until all live processes know, and end; the first process ends last, as the server."""
    with contextlib.suppress(Exception):
        job.client.wait_at_barrier("gptoss_jax/leave", 10_000)
    if job.process == 0:
        time.sleep(1)
    _exit(text, code)


def _exit(text: str | None, code: int) -> NoReturn:
    """End immediately: Python's normal exit would wait for processes that are gone."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    if text is not None:
        with contextlib.suppress(Exception):
            print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(_: int) -> None:
    """Explain JAX's report in one line: JAX aborts a process that has lost another."""
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

    Use it for decisions that depend on a disk, so that all processes see the same state of it.
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
    """Call `do()` on every process, and return its own result on each; all wait for all.

    If `do()` raises on some processes, all raise the exception of the lowest-numbered one.
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
    """Raise UserError on all processes if `values` differ from those of the first process.

    `what` names the values in the error, such as "the config".
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
        pickle.loads(packed)  # some exceptions can be pickled, but not unpickled
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
    """Return whether all processes stop after this iteration, because one of them got SIGTERM.

    In a run of several processes, call it once per iteration on each. Normally it only reads a
    number. After the signal it waits once, until all processes know at which iteration to stop. For
    this, JAX itself handles SIGTERM from the start.
    """
    return multihost_utils.reached_preemption_sync_point(iteration)
