"""Packed rows of tokens and their targets, the same rows whatever number of ranks shares them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from transom.base.errors import require
from transom.data.order import Mixture, PackedOrder, Piece, PlaceInOrder
from transom.data.text.shards import TokenFile
from transom.models.llm import TransformerInput

NO_TARGET = -100  # the index that cross_entropy leaves out
CHUNK_TOKENS = 1 << 22


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one rank: the next token of the same document is the target, where there is one."""

    tokens: torch.Tensor  # int64 [B, T]
    targets: torch.Tensor  # int64 [B, T], NO_TARGET behind the last token of a document
    sizes: tuple[
        tuple[int, ...], ...
    ]  # per row, the tokens of each document in it; they add up to T
    epoch: int  # of the first row of the global batch
    weights: torch.Tensor | None = None  # every target counts alike

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding: all of them."""
        return self.tokens.numel()

    @property
    def row_length(self) -> int:
        """Tokens of the longest row."""
        return self.tokens.size(1)

    def inputs(self) -> TransformerInput:
        """What the model is called with: packed rows see their own documents only."""
        # Whole rows need no sizes, and then share one set of positions.
        packed = any(len(row) > 1 for row in self.sizes)
        return TransformerInput(self.tokens, sizes=self.sizes if packed else None)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return replace(self, tokens=self.tokens.to(device), targets=self.targets.to(device))

    def micro_batches(self, count: int) -> Iterator[Batch]:
        """The rows in `count` equal groups."""
        rows = len(self.sizes) // count
        for at in range(0, len(self.sizes), rows):
            part = slice(at, at + rows)
            yield replace(
                self, tokens=self.tokens[part], targets=self.targets[part], sizes=self.sizes[part]
            )

    def split_rows(self, pieces: int) -> Batch:
        """Every row cut into `pieces` rows of equal length; each begins a context of its own."""
        length = self.tokens.size(1) // pieces
        return replace(
            self,
            tokens=self.tokens.reshape(-1, length),
            targets=self.targets.reshape(-1, length),
            sizes=tuple(
                _cut(row, at, at + length)
                for row in self.sizes
                for at in range(0, sum(row), length)
            ),
        )


class Batches(PlaceInOrder):
    """An endless run of batches; its state is a place in the global order, whatever the number of
    ranks.
    """

    def __init__(
        self,
        files: Sequence[TokenFile],
        weights: Sequence[float],
        *,
        bos_id: int | None,
        eos_id: int | None,
        vocab_size: int,
        seq_len: int,
        rows_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """`rows_per_step` counts the rows of all ranks; `vocab_size` is the model's, which ids stay
        below.
        """
        require(rows_per_step >= 1, "rows_per_step", rows_per_step, "expected 1 row or more")
        even = world_size >= 1 and rows_per_step % world_size == 0
        expected = f"expected a multiple of the number of ranks, {world_size}"
        require(even, "rows_per_step", rows_per_step, expected)
        require(0 <= rank < world_size, "rank", rank, f"expected 0 to {world_size - 1}")
        require(seq_len >= 1, "seq_len", seq_len, "expected 1 token or more")
        _check_ids(files, bos_id, eos_id, vocab_size)
        self._files = list(files)
        self._begin = np.asarray([] if bos_id is None else [bos_id], np.int64)
        self._end = np.asarray([] if eos_id is None else [eos_id], np.int64)
        frame = len(self._begin) + len(self._end)
        orders = [PackedOrder(file.lengths + frame, seq_len, seed) for file in files]
        self._order = Mixture(orders, weights, seed)
        self._seq_len = seq_len
        super().__init__(len(self._order), rows_per_step, rank, world_size)
        self.dropped_tokens = tuple(
            order.dropped_tokens for order in orders
        )  # per source and epoch

    def next(self) -> Batch:
        """This rank's rows of the next global batch; a batch may span the end of an epoch."""
        epoch = self._epoch
        tokens, targets, sizes = [], [], []
        for row in self._rows:
            window, pieces = self._window(*self._place(row))
            tokens.append(window[:-1])
            targets.append(_targets(window, pieces))
            sizes.append(_sizes(pieces, self._seq_len))
        self._epoch, self._item = self._place(self._rows_per_step)
        return Batch(
            tokens=torch.from_numpy(np.stack(tokens)),
            targets=torch.from_numpy(np.stack(targets)),
            sizes=tuple(sizes),
            epoch=epoch,
        )

    def largest(self, micro_batches: int) -> Batch:
        """Return the first of the next batch's `micro_batches`; all are of one size. The place
        stays.
        """
        state = self.state
        batch = self.next()
        self.load_state(state)
        return next(batch.micro_batches(micro_batches))

    def _window(self, epoch: int, item: int) -> tuple[NDArray[np.int64], list[int]]:
        """The `seq_len + 1` tokens of an item, and how many come from each document."""
        source, pieces = self._order.item(epoch, item)
        window = np.concatenate([self._tokens(self._files[source], piece) for piece in pieces])
        return window, [piece.stop - piece.start for piece in pieces]

    def _tokens(self, file: TokenFile, piece: Piece) -> NDArray[np.int64]:
        """Tokens of a piece, which counts BOS and EOS, out of a file that does not hold them."""
        start, stop = piece.start - len(self._begin), piece.stop - len(self._begin)
        begin = self._begin if start < 0 else self._begin[:0]
        body = file.document(piece.document)
        end = self._end if stop > len(body) else self._end[:0]
        # A slice past the end of the body is cut there, and a piece may be its EOS alone.
        return np.concatenate([begin, body[max(start, 0) : max(stop, 0)].astype(np.int64), end])


def _targets(window: NDArray[np.int64], pieces: Sequence[int]) -> NDArray[np.int64]:
    """The window one token on; nothing is predicted across the end of a document."""
    targets = window[1:].copy()
    ends = np.fromiter(accumulate(pieces), np.int64)
    targets[ends[:-1] - 1] = (
        NO_TARGET  # the last end is the window's own, where `targets` has no place
    )
    return targets


def _cut(sizes: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Document lengths of the tokens [start, stop) of a row."""
    ends = list(accumulate(sizes))
    overlaps = (
        min(end, stop) - max(end - size, start) for size, end in zip(sizes, ends, strict=True)
    )
    return tuple(overlap for overlap in overlaps if overlap > 0)


def _sizes(pieces: Sequence[int], seq_len: int) -> tuple[int, ...]:
    """Tokens of each document among the inputs, which are all of the window but its last token."""
    last = pieces[-1] - 1
    return (*pieces[:-1], last) if last else tuple(pieces[:-1])


def _check_ids(
    files: Sequence[TokenFile], bos_id: int | None, eos_id: int | None, vocab_size: int
) -> None:
    expected = f"expected ids from 0 to {vocab_size - 1}, the model's vocabulary"
    for name, id in (("bos_id", bos_id), ("eos_id", eos_id)):
        require(id is None or 0 <= id < vocab_size, name, id, expected)
    for file in files:
        for start in range(0, len(file.tokens), CHUNK_TOKENS):
            highest = int(file.tokens[start : start + CHUNK_TOKENS].max())
            require(highest < vocab_size, "token id", highest, expected)
