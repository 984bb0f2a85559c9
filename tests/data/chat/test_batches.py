"""Batches for fine-tuning: one loss per example however they are laid out, and an order that any
ranks share.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.data.batch import NO_TARGET, Batch
from transom.data.chat.batches import ChatBatches, packed_batch, padded_batch
from transom.data.chat.packing import first_fit_decreasing
from transom.data.chat.rows import EncodedChats
from transom.data.chat.turns import EncodedChat
from transom.models.llm import LLM

CPU = torch.device("cpu")


def row(index: int, length: int, weight: float = 1.0) -> EncodedChat:
    """A row whose first id is its number and whose first two tokens and some others carry no
    loss.
    """
    generator = np.random.default_rng(index)
    ids = generator.integers(0, 60, length).astype(np.int32)
    ids[0] = index
    weights = np.where(generator.random(length) < 0.7, weight, 0.0).astype(np.float32)
    weights[:2], weights[-1] = 0.0, weight
    return EncodedChat(f"f:{index}", ids, weights)


LENGTHS = [3, 30, 7, 12, 19, 4, 25, 9, 33, 5, 16]
ROWS = [row(index, length) for index, length in enumerate(LENGTHS)]
WEIGHTED = [
    row(index, length, weight=0.5 if index % 2 else 2.0) for index, length in enumerate(LENGTHS)
]


def encoded(
    rows: list[EncodedChat] = ROWS, per_item: int = 1, labels: list[bool] | None = None
) -> EncodedChats:
    if labels is not None:
        rows = [row._replace(label=label) for row, label in zip(rows, labels, strict=True)]
    items = [tuple(rows[at : at + per_item]) for at in range(0, len(rows) - per_item + 1, per_item)]
    return EncodedChats(items)


def batches(data: EncodedChats | None = None, **changes: Any) -> ChatBatches:
    settings = {"seq_len": 40, "rows_per_step": 2, "seed": 1, "packing": True, **changes}
    data, room = encoded() if data is None else data, settings.pop("seq_len")
    packed = settings.pop("packing")
    packs = first_fit_decreasing(data.lengths, room, settings["seed"]) if packed else None
    return ChatBatches(data, packs=packs, **settings)


def losses(model: LLM, batch: Batch) -> dict[int, float]:
    """The summed, weighted loss of each example, by its first id."""
    logits = model(batch.inputs()).logits
    each = F.cross_entropy(
        logits.transpose(1, 2), batch.targets, ignore_index=NO_TARGET, reduction="none"
    )
    each = each if batch.weights is None else each * batch.weights
    if batch.sizes is None:
        return {
            int(tokens[0]): float(loss.sum())
            for tokens, loss in zip(batch.tokens, each, strict=True)
        }
    sizes = [size for pack in batch.sizes for size in pack]
    parts = zip(batch.tokens[0].split(sizes), each[0].split(sizes), strict=True)
    return {int(tokens[0]): float(loss.sum()) for tokens, loss in parts}


def epoch_of(made: ChatBatches) -> list[Batch]:
    return [made.next() for _ in range(made.items_per_epoch)]


# One loss per example


@pytest.mark.parametrize("rows", [ROWS, WEIGHTED], ids=["plain", "weighted"])
@pytest.mark.parametrize(
    "fields",
    [
        {"layer_pattern": "SF", "sliding_window": 6},
        {"layer_pattern": "Cf", "attention_chunk_size": 8},
    ],
)
@torch.no_grad()
def test_packed_padded_and_alone_give_each_example_the_same_loss(
    fields: dict[str, Any], rows: list[EncodedChat]
) -> None:
    model = random_model(tiny_args(n_layers=2, **fields))
    alone = {}
    for index, one in enumerate(rows):
        ids = torch.from_numpy(one.ids.astype(np.int64))[None]
        logits = model(packed_batch([[one]]).inputs()).logits[0]
        nats = F.cross_entropy(logits, ids[0, 1:], reduction="none")
        alone[index] = float((nats * torch.from_numpy(one.weights[1:])).sum())
    packed = {
        k: v
        for b in epoch_of(batches(encoded(rows), rows_per_step=1))
        for k, v in losses(model, b).items()
    }
    padded = {
        k: v
        for b in epoch_of(batches(encoded(rows), rows_per_step=1, packing=False))
        for k, v in losses(model, b).items()
    }
    together = losses(model, padded_batch([[one] for one in rows]))
    for other in (packed, padded, together):
        assert other.keys() == alone.keys()
        for index, loss in alone.items():
            assert other[index] == pytest.approx(loss, rel=1e-5, abs=1e-5), (index, LENGTHS[index])


def test_targets_are_the_next_tokens_that_carry_loss() -> None:
    batch = padded_batch([[WEIGHTED[0]], [WEIGHTED[1]]])
    assert batch.tokens.shape == batch.targets.shape == (2, 29)
    assert (
        batch.lengths is not None and batch.lengths.tolist() == [2, 29] and batch.real_tokens == 31
    )
    assert batch.inputs().lengths is batch.lengths  # or experts would be balanced over padding too
    assert batch.weights is not None
    for index in (0, 1):
        one, length = WEIGHTED[index], LENGTHS[index] - 1
        assert batch.tokens[index, :length].tolist() == one.ids[:-1].tolist()
        expected = [
            int(id) if w else NO_TARGET for id, w in zip(one.ids[1:], one.weights[1:], strict=True)
        ]
        assert batch.targets[index, :length].tolist() == expected
        assert batch.weights[index, :length].tolist() == one.weights[1:].tolist()
        assert (
            batch.targets[index, length:].eq(NO_TARGET).all()
            and not batch.weights[index, length:].any()
        )
    assert padded_batch([[ROWS[0]]]).weights is None


def test_packed_rows_have_no_gaps() -> None:
    made = batches()
    for batch in (made.next() for _ in range(2)):
        assert batch.sizes is not None and batch.tokens.shape == (1, sum(map(sum, batch.sizes)))
        assert len(batch.sizes) == 2 and batch.row_length == max(map(sum, batch.sizes)) <= 40
        assert batch.real_tokens == batch.tokens.numel() and batch.inputs().sizes == (
            tuple(n for p in batch.sizes for n in p),
        )


# The order


def seen(batch: Batch) -> list[int]:
    """First ids of the examples of a batch."""
    if batch.sizes is None:
        return batch.tokens[:, 0].tolist()
    starts = np.cumsum([0, *(size for pack in batch.sizes for size in pack)])[:-1]
    return batch.tokens[0, starts].tolist()


@pytest.mark.parametrize("packing", [True, False])
def test_every_example_comes_once_an_epoch_in_another_order(packing: bool) -> None:
    made = batches(packing=packing, rows_per_step=1)
    epochs = [
        [id for _ in range(made.items_per_epoch) for id in seen(made.next())] for _ in range(2)
    ]
    assert (
        sorted(epochs[0]) == sorted(epochs[1]) == list(range(len(ROWS))) and epochs[0] != epochs[1]
    )
    assert made.state == {"epoch": 2, "item": 0}


@pytest.mark.parametrize("packing", [True, False])
def test_ranks_share_the_batches_of_one_process_and_states_are_places(packing: bool) -> None:
    alone = batches(packing=packing, seq_len=34)
    assert alone.items_per_epoch % 2 == 1  # so that a batch spans the end of an epoch
    ranks = [batches(packing=packing, seq_len=34, rank=rank, world_size=2) for rank in (0, 1)]
    for _ in range(alone.items_per_epoch):
        resumed = batches(packing=packing, seq_len=34)
        resumed.load_state(alone.state)
        whole, parts = alone.next(), [rank.next() for rank in ranks]
        assert seen(whole) == [id for part in parts for id in seen(part)] == seen(resumed.next())
        assert all(rank.state == alone.state for rank in ranks)


# Parts of batches


@pytest.mark.parametrize("packing", [True, False])
def test_micro_batches_are_the_rows_in_groups(packing: bool) -> None:
    made = batches(encoded(WEIGHTED), packing=packing, rows_per_step=4, seq_len=33)
    whole = made.next()
    parts = list(whole.to(CPU).micro_batches(2))
    assert [id for part in parts for id in seen(part)] == seen(whole)
    assert sum(part.real_tokens for part in parts) == whole.real_tokens
    for part in parts:
        assert (
            part.weights is not None
            and part.weights.shape == part.targets.shape == part.tokens.shape
        )
        if packing:
            assert part.sizes is not None and len(part.sizes) == 2
        else:
            assert part.lengths is not None and part.tokens.shape == (2, int(part.lengths.max()))
    assert sum(float(part.weights.sum()) for part in parts) == float(whole.weights.sum())


def test_pairs_stay_together_and_labels_with_their_rows() -> None:
    made = batches(encoded(ROWS[:10], per_item=2), packing=False, rows_per_step=4)
    batch = made.next()
    assert batch.rows_per_item == 2 and len(batch.tokens) == 8
    for part in (batch, *batch.micro_batches(2)):
        first, second = part.tokens[::2, 0], part.tokens[1::2, 0]
        assert first.remainder(2).eq(0).all() and torch.equal(second, first + 1)
    labelled = batches(
        encoded(labels=[n > 9 for n in LENGTHS]), packing=False, rows_per_step=6
    ).next()
    for part in (labelled, *labelled.micro_batches(3)):
        assert part.extras["desirable"].tolist() == [
            LENGTHS[id] > 9 for id in part.tokens[:, 0].tolist()
        ]
    for data in (encoded(ROWS[:10], per_item=2), encoded(labels=[True] * len(ROWS))):
        with pytest.raises(
            RequestError, match="packing: got True; expected false for pairs and labelled answers"
        ):
            batches(data)


@pytest.mark.parametrize("packing", [True, False])
def test_the_largest_batch_is_the_largest_that_comes(packing: bool) -> None:
    made = batches(packing=packing)
    seen = [next(made.next().micro_batches(2)) for _ in range(30)]
    state = made.state
    largest, half = made.largest(1), made.largest(2)
    assert made.state == state
    assert half.tokens.numel() == max(batch.tokens.numel() for batch in seen)
    assert largest.tokens.numel() > half.tokens.numel()
    assert random_model(tiny_args())(largest.inputs()).logits.shape[:2] == largest.tokens.shape


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"rows_per_step": 3, "world_size": 2},
            "rows_per_step: got 3; expected a multiple of the number of ranks, 2",
        ),
        (
            {"rows_per_step": 9},
            "data.batch_size: got 9; expected at most 4, the number of rows, into which 11",
        ),
        (
            {"rows_per_step": 12, "packing": False},
            "data.batch_size: got 12; expected at most 11, the number of exam",
        ),
        ({"seq_len": 16}, "seq_len: got 16; expected 32 or more"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(RequestError, match=sentence):
        batches(**changes)
