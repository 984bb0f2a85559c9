"""`Batch`: the rows of one optimizer step, as every loader returns them and every objective reads
them.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from transom.base.copies import to_device
from transom.layers.inputs import TransformerInput

NO_TARGET = (
    -100
)  # the value of `targets` that carries no loss, as `ignore_index` of torch's cross_entropy


@dataclass(frozen=True, eq=False)
class Batch:
    """The rows of one rank for one step, or a micro-batch of them.

    The rows lie in one of three layouts:

    - Full rows: `tokens` [B, T] without padding. `sizes` has the document lengths of each row.
    - Padded rows: `tokens` [B, T], filled with 0 on the right. `lengths` has the real tokens of
      each row.
    - Concatenated rows: `tokens` [1, T] without padding, rows of different lengths one after
      another. `sizes` has the document lengths of each row.

    Documents of one row don't attend to each other, and their positions count from 0.

    Attributes:
        tokens: Input ids, int64 [B, T].
        targets: The id to predict at each token, int64 [B, T], or the label of each row, int64 [B];
            NO_TARGET where there is no loss.
        weights: Loss weight of each target, float32 [B, T]; None if all targets have the same
            weight.
        lengths: Tokens of each padded row, int64 [B].
        sizes: Tokens of each document of each row; they sum to the length of the row.
        rows_per_item: Neighbouring rows that belong together: 2 for pairs, the group size for
            sampled answers. `micro_batches` does not separate them.
        positions: Position of each token, int64 [B, T], -1 for padding, in place of `lengths` and
            `sizes`: where a rank has only some tokens of a row.
        segments: Document of each of these tokens, int64 [B, T].
        extras: Tensors [B] or [B, T] that only one objective reads, by name.
    """

    tokens: Tensor
    targets: Tensor
    weights: Tensor | None = None
    lengths: Tensor | None = None
    sizes: tuple[tuple[int, ...], ...] | None = None
    rows_per_item: int = 1
    positions: Tensor | None = None
    segments: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Return the number of rows."""
        return len(self.tokens) if self.sizes is None else len(self.sizes)

    @property
    def real_tokens(self) -> int:
        """Return the number of tokens that are not padding."""
        return self.tokens.numel() if self.lengths is None else int(self.lengths.sum())

    @property
    def row_length(self) -> int:
        """Return the length of the longest row in tokens."""
        return self.tokens.size(1) if self.sizes is None else max(map(sum, self.sizes))

    @property
    def _concatenated(self) -> bool:
        return self.sizes is not None and len(self.sizes) != len(self.tokens)

    def inputs(self) -> TransformerInput:
        """Return the arguments of the model's forward pass."""
        sizes = self.sizes
        if self.positions is not None:
            return TransformerInput(self.tokens, self.positions, segments=self.segments)
        if sizes is not None and self._concatenated:
            sizes = (tuple(chain(*sizes)),)
        # Rows of one document each need no sizes, and then share one set of positions.
        packed = sizes is not None and any(len(row) > 1 for row in sizes)
        return TransformerInput(self.tokens, sizes=sizes if packed else None, lengths=self.lengths)

    def to(self, device: torch.device) -> Batch:
        """Return this batch on another device."""
        return self._changed(lambda tensor: to_device(tensor, device))

    def micro_batches(self, count: int) -> Iterator[Batch]:
        """Yield the rows in `count` groups of equal size."""
        size = self.rows // count
        for first in range(0, self.rows, size):
            yield self._slice(first, first + size)

    def split_rows(self, pieces: int) -> Batch:
        """Return a batch in which every full row is cut into `pieces` rows of equal length."""
        assert self.sizes is not None, "only rows of text are cut"
        length = self.tokens.size(1) // pieces
        sizes = [
            _cut(row, at, at + length) for row in self.sizes for at in range(0, sum(row), length)
        ]
        return replace(self._changed(lambda tensor: tensor.reshape(-1, length)), sizes=tuple(sizes))

    def _slice(self, first: int, stop: int) -> Batch:
        """Return the rows [first, stop) without columns that are padding in all of them."""
        part = slice(first, stop)
        if self.sizes is not None and self._concatenated:
            ends = [0, *accumulate(map(sum, self.sizes))]
            columns = slice(ends[first], ends[stop])
            return replace(self._changed(lambda tensor: tensor[:, columns]), sizes=self.sizes[part])
        cut = self._changed(lambda tensor: tensor[part])
        if self.sizes is not None:
            return replace(cut, sizes=self.sizes[part])
        longest = self.tokens.size(1) if cut.lengths is None else int(cut.lengths.max())
        return cut._changed(lambda tensor: tensor[:, :longest] if tensor.ndim == 2 else tensor)

    def _changed(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """Return this batch with `change` applied to each of its tensors."""
        tensors: dict[str, Any] = {
            name: change(value) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        extras = {name: change(value) for name, value in self.extras.items()}
        return replace(self, **tensors, extras=extras)


def _cut(sizes: Sequence[int], start: int, stop: int) -> tuple[int, ...]:
    """Return the document lengths of the tokens [start, stop) of a row."""
    ends = list(accumulate(sizes))
    overlaps = (
        min(end, stop) - max(end - size, start) for size, end in zip(sizes, ends, strict=True)
    )
    return tuple(overlap for overlap in overlaps if overlap > 0)
