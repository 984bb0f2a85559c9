"""One process at a time writes into a folder: a lock that ends with the process that holds it. No
torch.
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
WAIT_SECONDS = 0.2  # between two attempts to lock a folder that another process writes
ATTEMPTS = 100  # to lock a file that other processes remove meanwhile


@dataclass
class _Lock:
    """A folder that this process may write, and the descriptor of its locked file.

    The descriptor is None where the file system has no locks.
    """

    folder: Path
    descriptor: int | None = None
    file: Path | None = None
    made: list[Path] = field(default_factory=list)  # folders made for the file, the innermost last
    process: int = field(default_factory=os.getpid)
    users: int = 0


_LOCKS: dict[Path, _Lock] = {}
_GUARD = threading.RLock()


class Claim:
    """The right to write into a folder, until `release` or the end of the `with` block or of the
    process.

    Another process that claims the folder meanwhile is refused with a `RequestError`, or waits with
    `wait`. Within one process a folder can be claimed again, and a folder below a claimed one is
    claimed with it. The lock is a hidden file beside the folder, so that the folder itself can be
    made, emptied and renamed.
    """

    def __init__(self, folder: str | Path, *, wait: bool = False) -> None:
        path = Path(folder).resolve()
        with _GUARD:
            lock = next((_LOCKS[one] for one in (path, *path.parents) if one in _LOCKS), None)
            if lock is None:
                lock = _LOCKS[path] = _lock(path, Path(folder), wait)
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
                _unlock(lock)

    def __enter__(self) -> Claim:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


@contextlib.contextmanager
def free_folder(folder: Path, overwrite: bool, name: str = "") -> Iterator[None]:
    """Claim the folder that a command writes; one with files in it is a `RequestError` without
    `overwrite`.
    """
    shown = f"{name} = {str(folder)!r}" if name else str(folder)
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{shown}: a file; expected a new or empty folder")
    with Claim(folder):
        if folder.exists() and any(folder.iterdir()) and not overwrite:
            raise RequestError(
                f"{shown}: not empty; valid only with --overwrite, or name another folder"
            )
        yield


def _lock(path: Path, named: Path, wait: bool) -> _Lock:
    lock = _Lock(path, file=path.parent / f".{path.name}.lock")
    told = False
    try:
        while not _try(lock):
            holder = _holder(lock.file)
            if not wait:
                raise RequestError(
                    f"{named}: {holder} is writing there; wait until it has ended, or name "
                    f"another folder"
                )
            if not told:
                notice(f"{named}: waiting for {holder}, which is writing there")
                told = True
            time.sleep(WAIT_SECONDS)
    except BaseException:
        _remove_empty(lock.made)
        raise
    return lock


def _try(lock: _Lock) -> bool:
    """Return whether this process may write the folder now.

    It may also where the file system has no locks, and then a notice is printed.
    """
    assert lock.file is not None
    missing: OSError | None = None
    for _ in range(ATTEMPTS):
        missing = None
        try:
            _make_parents(lock)
            descriptor = os.open(lock.file, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError as error:  # another process has removed the empty parent folder
            missing = error
            continue
        except (
            OSError
        ) as error:  # the parent folder is read-only: lock the folder itself, which names no holder
            return _try_folder(lock, error)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_ino == lock.file.stat().st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
                lock.descriptor = descriptor
                return True
        except FileNotFoundError:  # the former holder has removed the file that was opened here
            pass
        except OSError as error:
            os.close(descriptor)
            return _failed(lock, error)
        os.close(descriptor)
    if missing is not None:
        raise RequestError(f"{lock.folder}: cannot be made ({missing.strerror})")
    return False


def _try_folder(lock: _Lock, reason: OSError) -> bool:
    lock.file = None
    if not lock.folder.is_dir():
        return True  # it cannot be made either, and its writer will report that
    descriptor = os.open(lock.folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        return _failed(lock, error if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else reason)
    lock.descriptor = descriptor
    return True


def _failed(lock: _Lock, error: OSError) -> bool:
    """Return whether to go on without a lock: only where the file system has none."""
    if error.errno not in NO_LOCKS:
        return False
    if lock.file is not None:
        lock.file.unlink(missing_ok=True)
        lock.file = None
    notice(
        f"{lock.folder}: cannot be locked ({error.strerror}); nothing keeps another process from "
        f"writing there"
    )
    return True


def _make_parents(lock: _Lock) -> None:
    missing = [parent for parent in lock.folder.parents if not parent.exists()]
    for parent in reversed(missing):
        with contextlib.suppress(FileExistsError):
            parent.mkdir()
            lock.made.append(parent)


def _holder(file: Path | None) -> str:
    try:
        return (file.read_text(encoding="utf-8") if file is not None else "") or "another process"
    except OSError:
        return "another process"


def _unlock(lock: _Lock) -> None:
    if (
        lock.descriptor is not None and lock.process == os.getpid()
    ):  # a forked child must not unlock for its parent
        if lock.file is not None:
            # While it is locked: a process that waits for it then makes a new one.
            lock.file.unlink(missing_ok=True)
        _remove_empty(lock.made)
    if lock.descriptor is not None:
        os.close(lock.descriptor)
        lock.descriptor = None


def _remove_empty(folders: list[Path]) -> None:
    for folder in reversed(folders):
        with contextlib.suppress(OSError):
            folder.rmdir()
