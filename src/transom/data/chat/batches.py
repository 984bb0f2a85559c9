"""Batches of conversations, texts and pairs of answers: packed without padding, or padded rows of
like length.

Shape letters: B rows, T tokens. Packed rows lie one behind the other in a call of one long row,
whose `sizes` keep the examples from seeing each other; rows that are not full leave no gap there,
so no token is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from transom.base.errors import require
from transom.data.batches import NO_TARGET
from transom.data.chat.packing import first_fit_decreasing, grouped_by_length
from transom.data.chat.rows import EncodedRows, TuningRow
from transom.data.order import ShuffledItems
from transom.models.llm import TransformerInput


@dataclass(frozen=True, eq=False)
class TuningBatch:
    """Rows of one rank, with what a language model's `Batch` offers the trainer.

    Padded rows [B, T] have `lengths`; of pairs the chosen one comes first, then the rejected.
    Packed rows have `sizes`, the tokens of each example of each of them, and lie in one row [1, T].
    The last token of an example is a target only.
    """

    tokens: Tensor  # int64 [B, T]
    # int64 [B, T], the next token of the same example, NO_TARGET where it carries no loss
    targets: Tensor
    epoch: int  # of the first row of the global batch
    weights: Tensor | None = None  # float32 [B, T], of the targets; None where all of them count 1
    lengths: Tensor | None = None  # int64 [B]
    sizes: tuple[tuple[int, ...], ...] | None = None
    row_labels: Tensor | None = None  # bool [B]: whether an answer is a good one
    ids: tuple[str, ...] = ()  # of padded rows: the examples that they are from
    rows_per_item: int = 1  # 2 for pairs

    @property
    def real_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def row_length(self) -> int:
        """Tokens of the longest row, as its examples were packed or padded."""
        return self.tokens.size(1) if self.sizes is None else max(map(sum, self.sizes))

    def inputs(self) -> TransformerInput:
        """What the model is called with: examples see themselves only, and count positions from
        0.
        """
        sizes = None if self.sizes is None else list(chain(*self.sizes))
        return TransformerInput(self.tokens, sizes=sizes, lengths=self.lengths)

    def to(self, device: torch.device) -> TuningBatch:
        """The same batch on another device."""
        names = ("tokens", "targets", "weights", "lengths", "row_labels")
        moved = {
            name: value.to(device) for name in names if (value := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def micro_batches(self, count: int) -> Iterator[TuningBatch]:
        """The rows in `count` equal groups; pairs stay together."""
        if self.sizes is not None:
            rows = len(self.sizes) // count
            ends = [0, *accumulate(map(sum, self.sizes))]
            for at in range(0, len(self.sizes), rows):
                here = replace(self, sizes=self.sizes[at : at + rows])
                yield here._columns(slice(ends[at], ends[at + rows]))
            return
        assert self.lengths is not None, "rows are packed or padded"
        rows = len(self.lengths) // count
        for at in range(0, len(self.lengths), rows):
            part = slice(at, at + rows)
            here = replace(
                self,
                tokens=self.tokens[part],
                targets=self.targets[part],
                weights=None if self.weights is None else self.weights[part],
                lengths=self.lengths[part],
                row_labels=None if self.row_labels is None else self.row_labels[part],
                ids=self.ids[part],
            )
            yield here._columns(slice(0, int(self.lengths[part].max())))

    def _columns(self, part: slice) -> TuningBatch:
        weights = None if self.weights is None else self.weights[:, part]
        return replace(
            self, tokens=self.tokens[:, part], targets=self.targets[:, part], weights=weights
        )


def padded_batch(
    items: Sequence[Sequence[TuningRow]], epoch: int = 0, labels: Sequence[bool] = ()
) -> TuningBatch:
    """Rows of the items below each other, padded on the right with 0, which no position looks
    at.
    """
    rows = [row for item in items for row in item]
    lengths = torch.tensor([len(row.ids) - 1 for row in rows])
    shape = len(rows), int(lengths.max())
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, NO_TARGET, np.int64)
    weights = np.zeros(shape, np.float32)
    for index, row in enumerate(rows):
        length = len(row.ids) - 1
        tokens[index, :length], targets[index, :length], weights[index, :length] = _shifted(row)
    return TuningBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        epoch,
        _unless_all_one(weights),
        lengths=lengths,
        row_labels=torch.tensor(labels) if labels else None,
        ids=tuple(row.id for row in rows),
        rows_per_item=len(items[0]),
    )


def packed_batch(packs: Sequence[Sequence[TuningRow]], epoch: int = 0) -> TuningBatch:
    """The examples of all packs in one long row."""
    parts = [_shifted(row) for pack in packs for row in pack]
    tokens, targets, weights = (np.concatenate(one)[None] for one in zip(*parts, strict=True))
    return TuningBatch(
        torch.from_numpy(tokens),
        torch.from_numpy(targets),
        epoch,
        _unless_all_one(weights),
        sizes=tuple(tuple(len(row.ids) - 1 for row in pack) for pack in packs),
    )


def _shifted(row: TuningRow) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Inputs, targets and the targets' weights of one row, [T] each."""
    ids, weights = row.ids.astype(np.int64), row.weights[1:]
    return ids[:-1], np.where(weights > 0, ids[1:], NO_TARGET), weights


def _unless_all_one(weights: NDArray[np.float32]) -> Tensor | None:
    return None if bool(np.isin(weights, (0.0, 1.0)).all()) else torch.from_numpy(weights)


class TuningBatches(ShuffledItems):
    """An endless run of batches in a random order per epoch; its state is a place in it, as that of
    `Batches`.

    With `packing`, examples are laid into rows once, and an epoch is an order of those rows.
    """

    def __init__(
        self,
        data: EncodedRows,
        *,
        seq_len: int,
        rows_per_step: int,
        seed: int,
        packing: bool,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Rows of at most `seq_len` inputs; `rows_per_step` counts those, or examples or pairs, of
        all ranks.
        """
        alone = data.rows_per_item > 1 or data.labels is not None
        expected = "expected false for pairs and labelled answers, each of which is one row"
        require(not (packing and alone), "packing", packing, expected)
        self._data, self._packing = data, packing
        inputs = [max(len(row.ids) for row in item) - 1 for item in data.items]
        self._lengths = np.asarray(inputs, np.int64)
        self._packs = first_fit_decreasing(inputs, seq_len, seed) if packing else []
        count = len(self._packs) if packing else len(data.items)
        what = f"rows, into which {len(inputs)} examples are packed" if packing else "examples"
        expected = f"expected at most {count}, the number of {what}"
        require(count >= rows_per_step, "data.batch_size", rows_per_step, expected)
        self.fill = (
            sum(inputs) / (count * seq_len) if packing else None
        )  # share of the rows that is no gap
        super().__init__(count, rows_per_step, seed, rank, world_size)

    def next(self) -> TuningBatch:
        """This rank's rows of the next global batch; a batch may span the end of an epoch."""
        epoch = self._epoch
        chosen = [self._index(*self._place(ahead)) for ahead in self._rows]
        self._epoch, self._item = self._place(self._rows_per_step)
        return self._batch(chosen, epoch)

    def largest(self, micro_batches: int) -> TuningBatch:
        """Return the longest rows of the set, as many as one of a step's `micro_batches` takes."""
        tokens = (
            [sum(self._lengths[pack]) for pack in self._packs] if self._packing else self._lengths
        )
        longest = np.argsort(-np.asarray(tokens), kind="stable")
        return self._batch(longest[: self._micro_batch_items(micro_batches)].tolist())

    def _batch(self, chosen: Sequence[int], epoch: int = 0) -> TuningBatch:
        """Return the batch of these rows."""
        items, labels = self._data.items, self._data.labels
        if self._packing:
            return packed_batch(
                [[items[at][0] for at in self._packs[index]] for index in chosen], epoch
            )
        return padded_batch(
            [items[index] for index in chosen],
            epoch,
            [] if labels is None else [labels[index] for index in chosen],
        )

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Rows in random order, or examples of like length side by side."""
        if self._packing:
            return super()._order_of(epoch)
        return grouped_by_length(self._lengths, self._seed, epoch, self._rows_per_step)
