"""TensorBoard's event files."""

from __future__ import annotations

import os
import time
from pathlib import Path

_FLUSH_SECONDS = 10.0  # each flush waits for the disk


class Board:
    """Appends numbers to a TensorBoard event file.

    The caller's own thread writes the file. The thread of tensorboardX's SummaryWriter would die
    when the disk is full, and then each writer would wait for it for ever.
    """

    def __init__(self, folder: str | Path, *, purge_step: int) -> None:
        """Start a file; TensorBoard then hides the steps from `purge_step` on in earlier files."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

        Path(folder).mkdir(parents=True, exist_ok=True)
        # tensorboardX's file name has only the time in seconds. The suffix keeps a run that is
        # restarted at once from overwriting the file.
        suffix = f".{os.getpid()}.{time.time_ns() % 10**9}"
        self._writer = EventsWriter(str(Path(folder) / "events"), suffix)
        start = SessionLog(status=SessionLog.START)
        self._writer.write_event(Event(step=purge_step, file_version="brain.Event:2"))
        self._writer.write_event(Event(step=purge_step, session_log=start))
        self._flushed = time.monotonic()

    def add(self, name: str, value: float, *, step: int) -> None:
        """Append one number. Raises OSError when the disk is full, now or later."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboardX.summary import scalar

        summary = scalar(name, value)
        self._writer.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
