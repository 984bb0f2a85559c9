"""Which examples share a row, and which rows share a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import expect
from transom.data.order import Stream, permutation

MEGABATCH = 32  # batches that are sorted by length together


def first_fit_decreasing(
    lengths: Sequence[int] | NDArray[np.int64], room: int, seed: int
) -> list[list[int]]:
    """Return rows of examples. Each example, longest first, goes into the first row with room.

    There are at most 11/9 of the fewest possible rows, plus one (Johnson 1973, Near-optimal Bin
    Packing Algorithms). The order of examples of one length is random, so that neighbours in the
    file do not become neighbours in a row.

    Args:
        lengths: The tokens of each example.
        room: The tokens that fit into a row.
        seed: Chooses the order of examples of one length.

    Returns:
        The indices of the examples of each row.

    Raises:
        RequestError: An example is longer than a row.
    """
    sizes = np.asarray(lengths, np.int64)
    longest = int(sizes.max(initial=0))
    expect(
        longest <= room,
        "seq_len",
        room,
        f"{longest} or more, the tokens of the longest example",
    )
    mixed = permutation(seed, 0, Stream.WINDOWS, len(sizes))
    order = mixed[np.argsort(-sizes[mixed], kind="stable")]
    leaves = 1 << max(0, len(sizes) - 1).bit_length()
    left = [room] * (2 * leaves)  # a tree: the most room below every node, rows are its leaves
    rows: list[list[int]] = []
    for index in order.tolist():
        size, node = int(sizes[index]), 1
        while node < leaves:
            node *= 2
            node += left[node] < size
        if node - leaves == len(rows):
            rows.append([])
        rows[node - leaves].append(index)
        left[node] -= size
        while node > 1:
            node //= 2
            left[node] = max(left[2 * node], left[2 * node + 1])
    return rows


def grouped_by_length(
    lengths: NDArray[np.int64], seed: int, epoch: int, rows_per_step: int
) -> NDArray[np.int64]:
    """Return the items of an epoch in random order, except that a batch has similar lengths.

    The items of `MEGABATCH` batches are sorted by length, and all batches are put in random order
    again. An epoch begins with as many items of any length as complete the last batch of the epoch
    before it.

    Args:
        lengths: The tokens of each item.
        seed: Chooses the order.
        epoch: The epoch, from 0.
        rows_per_step: Items of one batch over all ranks.
    """
    count = len(lengths)
    order = permutation(seed, epoch, Stream.DOCUMENTS, count)
    head = -epoch * count % rows_per_step
    groups: list[NDArray[np.int64]] = []
    for start in range(head, count, MEGABATCH * rows_per_step):
        stretch = order[start : start + MEGABATCH * rows_per_step]
        stretch = stretch[np.argsort(-lengths[stretch], kind="stable")]
        groups += [stretch[at : at + rows_per_step] for at in range(0, len(stretch), rows_per_step)]
    whole = len(groups) - (bool(groups) and len(groups[-1]) < rows_per_step)
    mixed = [groups[index] for index in permutation(seed, epoch, Stream.WINDOWS, whole)]
    return np.concatenate([order[:head], *mixed, *groups[whole:]])
