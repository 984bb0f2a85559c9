"""Which examples share a row, and which share a batch."""

from __future__ import annotations

import numpy as np
import pytest

from transom.base.errors import RequestError
from transom.data.chat.packing import first_fit_decreasing, grouped_by_length

LENGTHS = np.random.default_rng(0).lognormal(3.5, 1.0, 700).astype(int).clip(1, 256)


def plain_first_fit(lengths, room, order):
    """Row by row, as the rule is told (Johnson 1973)."""
    rows, left = [], []
    for index in order:
        fits = [at for at, space in enumerate(left) if space >= lengths[index]]
        if not fits:
            rows.append([])
            left.append(room)
            fits = [len(rows) - 1]
        rows[fits[0]].append(index)
        left[fits[0]] -= lengths[index]
    return rows


@pytest.mark.parametrize("count", [1, 2, 3, 700])
def test_packing_is_first_fit_decreasing(count):
    lengths = LENGTHS[:count].tolist()
    rows = first_fit_decreasing(lengths, 256, seed=3)
    order = [index for row in rows for index in row]
    assert sorted(order) == list(range(count))
    # The order in which they were placed: by length, and among equals as the rows show within each
    # length.
    by_rule = plain_first_fit(lengths, 256, sorted(range(count), key=lambda index: -lengths[index]))
    assert [[lengths[i] for i in row] for row in rows] == [
        [lengths[i] for i in row] for row in by_rule
    ]
    assert rows == first_fit_decreasing(lengths, 256, seed=3)
    assert count < 700 or rows != first_fit_decreasing(lengths, 256, seed=4)


def test_an_example_longer_than_a_row_is_refused():
    with pytest.raises(
        RequestError, match="seq_len: got 4; expected 5 or more, the tokens of the longest example"
    ):
        first_fit_decreasing([3, 5], 4, seed=0)


@pytest.mark.parametrize("epoch", [0, 1, 2, 5])
def test_batches_hold_items_of_like_length_in_every_epoch(epoch):
    rows = 8
    order = grouped_by_length(LENGTHS, 1, epoch, rows)
    assert sorted(order.tolist()) == list(range(len(LENGTHS)))
    head = -epoch * len(LENGTHS) % rows  # completes the batch that the epoch before has begun
    batches = [order[at : at + rows] for at in range(head, len(order) - rows + 1, rows)]
    padded = sum(int(LENGTHS[batch].max()) * rows for batch in batches)
    real = sum(int(LENGTHS[batch].sum()) for batch in batches)
    assert real / padded > 0.85
    mixed = np.random.default_rng(0).permutation(len(LENGTHS))
    assert (
        real / sum(int(LENGTHS[mixed[at : at + rows]].max()) * rows for at in range(0, 696, rows))
        < 0.6
    )
    longest = [int(LENGTHS[batch].max()) for batch in batches]
    assert longest != sorted(longest, reverse=True)
    assert order.tolist() != grouped_by_length(LENGTHS, 1, epoch + 1, rows).tolist()
