"""A run's folder: the lock on it, its log of events, and messages if it can't be written."""

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

# Errors of the disk or of access rights: no fault of the program.
_DISK = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG,
    errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE,
)  # fmt: skip


class Hold:
    """The lock on a workdir, a context manager: one run at a time may write to the folder.

    It locks the file `lock` in the workdir with `flock`, and writes into it which process holds it.
    The system releases the lock when the process ends for any reason. If the folder exists, `with`
    takes the lock at once, so that nothing is read while another run writes. If it does not, `take`
    makes the folder and takes the lock.

    In a run of several processes the first one holds the lock for all; the others check that they
    see the same folder. `with` turns disk errors into a UserError that names the last complete
    checkpoint.
    """

    def __init__(self, workdir: str | Path) -> None:
        """Remember the folder; write nothing yet."""
        self.workdir = Path(workdir)
        self._path = self.workdir / LOCK
        self._file: int | None = None
        self._is_new = self._is_shared = False

    def __enter__(self) -> Hold:
        """Take the lock if the folder exists.

        Raises:
            UserError: another run has it, or the folder can't be written or made.
        """
        self._share(processes.from_first(self._enter))
        return self

    def _enter(self) -> str | None:
        self._is_new = not self.workdir.is_dir()
        if self._is_new:
            self._check_place()
        return None if self._is_new else self._take()

    def check(self) -> None:
        """Refuse the workdirs that a run can't take, without taking or writing anything.

        To see whether another run holds the lock, it takes a shared one for a moment.

        Raises:
            UserError: as `with` and `take`, in the same words; but a disk may still get full.
        """

        def check() -> None:
            self._check_place()
            try:
                file = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                return
            except OSError as error:
                raise self._cannot_write(error.strerror) from None
            try:
                self._flock(file, fcntl.LOCK_SH)
            finally:
                os.close(file)

        processes.from_first(check)

    def _check_place(self) -> None:
        """Refuse a workdir that is a file, or that this user can't write."""
        if self.workdir.exists() and not self.workdir.is_dir():
            raise UserError(f"the workdir {self.workdir} is a file: name a folder")
        there = self.workdir.absolute()
        while not there.exists():  # the nearest folder that is there, in which others are made
            there = there.parent
        if not there.is_dir():
            raise self._cannot_write(os.strerror(errno.ENOTDIR))
        if os.statvfs(there).f_flag & os.ST_RDONLY:
            raise self._cannot_write(os.strerror(errno.EROFS))
        if not os.access(there, os.W_OK | os.X_OK):
            raise self._cannot_write(os.strerror(errno.EACCES))

    def _cannot_write(self, why: str | None) -> UserError:
        return UserError(
            f"the workdir {self.workdir} can't be written: {why}; name another with --workdir"
        )

    def take(self) -> None:
        """Make the folder and take the lock, unless this already has it.

        Raises:
            UserError: another process has the lock, another run has started in the folder since,
                the folder can't be written, or another host does not see it.
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
        """Take the lock, and return the text of its file."""
        if self._file is not None:
            return os.pread(self._file, 1000, 0).decode(errors="replace")
        try:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self._file = self._lock()
        except OSError as error:
            raise self._cannot_write(error.strerror) from None
        if self._is_new and records.steps(self.workdir):
            raise UserError(
                f"another run has begun in {self.workdir}: give the same command again to continue "
                "it"
            )
        return os.pread(self._file, 1000, 0).decode(errors="replace")

    def _lock(self) -> int:
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                locked = self._flock(file, fcntl.LOCK_EX)
            except BaseException:
                os.close(file)
                raise
            if not locked:
                return file  # run without a lock rather than not at all
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

    def _flock(self, file: int, kind: int) -> bool:
        """Lock an open file; return False if its file system has no locks.

        Raises UserError if another process has the lock.
        """
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
            raise UserError(
                f"the workdir {self.workdir} is in use by {holder or 'another process'}; "
                "wait for its end, or name another with --workdir"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                raise
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Release the lock, and turn disk errors into one line."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # a file that stays blocks nobody
                # While the lock is still held, so that this can't remove another run's file.
                self._path.unlink()
            os.close(self._file)
            self._file = None
        reason = disk_error(error, self.workdir)
        if reason:
            kept = records.steps(self.workdir)
            if kept:
                after = f"checkpoint {kept[-1]} is whole, and the same command goes on from it"
            else:
                after = "no checkpoint was saved yet, and the same command starts again"
            raise UserError(
                f"the workdir {self.workdir} can't be written: {reason}; {after} once that is put "
                "right"
            ) from error


def _read(path: Path) -> str:
    return path.read_bytes()[:1000].decode(errors="replace")


def _is_at(path: Path, file: int) -> bool:
    """Return whether an open file is still the one at `path`."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file))
    except FileNotFoundError:
        return False


def disk_error(error: BaseException | None, workdir: Path) -> str | None:
    """Return the system's message if writing to a workdir's disk caused `error`, else None.

    It follows the chain of causes, and searches messages too: orbax's own errors keep no errno.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen and not isinstance(error, UserError):
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _DISK:
            # An error of another file, such as data, is not the workdir's; `write` names no file.
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
    """Replace a file of a workdir as a whole, or not at all; only the first process writes."""
    if not processes.is_first():
        return
    new = path.with_name(path.name + ".tmp")
    new.write_text(text)
    os.replace(new, path)


def log_event(workdir: str | Path, event: str, *, step: int, **values: Any) -> None:
    """Append an event of the run to `events.jsonl`: {"time", "event", "step", ...}.

    Entries are never removed: if a killed run repeats steps, their events appear twice. Only the
    first process writes.
    """
    if not processes.is_first():
        return
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record = {"time": now, "event": event, "step": step, **values}
    with (Path(workdir) / EVENTS).open("a") as file:
        file.write(json.dumps(record) + "\n")
