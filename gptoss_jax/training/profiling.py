"""Profile a few training steps, for XProf: see docs/profiling.md."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from gptoss_jax.config import TrainConfig

FOLDER = "profile"
STEP = "train"  # the name of a step's annotation in a trace


class Window:
    """Records the steps that the config asks for, while the training loop runs.

    Call `begin` before and `end` after each step; outside the window they do nothing. A run that
    resumes inside its window records the rest of it, and a run that ends inside it the steps so
    far. An error in recording is printed; it never stops the run.
    """

    def __init__(self, config: TrainConfig, workdir: str | Path, console: Console) -> None:
        """Take the window from `profile_start` and `profile_steps`; nothing is written yet."""
        self._folder, self._console = Path(workdir) / FOLDER, console
        first = config.profile_start
        self._steps = range(first, first + config.profile_steps) if first else range(0)
        self._running, self._done, self._recorded = False, False, 0
        self._step: Any = None

    def begin(self, step: int, state: Any) -> None:
        """Start recording at the window's first step, after the device has computed `state`."""
        if self._running and step not in self._steps:  # the run went back to before its window
            jax.block_until_ready(state)
            self.close()
        if step not in self._steps or self._done:
            return
        if not self._running:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # it slows the host, and its frames hide other events
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                jax.profiler.start_trace(str(self._folder), profiler_options=options)
            except (OSError, RuntimeError) as error:
                self._fail(error)
                return
            self._running = True
        self._recorded += 1
        self._step = jax.profiler.StepTraceAnnotation(STEP, step_num=step)
        self._step.__enter__()

    def end(self, step: int, state: Any) -> float:
        """Stop after the window's last step, whose result is `state`, and print how to open it.

        Returns the seconds that writing the profile took, which do not count as the step's time.
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
        """Write the recording, unless that is done. The loop calls it at the end, however it ends.

        The profile lacks what the device has not done by then.
        """
        if not self._running:
            return
        self._running, self._done = False, True
        try:
            jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:
            self._fail(error)
            return
        command = f"xprof --logdir {shlex.quote(str(self._folder))}"
        for line in (
            f"profile   {self._folder}, steps recorded: {self._recorded}; open it with XProf:",
            f"          pip install xprof, then {command}; docs/profiling.md says more",
        ):
            self._console.print(line, soft_wrap=True, markup=False)

    def _fail(self, error: Exception) -> None:
        self._done = True
        reason = str(error).splitlines()[0]
        self._console.print(f"no profile: {reason}", soft_wrap=True, markup=False)
