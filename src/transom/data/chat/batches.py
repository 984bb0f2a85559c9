"""Batches of encoded examples: several in a row without padding, or one per row, padded.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from transom.base.errors import expect
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.packing import grouped_by_length
from transom.data.chat.rows import EncodedChats
from transom.data.chat.turns import EncodedChat
from transom.data.order import ShuffledBatches


def padded_batch(items: Sequence[Sequence[EncodedChat]]) -> Batch:
    """Return a batch with one row of each item after another, padded on the right with 0.

    The labels of items, if they have any, become `extras["desirable"]`, bool [B].
    """
    rows = [_shifted(row) for item in items for row in item]
    tokens, targets, weights = map(list, zip(*rows, strict=True))
    labels = [item[0].label for item in items]
    pad = partial(pad_sequence, batch_first=True)
    return Batch(
        pad(tokens),
        pad(targets, padding_value=NO_TARGET),
        _unless_all_one(pad(weights)),
        lengths=torch.tensor([len(row) for row in tokens]),
        rows_per_item=len(items[0]),
        extras={"desirable": torch.tensor(labels)} if None not in labels else {},
    )


def packed_batch(packs: Sequence[Sequence[EncodedChat]]) -> Batch:
    """Return a batch in which each pack of examples is one row; rows lie one after another."""
    rows = [_shifted(row) for pack in packs for row in pack]
    tokens, targets, weights = (torch.cat(parts)[None] for parts in zip(*rows, strict=True))
    sizes = tuple(tuple(len(row.ids) - 1 for row in pack) for pack in packs)
    return Batch(tokens, targets, _unless_all_one(weights), sizes=sizes)


def _shifted(row: EncodedChat) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, targets and the weights of the targets of one row, [T] each."""
    ids, weights = torch.tensor(row.ids, dtype=torch.int64), torch.tensor(row.weights[1:])
    return ids[:-1], ids[1:].where(weights > 0, NO_TARGET), weights


def _unless_all_one(weights: Tensor) -> Tensor | None:
    return None if bool(((weights == 0) | (weights == 1)).all()) else weights


class ChatBatches(ShuffledBatches):
    """Batches of encoded examples.

    Packed examples share rows, which are in random order. Otherwise each example is a row, and a
    batch has examples of similar length.
    """

    def __init__(
        self,
        data: EncodedChats,
        *,
        packs: Sequence[Sequence[int]] | None,
        rows_per_step: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Start at the first row.

        Args:
            data: The encoded examples.
            packs: The examples of each row, from `first_fit_decreasing`; None for a row each.
            rows_per_step: Rows, or pairs, of one optimizer step over all ranks.
            seed: Chooses the order of the rows.
            rank: This rank, from 0.
            world_size: Number of ranks.

        Raises:
            RequestError: There are fewer rows than `rows_per_step`, or examples are packed that
                have to be a row each.
        """
        expected = "false for pairs and labelled answers, each of which is one row"
        expect(packs is None or not data.compared, "packing", True, expected)
        self._data, self._packs = data, packs
        lengths, what = data.lengths, "examples"
        if packs is not None:
            what = f"rows, into which {len(lengths)} examples are packed"
            lengths = np.asarray([lengths[pack].sum() for pack in packs], np.int64)
        super().__init__(lengths, rows_per_step, seed, rank, world_size, what)

    def _batch(self, items: list[int]) -> Batch:
        """Return the batch of these rows, or of these examples without packing."""
        data = self._data
        if self._packs is not None:
            return packed_batch([[data.items[at][0] for at in self._packs[row]] for row in items])
        return padded_batch([data.items[at] for at in items])

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Return rows in random order, or batches of examples of similar length."""
        if self._packs is not None:
            return super()._order_of(epoch)
        return grouped_by_length(self._lengths, self._seed, epoch, self._rows_per_step)
