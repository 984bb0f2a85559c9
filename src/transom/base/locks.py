"""Locks on folders, so that one process at a time writes into a folder. No torch.

A lock is `flock` on a hidden file beside the folder, so that the folder itself can be made, emptied
and renamed. The system releases it when the process ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transom.base.errors import RequestError, notice

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
def output_folder(folder: Path, overwrite: bool, *, file: bool = False) -> Iterator[None]:
    """Lock the folder that a command writes.

    Args:
        folder: The folder.
        overwrite: Whether it may contain files.
        file: The command writes one file of this name, which exists only if `overwrite`.

    Raises:
        RequestError: If the folder is a file or, without `overwrite`, not empty.
    """
    expected = f"expected a new {'file' if file else 'or empty folder'}"
    if folder.exists() and folder.is_dir() == file:
        kind = "folder" if file else "file"
        raise RequestError(f"OUT: got {str(folder)!r}, a {kind}; {expected}")
    with FolderLock(folder):
        if folder.exists() and (file or any(folder.iterdir())) and not overwrite:
            found = "exists" if file else "is not empty"
            raise RequestError(
                f"OUT: got {str(folder)!r}, which {found}; {expected}, or --overwrite"
            )
        yield


@dataclass
class _Lock:
    """A folder that this process has locked or tries to lock.

    Attributes:
        folder: The folder.
        descriptor: That of the locked file; None where nothing can be locked.
        made: Parent folders that were made for the file, the innermost first.
        process: The process that has the lock.
        users: The number of `FolderLock` objects.
    """

    folder: Path
    descriptor: int | None = None
    made: list[Path] = field(default_factory=list)
    process: int = field(default_factory=os.getpid)
    users: int = 0

    @property
    def file(self) -> Path:
        """The file that is locked."""
        return self.folder.parent / f".{self.folder.name}.lock"

    def try_lock(self) -> bool:
        """Return whether this process may write the folder now.

        It may also where nothing can be locked, and then a notice is printed.
        """
        descriptor = None
        try:
            self.made += [parent for parent in self.folder.parents if not parent.exists()]
            self.file.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == self.file.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                self.descriptor, descriptor = descriptor, None
                return True
        except (BlockingIOError, FileNotFoundError):
            pass  # another process has locked the file, or removed it with its empty folder
        except OSError as error:  # the file system has no locks, or the parent is read-only
            if descriptor is not None:
                self.file.unlink(missing_ok=True)
            reason = f"cannot be locked ({error.strerror})"
            notice(f"{self.folder}: {reason}; nothing keeps another process from writing there")
            return True
        finally:
            if descriptor is not None:
                os.close(descriptor)
        return False

    def holder(self) -> str | None:
        """Return the process that has locked the folder; None if it has just released it."""
        try:
            return self.file.read_text(encoding="utf-8") or "another process"
        except OSError:
            return None

    def unlock(self) -> None:
        """Release the lock, and remove its file and the empty folders that were made for it."""
        mine = self.process == os.getpid()  # a forked child must not unlock for its parent
        if self.descriptor is not None:
            if mine:
                # While it is locked: a process that waits for it then makes a new one.
                self.file.unlink(missing_ok=True)
            os.close(self.descriptor)
            self.descriptor = None
        for folder in self.made if mine else ():
            with contextlib.suppress(OSError):
                folder.rmdir()


_LOCKS: dict[Path, _Lock] = {}
_GUARD = threading.RLock()


def _acquire(path: Path, named: Path, wait: bool) -> _Lock:
    lock, released = _Lock(path), 0
    try:
        while not lock.try_lock():
            if (holder := lock.holder()) is None:
                released += 1
                if released > ATTEMPTS:
                    raise RequestError(f"{named}: cannot be made, or other processes remove it")
            elif wait:
                notice(f"{named}: waiting for {holder}, which is writing there")
                time.sleep(WAIT_SECONDS)
            else:
                advice = "wait until it has ended, or name another folder"
                raise RequestError(f"{named}: {holder} is writing there; {advice}")
    except BaseException:
        lock.unlock()
        raise
    return lock
