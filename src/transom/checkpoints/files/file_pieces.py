"""Parts of files that are read into given memory, past the page cache where that is possible."""

from __future__ import annotations

import contextlib
import functools
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transom.base.errors import WorkError

# Bytes per read. Without direct reads, one read at a time is in the page cache.
PIECE = 1 << 23
# Direct reads need places in files and addresses in memory that are multiples of a sector, which
# has at most so many bytes.
PAGE = 1 << 12


class SourceFile:
    """A file that stays open: it is read to its end even if another takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    @functools.cached_property
    def _direct(self) -> int | None:
        """The file without the page cache; None if its file system does not offer that."""
        with contextlib.suppress(OSError, AttributeError):
            again = f"/proc/self/fd/{self._descriptor}"  # also if another file has its name now
            descriptor = os.open(again, os.O_RDONLY | os.O_DIRECT)
            weakref.finalize(self, os.close, descriptor)
            return descriptor
        return None

    def read_into(self, out: Tensor, offset: int, *, keep: bool = False) -> None:
        """Read the bytes at `offset` into a tensor of bytes on the CPU, as many as it has.

        A memory map would end the process with SIGBUS where a read raises an error. If place and
        address are equal modulo `PAGE`, the CPU copies nothing: it has time for other work. Unless
        `keep` is set, the bytes leave the page cache.

        Raises:
            WorkError: The file cannot be read, or it has become shorter.
        """
        view, shift = out.numpy().data, out.data_ptr() - offset
        done = 0
        while done < len(view):
            place, left = offset + done, len(view) - done
            descriptor, size = self._descriptor, PIECE
            if shift % PAGE == 0 and self._direct is not None:
                size = -place % PAGE  # up to the next page
                if size == 0 and left >= PAGE:
                    descriptor, size = self._direct, min(PIECE, left - left % PAGE)
            try:
                count = os.preadv(descriptor, [view[done : done + (size or left)]], place)
            except OSError as error:
                if descriptor == self._direct:
                    self._direct = None  # larger sectors
                    continue
                raise WorkError(f"{self.path}: weights could not be read ({error})") from None
            if not count:
                ends = f"the file ends at byte {place:,} while weights are read"
                raise WorkError(f"{self.path}: {ends}; expected {offset + len(view):,} bytes")
            if not keep and hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._descriptor, place, count, os.POSIX_FADV_DONTNEED)
            done += count


class FilePiece(NamedTuple):
    """Some bytes of a file."""

    file: SourceFile
    offset: int
    nbytes: int


def read_piece(piece: FilePiece, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor that is a piece of a file, in memory of its own.

    Raises:
        WorkError: As for `SourceFile.read_into`.
    """
    out = torch.empty(piece.nbytes, dtype=torch.uint8)
    piece.file.read_into(out, piece.offset, keep=True)
    return out.view(dtype).view(shape)
