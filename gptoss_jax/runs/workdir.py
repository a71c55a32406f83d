"""A run's folder: who may write to it, what happened in it, and what is said if it can't be."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from gptoss_jax.errors import UserError
from gptoss_jax.parallel.hosts import processes
from gptoss_jax.runs import records

LOCK = "lock"
EVENTS = "events.jsonl"

# What is wrong with a disk or with rights to it, and no fault of the program.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG,
    errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE,
)  # fmt: skip


class Hold:
    """The right to write to a workdir, which one process at a time has: for `with`.

    It is a lock by `flock` on the file `lock` in it, which names the process; the system lets go of
    it when the process ends, however that may be. Taken at once where the folder is there, so that
    nothing of a run under way is read; where it is not, `take` makes it.

    Of a run of several processes the first one has it for all; the others see to it that they see
    the same folder. Errors of the disk that come out of the `with` become a UserError that says
    what is whole.
    """

    def __init__(self, workdir: str | Path) -> None:
        """Name the folder; nothing is written yet."""
        self.workdir = Path(workdir)
        self._path = self.workdir / LOCK
        self._file: int | None = None
        self._is_new = self._is_shared = False

    def __enter__(self) -> Hold:
        """Take the lock if the folder is there. Raises `UserError` if another run has it."""
        self._share(processes.from_first(self._enter))
        return self

    def _enter(self) -> str | None:
        if self.workdir.exists() and not self.workdir.is_dir():
            raise UserError(f"the workdir {self.workdir} is a file: name a folder")
        self._is_new = not self.workdir.is_dir()
        return None if self._is_new else self._take()

    def take(self) -> None:
        """Make the folder and take the lock, if that was not done.

        Raises:
            UserError: another process has it, or a run has begun since, or it can't be written; or
                another host does not see it.
        """
        self._share(processes.from_first(self._take))

    def _share(self, text: str | None) -> None:
        if text is not None and not self._is_shared:
            processes.together(lambda: self._check_shared(text))
            self._is_shared = True

    def _check_shared(self, text: str) -> None:
        for _ in range(20):  # a network's file systems may show a new file late
            with contextlib.suppress(OSError):
                if processes.is_first() or _read(self._path) == text:
                    return
            time.sleep(0.5)
        raise UserError(
            f"process {processes.index()}, on {socket.gethostname()}, does not see the workdir "
            f"{self.workdir.absolute()} of process 0: name one with --workdir that lies on a disk "
            "which all hosts share"
        )

    def _take(self) -> str:
        """Take the lock, and return what its file says."""
        if self._file is not None:
            return os.pread(self._file, 1000, 0).decode(errors="replace")
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = self._lock()
        except OSError as error:
            raise UserError(
                f"the workdir {self.workdir} can't be written: {error.strerror}; "
                "name another with --workdir"
            ) from None
        if self._is_new and records.steps(self.workdir):
            raise UserError(f"another run has begun in {self.workdir}: the same command goes on")
        return os.pread(self._file, 1000, 0).decode(errors="replace")

    def _lock(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = os.pread(file, 1000, 0).decode(errors="replace").strip()
                os.close(file)
                raise UserError(
                    f"the workdir {self.workdir} is in use by {said or 'another process'}; "
                    "wait for its end, or name another with --workdir"
                ) from None
            except OSError as error:
                if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                    os.close(file)
                    raise
                return file  # a file system without locks: better unguarded than of no use
            if _is_at(self._path, file):
                break
            os.close(file)  # its holder removed it between the two calls
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        try:
            os.ftruncate(file, 0)
            text = f"process {os.getpid()} on {socket.gethostname()} since {since}\n"
            os.pwrite(file, text.encode(), 0)
        except OSError:
            os.close(file)
            raise
        return file

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Let go, and turn errors of the disk into one line."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # then it stays, and holds nobody up
                self._path.unlink()  # before the lock goes, so that nobody else's is removed
            os.close(self._file)
            self._file = None
        said = disk_error(error, self.workdir)
        if said:
            kept = records.steps(self.workdir)
            if kept:
                after = f"checkpoint {kept[-1]} is whole, and the same command goes on from it"
            else:
                after = "no checkpoint was saved yet, and the same command starts again"
            raise UserError(
                f"the workdir {self.workdir} can't be written: {said}; {after} once that is put "
                "right"
            ) from error


def _read(path: Path) -> str:
    return path.read_bytes()[:1000].decode(errors="replace")


def _is_at(path: Path, file: int) -> bool:
    """Say whether an open file is still the one that a path names."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def disk_error(error: BaseException | None, workdir: Path) -> str | None:
    """Return what the system said if an exception comes of writing to a workdir's disk, else None.

    Looks at what it was raised from, too, and at texts: orbax's own errors keep no number.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK:
            # Of another file, such as data, it is not for here; `write` names none.
            names = [n for n in (error.filename, error.filename2) if isinstance(n, str)]
            if not names or any(_is_within(Path(n), workdir) for n in names):
                return error.strerror
        elif not isinstance(error, OSError) and str(workdir.absolute()) in str(error):
            for number in _DISK:
                if os.strerror(number) in str(error):
                    return os.strerror(number)
        error = error.__cause__ or error.__context__
    return None


def _is_within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())


def write_text(path: Path, text: str) -> None:
    """Write a file of a workdir whole, or leave the one that is there; the first process does."""
    if not processes.is_first():
        return
    new = path.with_name(path.name + ".tmp")
    new.write_text(text)
    os.replace(new, path)


def log_event(workdir: str | Path, event: str, *, step: int, **values: Any) -> None:
    """Append to `events.jsonl` what happened to a run: {"time", "event", "step", ...}.

    Nothing is ever taken out of it: what a run did again after it was killed is there twice. The
    first process writes it.
    """
    if not processes.is_first():
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"time": now, "event": event, "step": step, **values}
    with (Path(workdir) / EVENTS).open("a") as file:
        file.write(json.dumps(record) + "\n")
