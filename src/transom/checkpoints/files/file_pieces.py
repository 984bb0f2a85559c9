"""Parts of files that are read into given memory, and leave the page cache afterwards."""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transom.base.errors import WorkError

# Bytes per read. The pages of a read are dropped after it, so that one read at a time is in the
# page cache.
PIECE = 1 << 23


class SourceFile:
    """A file that stays open: it is read to its end even if another takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, out: Tensor, offset: int) -> None:
        """Read the bytes at `offset` into a tensor of bytes on the CPU, as many as it has.

        A memory map would end the process with SIGBUS where a read raises an error.

        Raises:
            WorkError: The file cannot be read, or it has become shorter.
        """
        view = out.numpy().data
        done = 0
        while done < len(view):
            place = offset + done
            try:
                count = os.preadv(self._descriptor, [view[done : done + PIECE]], place)
            except OSError as error:
                raise WorkError(f"{self.path}: weights could not be read ({error})") from None
            if not count:
                ends = f"the file ends at byte {place:,} while weights are read"
                raise WorkError(f"{self.path}: {ends}; expected {offset + len(view):,} bytes")
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(self._descriptor, place, count, os.POSIX_FADV_DONTNEED)
            done += count


class FilePiece(NamedTuple):
    """Some bytes of a file."""

    file: SourceFile
    offset: int
    nbytes: int


def read_pieces(pieces: Sequence[FilePiece], out: Tensor) -> None:
    """Read pieces, one after the other, into a dense tensor of as many bytes on the CPU.

    Raises:
        WorkError: As for `SourceFile.read_into`.
    """
    parts = out.reshape(-1).view(torch.uint8).split([piece.nbytes for piece in pieces])
    for piece, part in zip(pieces, parts, strict=True):
        piece.file.read_into(part, piece.offset)
