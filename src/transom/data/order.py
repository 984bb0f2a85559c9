"""The order of training data: item i of an epoch is a function of (seed, epoch, i) alone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import expect

# The share of a source relative to the others: one number, or pairs (step from which it is, number)
Weight = float | Sequence[tuple[int, float]]


class Piece(NamedTuple):
    """The tokens [start, stop) of a document. Its BOS and EOS count as tokens."""

    document: int
    start: int
    stop: int


class Stream(IntEnum):
    """Streams of random numbers. Each use has its own, so that none changes another."""

    DOCUMENTS = 0
    WINDOWS = 1
    SOURCES = 2


def random_bits(seed: int, epoch: int, stream: Stream, count: int) -> NDArray[np.uint64]:
    """Return `count` random numbers of 64 bits that depend on nothing but the other arguments.

    NumPy guarantees that the raw output of Philox never changes. It does not guarantee this for
    permutations and choices, so they are computed here.
    """
    source = np.random.Philox(np.random.SeedSequence((seed, epoch, int(stream))))
    return source.random_raw(count)


def permutation(seed: int, epoch: int, stream: Stream, count: int) -> NDArray[np.int64]:
    """Return the numbers 0 to `count` - 1 in random order, int64 [count]."""
    return np.argsort(random_bits(seed, epoch, stream, count), kind="stable")


class PackedOrder:
    """Windows of documents that are laid end to end in random order; the windows are shuffled, too.

    A window has `window + 1` tokens. Its last token is a target only, and is the first input of the
    next window. A document that crosses the end of a window continues in the next one as a new
    segment. The tokens after the last full window are dropped, different ones in each epoch.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], window: int, seed: int) -> None:
        """Plan the windows.

        Args:
            lengths: The tokens of each document, including BOS and EOS.
            window: Input tokens of a window.
            seed: Chooses the order, 0 or more.
        """
        expect(window >= 1, "data.seq_len", window, "1 token or more")
        expect(seed >= 0, "seed", seed, "0 or more")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._window = window
        self._seed = seed
        # Windows share a token, so the first one has one token more.
        most = max(int(self._lengths.sum()) - 1, 0)
        self._windows = most // window
        expect(self._windows > 0, "data.seq_len", window, f"at most {most}, the tokens of a source")
        # Only the latest epoch is kept, with about 24 bytes per document.
        self._layout = lru_cache(maxsize=1)(self._lay_out)

    def __len__(self) -> int:
        """Return the number of windows in an epoch."""
        return self._windows

    def item(self, epoch: int, index: int) -> list[Piece]:
        """Return the pieces of window `index` of an epoch. None of them is empty."""
        documents, ends, places = self._layout(epoch)
        start = int(places[index]) * self._window
        stop = start + self._window + 1
        # From the document that contains token `start` to the one that contains token `stop - 1`.
        first, last = np.searchsorted(ends, (start, stop - 1), side="right").tolist()
        documents, ends = documents[first : last + 1], ends[first : last + 1]
        begins = ends - self._lengths[documents]
        starts, stops = np.maximum(begins, start) - begins, np.minimum(ends, stop) - begins
        pieces = zip(documents.tolist(), starts.tolist(), stops.tolist(), strict=True)
        return [Piece(*piece) for piece in pieces if piece[1] < piece[2]]

    def _lay_out(
        self, epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the documents of an epoch in order, their ends, and the place of each window."""
        documents = permutation(self._seed, epoch, Stream.DOCUMENTS, len(self._lengths))
        places = permutation(self._seed, epoch, Stream.WINDOWS, self._windows)
        return documents, np.cumsum(self._lengths[documents]), places


class Mixture:
    """Items that are taken from several orders by weight.

    An epoch has as many items as all orders have windows. The n-th item that an epoch takes from an
    order is window n of that order. After its last window an order continues in another epoch of
    its own. An order of L windows gets ceil(len(mixture) / L) epochs of its own for each epoch of
    the mixture, which is the most it can need, so no two passes over a source have one permutation.

    A weight may change at a step. Step s takes the items from `s * rows_per_step` on, counted from
    the beginning of epoch 0.
    """

    def __init__(
        self,
        orders: Sequence[PackedOrder],
        weights: Sequence[Weight],
        seed: int,
        rows_per_step: int = 1,
    ) -> None:
        plans = [[(0, one)] if isinstance(one, int | float) else list(one) for one in weights]
        starts = sorted({step for plan in plans for step, _ in plan} | {0})
        # [changes, sources]; NaN for a source without a weight at step 0.
        table = np.array([[_weight_at(plan, step) for plan in plans] for step in starts])
        usable = bool(np.all((table >= 0) & (table < np.inf)) and table.any(axis=1).all())
        expected = f"0 or more for each of the {len(orders)} sources, not all 0 at a step"
        expect(len(orders) == len(plans) > 0 and usable, "weights", tuple(weights), expected)
        self._orders = list(orders)
        shares = np.cumsum(table, axis=1)
        self._edges = shares / shares[:, -1:]  # ends at exactly 1, as dividing by np.sum would not
        self._starts = [step * rows_per_step for step in starts]
        self._seed = seed
        self._items = sum(len(order) for order in orders)
        self._draws = lru_cache(maxsize=1)(self._draw)

    def __len__(self) -> int:
        """Return the number of items in an epoch."""
        return self._items

    def item(self, epoch: int, index: int) -> tuple[int, list[Piece]]:
        """Return the number of an item's source, and its pieces there."""
        sources, counts = self._draws(epoch)
        source, count = int(sources[index]), int(counts[index])
        order = self._orders[source]
        epochs_each = -(-self._items // len(order))
        return source, order.item(epoch * epochs_each + count // len(order), count % len(order))

    def _draw(self, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the source of each item of an epoch, and the number of items before it from that
        source.
        """
        bits = random_bits(self._seed, epoch, Stream.SOURCES, self._items)
        uniform = (bits >> np.uint64(11)) * 2.0**-53  # the 53 bits that a float64 holds, in [0, 1)
        sources = np.empty(self._items, np.int64)
        inside = [min(max(start - epoch * self._items, 0), self._items) for start in self._starts]
        for (begin, end), edges in zip(pairwise([*inside, self._items]), self._edges, strict=True):
            sources[begin:end] = np.searchsorted(edges, uniform[begin:end], side="right")
        counts = np.zeros(self._items, np.int64)
        for source in range(len(self._orders)):
            drawn = sources == source
            counts[drawn] = np.arange(np.count_nonzero(drawn))
        return sources, counts


def _weight_at(plan: Sequence[tuple[int, float]], step: int) -> float:
    """Return the weight of a plan at a step; NaN before its first step."""
    return next((weight for start, weight in reversed(plan) if start <= step), np.nan)


class Batches(ABC):
    """The endless batches of one rank.

    The position in the global order is its whole state. The order does not depend on the number of
    ranks, so a state that one rank saved is valid for every rank of a run with any number of ranks.

    Attributes:
        items_per_epoch: Items of one epoch over all ranks. An item is a row, or the rows of one
        pair.
    """

    def __init__(self, items: int, rows_per_step: int, rank: int, world_size: int) -> None:
        """Start at the first item.

        Args:
            items: Items of one epoch over all ranks.
            rows_per_step: Items of one optimizer step over all ranks.
            rank: This rank, from 0.
            world_size: Number of ranks.

        Raises:
            RequestError: `rows_per_step` is not a multiple of `world_size`, or `rank` is not one of
            the ranks.
        """
        expect(rows_per_step >= 1, "rows_per_step", rows_per_step, "1 row or more")
        even = world_size >= 1 and rows_per_step % world_size == 0
        expected = f"a multiple of the number of ranks, {world_size}"
        expect(even, "rows_per_step", rows_per_step, expected)
        expect(0 <= rank < world_size, "rank", rank, f"0 to {world_size - 1}")
        self.items_per_epoch = items
        self._rows_per_step = rows_per_step
        rows = rows_per_step // world_size
        self._rows = range(rank * rows, (rank + 1) * rows)
        self._epoch = self._item = 0

    @property
    def state(self) -> dict[str, int]:
        """Return the next item of the global order: its epoch and its index in that epoch."""
        return {"epoch": self._epoch, "item": self._item}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Continue from a `state` of any rank. Raise `RequestError` if it is not a state of
        these items.
        """
        epoch, item = state.get("epoch", -1), state.get("item", -1)
        expected = f"an epoch from 0, and an item from 0 to {self.items_per_epoch - 1}"
        fits = len(state) == 2 and epoch >= 0 and 0 <= item < self.items_per_epoch
        expect(fits, "data state", dict(state), expected)
        self._epoch, self._item = epoch, item

    def next(self) -> Any:
        """Return this rank's rows of the next global batch. A batch may continue in the next
        epoch.
        """
        batch = self._load(self._places())
        self._epoch, self._item = self._place(self._rows_per_step)
        return batch

    @abstractmethod
    def _load(self, places: Sequence[tuple[int, int]]) -> Any:
        """Return the batch of the items at these (epoch, index) places."""

    @abstractmethod
    def largest(self, micro_batches: int) -> Any:
        """Return the largest micro-batch of this rank if `micro_batches` make one step. The
        state stays the same.
        """

    def _places(self) -> list[tuple[int, int]]:
        """Return the epoch and index of this rank's items of the next batch."""
        return [self._place(ahead) for ahead in self._rows]

    def _place(self, ahead: int) -> tuple[int, int]:
        """Return the epoch and index of the item that is `ahead` items after the current one."""
        epochs, item = divmod(self._item + ahead, self.items_per_epoch)
        return self._epoch + epochs, item


class ShuffledBatches(Batches):
    """Batches of whole items whose order in each epoch is a function of (seed, epoch)."""

    def __init__(
        self,
        lengths: Sequence[int] | NDArray[np.int64],
        rows_per_step: int,
        seed: int,
        rank: int,
        world_size: int,
        what: str = "rows",
    ) -> None:
        """Start at the first item.

        Args:
            lengths: The tokens of each item.
            rows_per_step: Items of one optimizer step over all ranks.
            seed: Chooses the order of the items.
            rank: This rank, from 0.
            world_size: Number of ranks.
            what: What the items are, for the error message.

        Raises:
            RequestError: An argument is out of range, or there are fewer items than one step has.
        """
        super().__init__(len(lengths), rows_per_step, rank, world_size)
        expected = f"at most {len(lengths)}, the number of {what}"
        expect(len(lengths) >= rows_per_step, "data.batch_size", rows_per_step, expected)
        self._lengths = np.asarray(lengths, np.int64)
        self._seed = seed
        self._order = lru_cache(maxsize=1)(self._order_of)

    def largest(self, micro_batches: int) -> Any:
        """Return the longest items, as many as are in one of the `micro_batches` of a step."""
        count = len(self._rows) // micro_batches
        return self._batch(np.argsort(-self._lengths, kind="stable")[:count].tolist())

    @abstractmethod
    def _batch(self, items: list[int]) -> Any:
        """Return the batch of these items."""

    def _load(self, places: Sequence[tuple[int, int]]) -> Any:
        return self._batch([self._index(*place) for place in places])

    def _index(self, epoch: int, place: int) -> int:
        """Return the item at a place of an epoch."""
        return int(self._order(epoch)[place])

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Return the items of an epoch in their order, which is random."""
        return permutation(self._seed, epoch, Stream.DOCUMENTS, self.items_per_epoch)
