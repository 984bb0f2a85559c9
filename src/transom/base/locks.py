"""Locks on folders, so that one process at a time writes into a folder. No torch.

A lock is `flock` on a hidden file beside the folder, so that the folder itself can be made, emptied
and renamed. The system releases it when the process ends.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transom.base.errors import RequestError, notice

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EBADF)
WAIT_SECONDS = 0.2  # between two attempts to lock a folder that another process has locked
ATTEMPTS = 100  # to lock a file that other processes remove meanwhile


class FolderLock:
    """The right to write into a folder, until `release` or the end of the block or process.

    Within one process a folder can be locked again, and a folder below a locked one is locked with
    it.

    Args:
        folder: The folder, which need not exist.
        wait: Wait until another process has released the folder.

    Raises:
        RequestError: If another process has locked the folder, unless `wait`.
    """

    def __init__(self, folder: str | Path, *, wait: bool = False) -> None:
        path = Path(folder).resolve()
        with _GUARD:
            lock = next((_LOCKS[one] for one in (path, *path.parents) if one in _LOCKS), None)
            if lock is None:
                lock = _LOCKS[path] = _acquire(path, Path(folder), wait)
            lock.users += 1
        self._lock: _Lock | None = lock

    def release(self) -> None:
        """Release the folder; a second call does nothing."""
        with _GUARD:
            lock, self._lock = self._lock, None
            if lock is None:
                return
            lock.users -= 1
            if lock.users == 0:
                _LOCKS.pop(lock.folder, None)
                lock.unlock()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def output_folder(folder: Path, overwrite: bool) -> Iterator[None]:
    """Lock the folder that a command writes.

    Args:
        folder: The folder.
        overwrite: Whether it may contain files.

    Raises:
        RequestError: If the folder is a file or, without `overwrite`, not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"OUT: got {str(folder)!r}, a file; expected a new or empty folder")
    with FolderLock(folder):
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            expected = "expected a new or empty folder, or --overwrite"
            raise RequestError(f"OUT: got {str(folder)!r}, which is not empty; {expected}")
        yield


@dataclass
class _Lock:
    """A folder that this process has locked or tries to lock.

    Attributes:
        folder: The folder.
        descriptor: That of the locked file; None where the file system has no locks.
        made: Parent folders that were made for the file, the innermost last.
        process: The process that has the lock.
        users: The number of `FolderLock` objects.
    """

    folder: Path
    descriptor: int | None = None
    made: list[Path] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)
    users: int = 0

    def __post_init__(self) -> None:
        self.file: Path | None = self.folder.parent / f".{self.folder.name}.lock"

    def try_lock(self) -> bool:
        """Return whether this process may write the folder now.

        It may also where the file system has no locks, and then a notice is printed.
        """
        assert self.file is not None
        missing: OSError | None = None
        for _ in range(ATTEMPTS):
            try:
                self._make_parents()
                descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError as error:
                missing = error  # another process has removed the empty parent folder
                continue
            except OSError as error:  # the parent folder is read-only
                return self._lock_folder_itself(error)
            missing = None
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                return self._goes_without(error)
            with contextlib.suppress(FileNotFoundError):  # its last holder has removed the file
                if os.fstat(descriptor).st_ino == self.file.stat().st_ino:
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                    self.descriptor = descriptor
                    return True
            os.close(descriptor)
        if missing is not None:
            raise RequestError(f"{self.folder}: cannot be made ({missing.strerror})")
        return False

    def _lock_folder_itself(self, reason: OSError) -> bool:
        """Lock the folder instead of a file beside it, which names no holder."""
        self.file = None
        if not self.folder.is_dir():
            return True  # it cannot be made either, and the code that writes it will report that
        descriptor = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            locked = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            return self._goes_without(error if locked else reason)
        self.descriptor = descriptor
        return True

    def _goes_without(self, error: OSError) -> bool:
        """Return whether to continue without a lock: only if the file system has none."""
        if error.errno not in NO_LOCKS:
            return False
        if self.file is not None:
            self.file.unlink(missing_ok=True)
            self.file = None
        reason = f"cannot be locked ({error.strerror})"
        notice(f"{self.folder}: {reason}; nothing keeps another process from writing there")
        return True

    def _make_parents(self) -> None:
        missing = [parent for parent in self.folder.parents if not parent.exists()]
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):
                parent.mkdir()
                self.made.append(parent)

    def holder(self) -> str:
        """Return the process that has locked the folder."""
        text = ""
        if self.file is not None:
            with contextlib.suppress(OSError):
                text = self.file.read_text(encoding="utf-8")
        return text or "another process"

    def unlock(self) -> None:
        """Release the lock, and remove its file and the empty folders that were made for it."""
        if self.descriptor is None:
            return
        if self.process == os.getpid():  # a forked child must not unlock for its parent
            if self.file is not None:
                # While it is locked: a process that waits for it then makes a new one.
                self.file.unlink(missing_ok=True)
            self.remove_made()
        os.close(self.descriptor)
        self.descriptor = None

    def remove_made(self) -> None:
        """Remove the parent folders that were made for the file, if they are empty."""
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):
                folder.rmdir()


_LOCKS: dict[Path, _Lock] = {}
_GUARD = threading.RLock()


def _acquire(path: Path, named: Path, wait: bool) -> _Lock:
    lock, noticed = _Lock(path), False
    try:
        while not lock.try_lock():
            holder = lock.holder()
            if not wait:
                advice = "wait until it has ended, or name another folder"
                raise RequestError(f"{named}: {holder} is writing there; {advice}")
            if not noticed:
                notice(f"{named}: waiting for {holder}, which is writing there")
                noticed = True
            time.sleep(WAIT_SECONDS)
    except BaseException:
        lock.remove_made()
        raise
    return lock
