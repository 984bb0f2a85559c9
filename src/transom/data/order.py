"""The order of an epoch: which pieces of which documents are item i, as a function of (seed, epoch,
i).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, require


class Piece(NamedTuple):
    """Tokens `start` to `stop` of a document, counted with its BOS and EOS."""

    document: int
    start: int
    stop: int


class Stream(IntEnum):
    """What a run of random numbers decides; each use draws from its own, so none shifts another."""

    DOCUMENTS = 0
    WINDOWS = 1
    SOURCES = 2


def random_bits(seed: int, epoch: int, stream: Stream, count: int) -> NDArray[np.uint64]:
    """`count` random 64-bit numbers that depend on (seed, epoch, stream) alone.

    NumPy promises that the raw output of Philox never changes; it makes no such promise for the
    permutations and choices drawn from it, so those are worked out here.
    """
    source = np.random.Philox(np.random.SeedSequence((seed, epoch, int(stream))))
    return source.random_raw(count)


def permutation(seed: int, epoch: int, stream: Stream, count: int) -> NDArray[np.int64]:
    """The numbers 0 to `count` - 1 in random order."""
    return np.argsort(random_bits(seed, epoch, stream, count), kind="stable")


class PackedOrder:
    """Documents in random order, laid end to end and cut into windows, which are then put in random
    order.

    A window holds `window + 1` tokens and shares its last one with the next window: there it is the
    first input, here only the last target. A document that crosses the edge goes on in the other
    window as a new segment. What is left behind the last full window is dropped, other documents
    each epoch.
    """

    def __init__(self, lengths: Sequence[int] | NDArray[np.int64], window: int, seed: int) -> None:
        """`lengths` are the tokens of each document, BOS and EOS included; `seed` is 0 or more."""
        require(window >= 1, "window", window, "expected 1 token or more")
        require(seed >= 0, "seed", seed, "expected 0 or more")
        self._lengths = np.asarray(lengths, dtype=np.int64)
        self._window = window
        self._seed = seed
        total = int(self._lengths.sum())
        self._windows = max(total - 1, 0) // window
        expected = f"expected at most {max(total - 1, 0)} for this source of {total} tokens"
        require(self._windows > 0, "window (seq_len)", window, expected)
        self.dropped_tokens = total - (self._windows * window + 1)  # per epoch
        self._epoch = -1
        self._documents = self._ends = self._places = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Windows in an epoch."""
        return self._windows

    def item(self, epoch: int, index: int) -> list[Piece]:
        """The pieces of window `index` of an epoch, `window + 1` tokens in all, none of them
        empty.
        """
        if not 0 <= index < self._windows:
            raise IndexError(f"window {index} of {self._windows}")
        self._enter(epoch)
        at = int(self._places[index]) * self._window
        stop = at + self._window + 1
        pieces = []
        place = int(
            np.searchsorted(self._ends, at, side="right")
        )  # of the document that holds token `at`
        while at < stop:
            document, end = int(self._documents[place]), int(self._ends[place])
            begin = end - int(self._lengths[document])
            upto = min(end, stop)
            if upto > at:
                pieces.append(Piece(document, at - begin, upto - begin))
            at = upto
            place += 1
        return pieces

    def _enter(self, epoch: int) -> None:
        """Lay out an epoch; only the latest one is kept, at 24 bytes a document or so."""
        if epoch == self._epoch:
            return
        self._documents = permutation(self._seed, epoch, Stream.DOCUMENTS, len(self._lengths))
        self._ends = np.cumsum(self._lengths[self._documents])
        self._places = permutation(self._seed, epoch, Stream.WINDOWS, self._windows)
        self._epoch = epoch


class Mixture:
    """Several orders, each item taken from one of them by weight; an epoch has as many items as all
    windows.

    The n-th item that an epoch takes from an order is the order's window n; past its last window
    the order goes on in a further epoch of its own. An order of L windows has ceil(len(mixture) /
    L) epochs of its own for each of the mixture's, the most it can need, so no two passes over a
    source share a permutation.
    """

    def __init__(self, orders: Sequence[PackedOrder], weights: Sequence[float], seed: int) -> None:
        expected = f"expected one number for each of the {len(orders)} sources"
        require(len(orders) == len(weights) > 0, "weights", tuple(weights), expected)
        usable = all(0 < weight < float("inf") for weight in weights)
        require(usable, "weights", tuple(weights), "expected numbers above 0")
        require(seed >= 0, "seed", seed, "expected 0 or more")
        self._orders = list(orders)
        shares = np.cumsum(weights)
        self._edges = shares / shares[-1]  # ends at exactly 1, as dividing by np.sum would not
        self._seed = seed
        self._items = sum(len(order) for order in orders)
        self._epoch = -1
        self._sources = self._counts = np.zeros(0, np.int64)

    def __len__(self) -> int:
        """Items in an epoch."""
        return self._items

    def item(self, epoch: int, index: int) -> tuple[int, list[Piece]]:
        """The source of an item and its pieces there."""
        if not 0 <= index < self._items:
            raise IndexError(f"item {index} of {self._items}")
        self._enter(epoch)
        source, count = int(self._sources[index]), int(self._counts[index])
        order = self._orders[source]
        epochs_each = -(-self._items // len(order))
        return source, order.item(epoch * epochs_each + count // len(order), count % len(order))

    def _enter(self, epoch: int) -> None:
        """Draw the source of every item of an epoch, and count the earlier items of the same
        source.
        """
        if epoch == self._epoch:
            return
        bits = random_bits(self._seed, epoch, Stream.SOURCES, self._items)
        uniform = (bits >> np.uint64(11)) * 2.0**-53  # the 53 bits that a float64 holds, in [0, 1)
        self._sources = np.searchsorted(self._edges, uniform, side="right")
        self._counts = np.zeros(self._items, np.int64)
        for source in range(len(self._orders)):
            drawn = self._sources == source
            self._counts[drawn] = np.arange(np.count_nonzero(drawn))
        self._epoch = epoch


class PlaceInOrder(ABC):
    """Where the ranks of a run stand in an order without end; the state is valid for any number of
    ranks.

    Iterating gives one batch after the other, as `next` does.
    """

    def __init__(self, items: int, rows_per_step: int, rank: int, world_size: int) -> None:
        self.items_per_epoch = items  # over all ranks
        self._rows_per_step = rows_per_step
        rows = rows_per_step // world_size
        self._rows = range(rank * rows, (rank + 1) * rows)
        self._epoch = self._item = 0

    @property
    def state(self) -> dict[str, int]:
        """The next item of the global order: its epoch and its place there."""
        return {"epoch": self._epoch, "item": self._item}

    def load_state(self, state: Mapping[str, int]) -> None:
        """Go on from a `state`, of any rank of any number of ranks."""
        if set(state) != {"epoch", "item"}:
            raise RequestError(
                f"data state: got {dict(state)!r}; expected the fields epoch and item"
            )
        epoch, item = state["epoch"], state["item"]
        require(epoch >= 0, "epoch", epoch, "expected 0 or more")
        require(
            0 <= item < self.items_per_epoch,
            "item",
            item,
            f"expected 0 to {self.items_per_epoch - 1}",
        )
        self._epoch, self._item = epoch, item

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return self.next()

    @abstractmethod
    def next(self) -> Any:
        """This rank's rows of the next global batch."""

    def _micro_batch_items(self, micro_batches: int) -> int:
        """Return how many of this rank's items one of `micro_batches` of a step takes."""
        return len(self._rows) // micro_batches

    def _place(self, ahead: int) -> tuple[int, int]:
        """Epoch and item of the row `ahead` rows from here."""
        epochs, item = divmod(self._item + ahead, self.items_per_epoch)
        return self._epoch + epochs, item


class ShuffledItems(PlaceInOrder):
    """Single items, in an order of each epoch that is a function of (seed, epoch): random unless
    said otherwise.
    """

    def __init__(
        self, items: int, rows_per_step: int, seed: int, rank: int, world_size: int
    ) -> None:
        even = rows_per_step >= 1 and rows_per_step % world_size == 0
        require(
            even,
            "rows_per_step",
            rows_per_step,
            f"expected a multiple of the ranks, {world_size}",
        )
        super().__init__(items, rows_per_step, rank, world_size)
        self._seed = seed
        self._order_epoch = -1
        self._order = np.zeros(0, np.int64)

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """The items of an epoch, one after the other."""
        return permutation(self._seed, epoch, Stream.DOCUMENTS, self.items_per_epoch)

    def _index(self, epoch: int, item: int) -> int:
        """Which of the items is item `item` of an epoch."""
        if epoch != self._order_epoch:
            self._order_epoch, self._order = epoch, self._order_of(epoch)
        return int(self._order[item])
