"""One process at a time writes to a workdir; what is said when a disk can't be written."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from gptoss_jax.errors import UserError
from gptoss_jax.runs import workdir as workdirs
from gptoss_jax.runs.workdir import Hold, disk_error, log_event, write_text


def test_the_second_is_refused_by_name_and_changes_nothing(tmp_path):
    with Hold(tmp_path):
        text = (tmp_path / "lock").read_text()
        assert text.startswith(f"process {os.getpid()} on {socket.gethostname()} since 20")
        with pytest.raises(UserError) as caught, Hold(tmp_path):
            pass
        assert text.strip() in str(caught.value) and str(tmp_path) in str(caught.value)
        assert (tmp_path / "lock").read_text() == text
    assert list(tmp_path.iterdir()) == []
    with Hold(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path):
    code = f"from gptoss_jax.runs.workdir import Hold; import time\nwith Hold({str(tmp_path)!r}):"
    code += " print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"in use by process {process.pid} on "), Hold(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (tmp_path / "lock").exists()
    with Hold(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()


def test_a_folder_that_is_not_there_is_made_when_it_is_taken(tmp_path):
    folder = tmp_path / "a" / "b"
    with Hold(folder) as hold:
        assert not folder.exists()
        hold.take()
        assert (folder / "lock").exists()
        hold.take()
    with pytest.raises(UserError, match="another run has begun in"), Hold(tmp_path / "c") as hold:
        (tmp_path / "c" / "checkpoints" / "2").mkdir(parents=True)
        hold.take()


def test_many_at_once_never_hold_together(tmp_path):
    inside = tmp_path / "inside"

    def grab(_: int) -> int:
        held = 0
        for _ in range(300):
            with contextlib.suppress(UserError), Hold(tmp_path):
                os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside
                inside.unlink()
                held += 1
        return held

    # Locks by flock belong to the open file: threads are to each other as processes are.
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(grab, range(4))) > 4


def test_a_file_and_below_a_file(tmp_path):
    """Known before anything is read, and to one who only asks."""
    file = tmp_path / "file"
    file.write_text("x")
    for folder, match in (
        (file, "is a file: name a folder"),
        (file / "v" / "w", "can't be written: Not a directory; name another"),
    ):
        with pytest.raises(UserError, match=match), Hold(folder):
            pass
        with pytest.raises(UserError, match=match):
            Hold(folder).check()


def test_who_asks_takes_nothing(tmp_path, monkeypatch):
    Hold(tmp_path / "new" / "run").check()
    Hold(tmp_path).check()
    assert not list(tmp_path.iterdir())
    with Hold(tmp_path):
        with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
            Hold(tmp_path).check()
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
    (tmp_path / "lock").write_text("of a process that was killed\n")
    Hold(tmp_path).check()
    assert (tmp_path / "lock").read_text() == "of a process that was killed\n"
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path)  # root may write anywhere
    with pytest.raises(UserError, match="new/run can't be written: Permission denied"):
        Hold(tmp_path / "new" / "run").check()


def test_a_file_system_without_locks_will_do(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOTSUP, "no locks here")

    monkeypatch.setattr(workdirs.fcntl, "flock", no_locks)
    with Hold(tmp_path):
        pass


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    error.__cause__ = cause
    return error


def test_errors_of_the_disk_are_told_from_others(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    mine = OSError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    other = OSError(errno.EACCES, "Permission denied", "/elsewhere/data.jsonl")
    orbax = ValueError(f"Error writing {tmp_path}/checkpoints/4: No space left on device; more")
    assert disk_error(full, tmp_path) == "No space left on device"
    assert disk_error(mine, tmp_path) == "Permission denied"
    assert disk_error(orbax, tmp_path) == "No space left on device"
    assert disk_error(raised(RuntimeError("in a thread"), full), tmp_path) is not None
    for error in (other, ValueError("No space left on device"), KeyError("x"), None):
        assert disk_error(error, tmp_path) is None
    # It is said already.
    assert disk_error(raised(UserError("one line"), full), tmp_path) is None


def test_what_is_said_names_what_is_whole(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError) as caught, Hold(tmp_path):
        fail()
    assert "No space left on device; no checkpoint was saved yet" in str(caught.value)
    (tmp_path / "checkpoints" / "12").mkdir(parents=True)
    with pytest.raises(UserError, match="checkpoint 12 is whole, and the same command goes on"):  # noqa: SIM117
        with Hold(tmp_path):
            fail()
    with pytest.raises(KeyError), Hold(tmp_path):
        raise KeyError("not of the disk")


def test_files_are_written_whole_and_events_appended(tmp_path):
    path = tmp_path / "config.json"
    write_text(path, "one")
    write_text(path, "two")
    assert path.read_text() == "two" and list(tmp_path.iterdir()) == [path]
    log_event(tmp_path, "rewind", step=4, why="its loss is nan")
    log_event(tmp_path, "damaged", step=2)
    lines = [json.loads(x) for x in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(x["event"], x["step"]) for x in lines] == [("rewind", 4), ("damaged", 2)]
    assert lines[0]["why"] == "its loss is nan" and lines[0]["time"].startswith("20")
