"""Batches of packed text: windows of documents laid end to end, and their next tokens.

The batches of a step are the same for any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from transom.base.errors import expect
from transom.data.batch import NO_TARGET, Batch
from transom.data.order import Batches, Mixture, PackedOrder, Piece, Weight
from transom.data.text.shards import TokenFile


class TextBatches(Batches):
    """Batches of full rows of text, without padding."""

    def __init__(
        self,
        files: Sequence[TokenFile],
        weights: Sequence[Weight],
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
        """Start at the first row.

        Args:
            files: The tokenized documents of each source.
            weights: The share of rows from each source, relative to the others; see `Mixture`.
            bos_id: Token before each document, or None.
            eos_id: Token after each document, or None.
            vocab_size: Vocabulary size of the model.
            seq_len: Tokens of a row.
            rows_per_step: Rows of one optimizer step over all ranks.
            seed: Chooses the order of documents, windows and sources.
            rank: This rank, from 0.
            world_size: Number of ranks.

        Raises:
            RequestError: An argument is out of range, a token id is not below `vocab_size`, or a
                source has fewer tokens than one row.
        """
        _check_ids(files, bos_id, eos_id, vocab_size)
        self._files = list(files)
        self._begin = np.asarray([] if bos_id is None else [bos_id], np.int64)
        self._end = np.asarray([] if eos_id is None else [eos_id], np.int64)
        frame = len(self._begin) + len(self._end)
        orders = [PackedOrder(file.lengths + frame, seq_len, seed) for file in files]
        self._order = Mixture(orders, weights, seed, rows_per_step)
        super().__init__(len(self._order), rows_per_step, rank, world_size)

    def largest(self, micro_batches: int) -> Batch:
        """Return the first of the next `micro_batches`, which all have the same size."""
        return next(self._load(self._places()).micro_batches(micro_batches))

    def _load(self, places: Sequence[tuple[int, int]]) -> Batch:
        tokens, targets, sizes = [], [], []
        for epoch, item in places:
            window, pieces = self._window(epoch, item)
            tokens.append(window[:-1])
            targets.append(_targets(window, pieces))
            # The last token of the window is a target only.
            sizes.append(tuple(filter(None, (*pieces[:-1], pieces[-1] - 1))))
        tokens_BT, targets_BT = (torch.from_numpy(np.stack(rows)) for rows in (tokens, targets))
        return Batch(tokens_BT, targets_BT, sizes=tuple(sizes))

    def _window(self, epoch: int, item: int) -> tuple[NDArray[np.int64], list[int]]:
        """Return the `seq_len + 1` tokens of an item, and how many come from each document."""
        source, pieces = self._order.item(epoch, item)
        window = np.concatenate([self._tokens(self._files[source], piece) for piece in pieces])
        return window, [piece.stop - piece.start for piece in pieces]

    def _tokens(self, file: TokenFile, piece: Piece) -> NDArray[np.int64]:
        """Return the tokens of a piece. Its places count BOS and EOS, which files don't contain."""
        start, stop = piece.start - len(self._begin), piece.stop - len(self._begin)
        begin = self._begin if start < 0 else self._begin[:0]
        body = file.document(piece.document)
        end = self._end if stop > len(body) else self._end[:0]
        # A slice after the end of the body is empty: a piece may consist of EOS only.
        return np.concatenate([begin, body[max(start, 0) : max(stop, 0)].astype(np.int64), end])


def _targets(window: NDArray[np.int64], pieces: Sequence[int]) -> NDArray[np.int64]:
    """Return the next token for each token but the last, NO_TARGET at the end of a document."""
    targets = window[1:].copy()
    ends = np.fromiter(accumulate(pieces), np.int64)
    targets[ends[:-1] - 1] = NO_TARGET
    return targets


def _check_ids(
    files: Sequence[TokenFile], bos_id: int | None, eos_id: int | None, vocab_size: int
) -> None:
    """Raise `RequestError` if an id is not one of the model's vocabulary."""
    expected = f"ids from 0 to {vocab_size - 1}, the model's vocabulary"
    for name, id in (("bos_id", bos_id), ("eos_id", eos_id)):
        expect(id is None or 0 <= id < vocab_size, name, id, expected)
    for file in files:
        highest = int(file.tokens.max(initial=0))
        expect(highest < vocab_size, "token id", highest, expected)
