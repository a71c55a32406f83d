"""Run a function in several processes, for work that holds Python's lock.

`multiprocessing` would run the user's own script again in each process that it starts. These
processes import the function's module alone.
"""

from __future__ import annotations

import importlib
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from gptoss_jax.errors import UserError

_SERVE = "from gptoss_jax.data.workers import serve; serve()"


@contextmanager
def processes(
    function: Callable[[Any], Any], count: int
) -> Iterator[Callable[[Iterable[Any]], Iterator[Any]]]:
    """Start `count` processes; yield a `map` of `function` over items, in order.

    `function` is one of a module, and its arguments and results can be pickled. What it raises is
    raised here. The processes end with the block.

    Raises:
        UserError: a process ended early, as it does if memory runs out.
    """
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    # A process must not take an accelerator, and none of them needs one.
    environment = {**os.environ, "PYTHONPATH": paths, "JAX_PLATFORMS": "cpu"}
    name = (function.__module__, function.__qualname__)
    started: list[subprocess.Popen[bytes]] = []
    idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()

    def call(item: Any) -> Any:
        process = idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            pickle.dump((*name, item), process.stdin)
            process.stdin.flush()
            result = pickle.load(process.stdout)
        except (EOFError, OSError):
            raise UserError(
                "a process that checks the data ended early; is there enough memory?"
            ) from None
        finally:
            idle.put(process)
        if isinstance(result, Exception):
            raise result
        return result

    pool = ThreadPoolExecutor(count)
    try:
        for _ in range(count):
            command = [sys.executable, "-c", _SERVE]
            pipe = subprocess.PIPE
            started.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, env=environment))
            idle.put(started[-1])
        yield lambda items: pool.map(call, items)
    finally:
        for process in started:
            process.kill()
        pool.shutdown(cancel_futures=True)
        for process in started:
            process.wait()
            for stream in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):  # what a call had not yet sent
                    if stream is not None:
                        stream.close()


def serve() -> None:
    """Be one of the processes: answer calls from stdin on stdout, until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is for the process that started this one
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints must not come between the answers
    while True:
        try:
            module, name, item = pickle.load(calls)
        except EOFError:
            return
        try:
            result = getattr(importlib.import_module(module), name)(item)
        except Exception as error:
            result = error
        pickle.dump(result, answers)
        answers.flush()
