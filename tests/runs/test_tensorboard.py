"""TensorBoard's files hold what was written, and a full disk is an error at once."""

from __future__ import annotations

import contextlib
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from gptoss_jax.runs.tensorboard import Board


def read(path):
    """Read the events of a file: length (8 bytes), its CRC (4), the event, its CRC (4)."""
    raw, at, events = path.read_bytes(), 0, []
    while at < len(raw):
        (size,) = struct.unpack_from("<Q", raw, at)
        events.append(Event.FromString(raw[at + 12 : at + 12 + size]))
        at += size + 16
    return events


def test_what_is_written_is_in_the_file(tmp_path):
    for purge_step in (0, 3):  # at once after each other: two files
        board = Board(tmp_path / "b", purge_step=purge_step)
        board.add("loss", 2.5, step=purge_step + 1)
        board.add("source/a b/loss", 0.25, step=purge_step + 1)
        board.close()
    files = sorted((tmp_path / "b").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    assert len(files) == 2 and all("tfevents" in p.name for p in files)
    events = read(files[1])
    assert events[0].file_version == "brain.Event:2"
    assert [e.step for e in events if e.HasField("session_log")] == [3]
    values = [(v.tag, v.simple_value, e.step) for e in events for v in e.summary.value]
    assert values == [("loss", 2.5, 4), ("source/a_b/loss", 0.25, 4)]
    np.testing.assert_array_less(1.7e9, [e.wall_time for e in events[-2:]])


def test_a_full_disk_is_an_error_of_whoever_writes(tmp_path):
    board = Board(tmp_path, purge_step=0)
    with contextlib.suppress(OSError), open("/dev/full", "wb") as full:
        board._writer._py_recordio_writer._writer = full
        with pytest.raises(OSError, match="No space left"):
            for step in range(1000):  # what is buffered is written sooner or later
                board.add("loss", 1.0, step=step)
