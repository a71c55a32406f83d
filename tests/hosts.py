"""Runs of several processes on this machine: for test_distributed and test_many_hosts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


class Processes:
    """Processes of one run, each with so many devices; what they say goes into files."""

    def __init__(
        self,
        command: list[str],
        *,
        folder: Path,
        count: int,
        devices: int = 1,
        launcher: Callable[[int], dict[str, str]] | None = None,
    ) -> None:
        """Start them, with the flags by which they find each other if there are several.

        Or with the variables, of each process, that a launcher sets.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        count_of_devices = "--xla_force_host_platform_device_count="
        flags = os.environ.get("XLA_FLAGS", "").split()
        flags = [flag for flag in flags if not flag.startswith(count_of_devices)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": " ".join([*flags, f"{count_of_devices}{devices}"]),
            "PYTHONPATH": str(ROOT),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._said = [folder / f"{i}.txt" for i in range(count)]
        self.all: list[subprocess.Popen[bytes]] = []
        for i, said in enumerate(self._said):
            flags = ["--distributed.coordinator", address, "--distributed.num-processes"]
            flags += [str(count), "--distributed.process-id", str(i)]
            flags = [] if launcher or count == 1 else flags
            with said.open("w") as file:
                self.all.append(
                    subprocess.Popen(
                        [*command, *flags],
                        stdout=file,
                        stderr=subprocess.STDOUT,
                        env=environment | (launcher(i) if launcher else {}),
                        cwd=ROOT,
                    )
                )

    def said(self, i: int) -> str:
        """Return what a process has said."""
        return self._said[i].read_text()

    def wait_until(self, reached, *, seconds: float = 240) -> None:
        """Wait for something to be so; fail if a process ends before."""
        end = time.monotonic() + seconds
        while not reached():
            ended = [i for i, p in enumerate(self.all) if p.poll() is not None]
            if ended or time.monotonic() > end:
                for p in self.all:
                    p.kill()
                i = ended[0] if ended else 0
                what = f"process {i} ended" if ended else f"nothing in {seconds} s"
                raise AssertionError(f"{what}: {self.said(i)[-3000:]}")
            time.sleep(0.05)

    def codes(self, *, seconds: float = 240) -> list[int]:
        """Wait for the end of all, and return their exit codes."""
        end = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, end - time.monotonic())) for p in self.all]
        finally:
            for p in self.all:
                p.kill()


def python(*args: str) -> list[str]:
    """Return the command that runs Python."""
    return [sys.executable, *args]
