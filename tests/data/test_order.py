"""The order of an epoch: every token once, the same for the same seed, mixed by weight."""

from collections import Counter

import numpy as np
import pytest

from transom.base.errors import RequestError
from transom.data.order import Mixture, PackedOrder, Stream, permutation

LENGTHS = [5, 1, 17, 0, 3, 40, 2, 9, 1, 23]


def spans(order, epoch):
    """The order's windows of an epoch as lists of (document, token), in the order they are given
    out.
    """
    return [
        [
            (piece.document, token)
            for piece in order.item(epoch, index)
            for token in range(piece.start, piece.stop)
        ]
        for index in range(len(order))
    ]


@pytest.mark.parametrize("window", [1, 2, 7, 50])
def test_every_token_but_the_dropped_is_an_input_once_an_epoch(window):
    order = PackedOrder(LENGTHS, window, seed=3)
    everything = {
        (document, token) for document, length in enumerate(LENGTHS) for token in range(length)
    }
    for epoch in range(3):
        windows = spans(order, epoch)
        assert all(len(tokens) == window + 1 for tokens in windows)
        inputs = Counter(token for tokens in windows for token in tokens[:-1])
        assert set(inputs.values()) == {1}
        left = everything - set(inputs) - {token for tokens in windows for token in tokens}
        assert len(left) == sum(LENGTHS) - len(order) * window - 1


def test_a_window_goes_on_where_another_ends():
    windows = spans(PackedOrder(LENGTHS, 7, seed=3), epoch=0)
    lasts, firsts = {tokens[-1] for tokens in windows}, {tokens[0] for tokens in windows}
    assert len(lasts & firsts) == len(windows) - 1


def test_items_depend_on_seed_epoch_and_index_alone():
    order, again = PackedOrder(LENGTHS, 7, seed=3), PackedOrder(LENGTHS, 7, seed=3)
    forwards = {
        (epoch, index): order.item(epoch, index)
        for epoch in range(3)
        for index in range(len(order))
    }
    for epoch, index in reversed(forwards):
        assert again.item(epoch, index) == forwards[epoch, index]


def test_each_epoch_and_seed_packs_and_orders_anew():
    order = PackedOrder(LENGTHS, 7, seed=3)
    packings = [spans(order, 0), spans(order, 1), spans(PackedOrder(LENGTHS, 7, seed=4), 0)]
    assert len({frozenset(map(tuple, windows)) for windows in packings}) == 3
    long = PackedOrder([1001], 10, seed=3)  # one document: only the order of its windows can differ
    assert spans(long, 0) != spans(long, 1)


def test_the_random_numbers_are_those_of_the_committed_order():
    # A run can only be repeated years later if these never change.
    assert permutation(7, 2, Stream.DOCUMENTS, 8).tolist() == [0, 3, 5, 1, 4, 2, 6, 7]
    assert permutation(7, 2, Stream.WINDOWS, 8).tolist() != [0, 3, 5, 1, 4, 2, 6, 7]


def test_a_source_smaller_than_a_window_is_refused():
    with pytest.raises(
        RequestError, match=r"data\.seq_len: got 8; expected at most 7, the tokens of a source"
    ):
        PackedOrder([5, 3], 8, seed=0)


def test_one_source_keeps_its_own_order():
    order = PackedOrder(LENGTHS, 7, seed=3)
    mixture = Mixture([order], [0.2], seed=3)
    assert len(mixture) == len(order)
    for index in range(len(order)):
        assert mixture.item(1, index) == (0, order.item(1, index))


def test_sources_are_drawn_by_weight():
    orders = [
        PackedOrder([2001], 1, seed=0),
        PackedOrder([1001], 1, seed=0),
        PackedOrder([51], 1, seed=0),
    ]
    mixture = Mixture(orders, [1.0, 2.0, 1.0], seed=0)
    drawn = Counter(mixture.item(0, index)[0] for index in range(len(mixture)))
    assert len(mixture) == 3050
    assert np.allclose([drawn[source] / 3050 for source in range(3)], [0.25, 0.5, 0.25], atol=0.03)


def test_each_pass_over_a_source_of_a_mixture_is_whole_and_in_a_new_order():
    orders = [PackedOrder([201], 1, seed=0), PackedOrder([11], 1, seed=0)]
    mixture = Mixture(orders, [1.0, 1.0], seed=5)
    passes = []
    for epoch in range(2):
        items = [mixture.item(epoch, index) for index in range(len(mixture))]
        small = [pieces[0].start for source, pieces in items if source == 1]
        passes += [tuple(small[start : start + 10]) for start in range(0, len(small) - 9, 10)]
    assert len(passes) > 15
    assert all(sorted(one) == list(range(10)) for one in passes)
    assert len(set(passes)) == len(passes)


def test_weights_change_at_a_step_also_inside_an_epoch():
    orders = [PackedOrder([3001], 1, seed=0), PackedOrder([1001], 1, seed=0)]
    plans = [[(0, 1), (150, 0.2), (1100, 0)], 0.8]
    mixture = Mixture(orders, [plans[0], plans[1]], 0, rows_per_step=8)
    drawn = [mixture.item(at // 4000, at % 4000)[0] for at in range(12_000)]
    shares = [
        1 - np.mean(drawn[begin * 8 : end * 8])
        for begin, end in ((0, 150), (150, 1100), (1100, 1500))
    ]
    assert np.allclose(shares, [1 / 1.8, 0.2, 0.0], atol=0.03)
    before = Mixture(orders, [1, 0.8], 0, rows_per_step=8)
    assert drawn[: 150 * 8] == [before.item(0, at)[0] for at in range(150 * 8)]


@pytest.mark.parametrize(
    "weights", [[1.0], [0.0, 0.0], [1.0, float("nan")], [1.0, [(5, 1.0)]], [1.0, [(0, -1.0)]]]
)
def test_wrong_weights_are_refused(weights):
    with pytest.raises(RequestError, match="weights: got "):
        Mixture([PackedOrder(LENGTHS, 7, seed=0)] * 2, weights, seed=0)
