"""Files of a folder that is on this machine, or at a URL that fsspec opens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from transom.base.errors import WorkError, explained


class FileStore:
    """A folder of files.

    Args:
        url: A path, or a URL such as `s3://bucket/folder`, for which fsspec needs another package.

    Attributes:
        url: The same.
        local: The folder if `url` is a path, else None.

    Raises:
        RequestError: fsspec can't open such URLs here.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        self.url = url.rstrip("/")
        self.local = None if "://" in url else Path(url).expanduser()
        with explained(f"{url}: cannot be opened", ImportError, ValueError):
            self._files, self._root = fsspec.url_to_fs(str(self.local or url))

    def names(self) -> set[str]:
        """Return the names of the files, after the folder was made if there was none."""
        with self._place("") as folder:
            self._files.invalidate_cache()  # other machines may have written
            with suppress(FileNotFoundError):
                return {Path(path).name for path in self._files.ls(folder, detail=False)}
            with suppress(FileExistsError):  # another process has just made it
                # The parent of a folder at a URL may be a bucket, which nobody asked to make.
                self._files.mkdir(folder, create_parents=self.local is not None)
            return set()

    def read(self, name: str) -> bytes:
        """Return the content of a file. Raise `RequestError` if there is none."""
        with self._place(name) as path:
            return bytes(self._files.cat_file(path))

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file of the folder to this machine. Raise `RequestError` if there is none."""
        with self._place(name) as source:
            self._files.get_file(source, str(path))

    def put(self, name: str, path: Path) -> None:
        """Copy a file of this machine into the folder."""
        with self._place(name) as target:
            self._files.put_file(str(path), target)

    def write(self, name: str, document: Any) -> None:
        """Write a file of JSON into the folder, completely or not at all."""
        with self._place(name) as path, self._files.transaction:
            self._files.pipe_file(path, json.dumps(document, indent=1).encode())

    @contextmanager
    def _place(self, name: str) -> Iterator[str]:
        """Yield the path of a file, and turn any error of a file system into one sentence."""
        shown = f"{self.url}/{name}"
        with (
            # Errors of object stores are of many kinds.
            explained(f"{shown}: cannot be read or written", Exception, by=WorkError),
            explained(f"{shown}: got no file; expected one", FileNotFoundError),
        ):
            yield f"{self._root}/{name}".rstrip("/")
