"""Batches: targets and sizes against a brute-force reference, ranks, and state."""

import numpy as np
import pytest
import torch

from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET
from transom.data.order import Mixture, PackedOrder
from transom.data.text.batches import TextBatches
from transom.data.text.shards import TokenFile

BOS, EOS = 90, 91


def token_file(lengths, first=0):
    """Documents whose tokens are numbered through, so that each token says where it is from."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = (first + np.arange(offsets[-1])).astype(np.uint16)
    return TokenFile(
        tokens, offsets, np.asarray(lengths, np.int64), [str(i) for i in range(len(lengths))]
    )


FILES = [token_file([5, 0, 12, 1, 9]), token_file([8, 3, 7], first=40)]


def batches(files=FILES, **changes):
    settings = {
        "bos_id": BOS,
        "eos_id": EOS,
        "vocab_size": 92,
        "seq_len": 6,
        "rows_per_step": 4,
        "seed": 1,
    }
    weights = changes.pop("weights", [1.0] * len(files))
    return TextBatches(files, weights, **(settings | changes))


def same(one, other):
    return torch.equal(one.tokens, other.tokens) and torch.equal(one.targets, other.targets)


def reference_row(files, item, frame, seq_len):
    """Tokens, targets and sizes of an item, token by token."""
    source, pieces = item
    before, after = frame
    window = []  # (document, token)
    for piece in pieces:
        whole = [*before, *files[source].document(piece.document).tolist(), *after]
        window += [(piece.document, token) for token in whole[piece.start : piece.stop]]
    owners = [document for document, _ in window]
    tokens = [token for _, token in window]
    targets = [
        tokens[place + 1] if owners[place] == owners[place + 1] else NO_TARGET
        for place in range(seq_len)
    ]
    sizes = tuple(owners[:seq_len].count(owner) for owner in dict.fromkeys(owners[:seq_len]))
    return tokens[:seq_len], targets, sizes


@pytest.mark.parametrize("seq_len", [1, 3, 6, 17])
@pytest.mark.parametrize("frame", [((BOS,), (EOS,)), ((), (EOS,)), ((BOS,), ()), ((), ())])
@pytest.mark.parametrize("files", [FILES[:1], FILES], ids=["one", "two"])
def test_rows_are_those_of_the_reference(files, frame, seq_len):
    bos_id, eos_id = (part[0] if part else None for part in frame)
    extra = len(frame[0]) + len(frame[1])
    orders = [PackedOrder(file.lengths + extra, seq_len, 1) for file in files]
    mixture = Mixture(orders, [1.0] * len(files), 1)
    data = batches(files, bos_id=bos_id, eos_id=eos_id, seq_len=seq_len, rows_per_step=1)
    for epoch in range(2):
        for index in range(len(mixture)):
            batch = data.next()
            tokens, targets, sizes = reference_row(
                files, mixture.item(epoch, index), frame, seq_len
            )
            assert batch.tokens.tolist() == [tokens]
            assert batch.targets.tolist() == [targets]
            assert batch.sizes == (sizes,)
            assert BOS not in batch.targets
    assert data.state == {"epoch": 2, "item": 0}


def test_ranks_share_the_global_batches_of_one_process_across_epochs():
    alone, ranks = batches(), [batches(rank=rank, world_size=2) for rank in range(2)]
    assert alone.items_per_epoch % 4 != 0  # so that a batch spans the end of an epoch
    for _ in range(alone.items_per_epoch):
        whole, parts = alone.next(), [rank.next() for rank in ranks]
        assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
        assert torch.equal(whole.targets, torch.cat([part.targets for part in parts]))
        assert whole.sizes == sum((part.sizes for part in parts), ())
        assert all(rank.state == alone.state for rank in ranks)


def test_a_restored_state_gives_the_same_rows_to_any_number_of_ranks():
    data = batches()
    for _ in range(5):
        data.next()
    resumed, ranks = batches(), [batches(rank=rank, world_size=4) for rank in range(4)]
    for one in (resumed, *ranks):
        one.load_state(data.state)
    for _ in range(data.items_per_epoch):
        expected = data.next()
        assert same(resumed.next(), expected)
        assert torch.equal(torch.cat([rank.next().tokens for rank in ranks]), expected.tokens)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_weights_that_change_at_a_step_give_any_ranks_the_same_rows_also_resumed(world_size):
    weights = [1.0, [(0, 0.0), (3, 5.0)]]
    alone = batches(weights=weights)
    ranks = [batches(weights=weights, rank=r, world_size=world_size) for r in range(world_size)]
    first_of_second = []
    for step in range(12):
        expected = alone.next()
        assert torch.equal(torch.cat([rank.next().tokens for rank in ranks]), expected.tokens)
        first_of_second.append(bool(((expected.tokens >= 40) & (expected.tokens < BOS)).any()))
        if step in (1, 5):  # before and after the change
            states = [rank.state for rank in ranks]
            ranks = [
                batches(weights=weights, rank=r, world_size=world_size) for r in range(world_size)
            ]
            for rank, state in zip(ranks, states, strict=True):
                rank.load_state(state)
    assert not any(first_of_second[:3]) and all(first_of_second[3:])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows_per_step": 0}, "rows_per_step: got 0; expected 1 row or more"),
        ({"world_size": 3}, "rows_per_step: got 4; expected a multiple of the number of ranks, 3"),
        ({"rank": 1}, "rank: got 1; expected 0 to 0"),
        ({"seq_len": 0}, "data.seq_len: got 0; expected 1 token"),
        ({"seq_len": 60}, "data.seq_len: got 60; expected at most 36"),
        (
            {"vocab_size": 50, "bos_id": None, "eos_id": None},
            "token id: got 57; expected ids from 0 to 49",
        ),
        ({"vocab_size": 91}, "eos_id: got 91; expected ids from 0 to 90"),
        ({"seed": -1}, "seed: got -1; expected 0 or more"),
    ],
)
def test_wrong_settings_are_named(changes, sentence):
    with pytest.raises(RequestError, match=sentence):
        batches(**changes)


@pytest.mark.parametrize(
    "state", [{"epoch": 0}, {"epoch": -1, "item": 0}, {"epoch": 0, "item": 10**6}]
)
def test_a_state_of_other_data_is_refused(state):
    with pytest.raises(RequestError, match="expected"):
        batches().load_state(state)
