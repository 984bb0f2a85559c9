"""Rows of unequal length, padded on either side, cached or not, equal what transformers computes
for each alone.
"""

import pytest
import torch

from tests.checkpoints.families import FAMILIES, random_ids, tiny_hf
from transom.checkpoints.load import load
from transom.inference.forward import prefill
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput

# Most on both sides of every window (5 to 9) and chunk (8).
COUNTS = (33, 7, 20)
# Frequencies follow the longest row of a call: all rows lie on one side of the original length (16,
# 32).
BY_LENGTH = {"llama-dynamic": (15, 7, 12), "phi3-longrope": (45, 33, 39)}
NEW_TOKENS = 40
# 48 positions are all that it has, and beyond 16 each length has frequencies of its own, so the
# rows end together.
FEWER_TOKENS = {"llama-dynamic": ((20, 20), 28)}


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    theirs = tiny_hf(request.param)
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return request.param, theirs, load(folder)


def rows_of(counts):
    return [random_ids(1, count, seed=10 + row)[0] for row, count in enumerate(counts)]


def close(got, expected):
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)


@torch.no_grad()
def alone(theirs, row):
    return theirs(row[None]).logits[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_equal_each_alone(pair, side):
    family, theirs, mine = pair
    rows = rows_of(BY_LENGTH.get(family, COUNTS))
    width = max(map(len, rows)) + 3
    tokens = random_ids(len(rows), width, seed=2)  # padding is any token
    positions = torch.full_like(tokens, -1)
    places = [slice(width - len(row), width) if side == "left" else slice(len(row)) for row in rows]
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        tokens[index, place], positions[index, place] = row, torch.arange(len(row))
    logits = mine(TransformerInput(tokens, tokens_position=positions), inference=True).logits
    for index, (row, place) in enumerate(zip(rows, places, strict=True)):
        close(logits[index, place], alone(theirs, row))


@pytest.mark.parametrize("step_size", [6, 64])
def test_padded_rows_of_a_cache_equal_each_alone(pair, step_size):
    """Pieces shorter than a window and longer than a ring; short rows end while long ones go on."""
    family, theirs, mine = pair
    rows = rows_of(BY_LENGTH.get(family, COUNTS))
    cache = mine.make_cache(len(rows), max(map(len, rows)))
    last_BV = prefill(mine, cache, [row.tolist() for row in rows], step_size)
    for got, row in zip(last_BV, rows, strict=True):
        close(got, alone(theirs, row)[-1])


def test_greedy_tokens_of_a_padded_batch_equal_each_alone(pair):
    """Every new token is transformers' best behind all before it, which is what its greedy search
    would take.
    """
    family, theirs, mine = pair
    counts, new_tokens = FEWER_TOKENS.get(family, (BY_LENGTH.get(family, COUNTS), NEW_TOKENS))
    rows = rows_of(counts)
    made = generate(mine, [row.tolist() for row in rows], new_tokens, prefill_step_size=16)[
        :, max(counts) :
    ]
    for row, new in zip(rows, made, strict=True):
        best = alone(theirs, torch.cat([row, new])).argmax(-1)
        assert new.tolist() == best[len(row) - 1 : -1].tolist()
    tied = mine.output is None  # each token is then its own best successor
    assert tied or len(set(made.flatten().tolist())) > 4, (
        "a loop of one token would agree with much"
    )


def test_generated_by_transformers_itself(pair):
    """Its own search with its own cache, for one row; a by-length family only while it keeps its
    frequencies.

    With the penalty, tied models too write another token each time.
    """
    family, theirs, mine = pair
    prompt, new_tokens = random_ids(1, COUNTS[-1]), 28
    if family in BY_LENGTH:
        prompt, new_tokens = {"llama-dynamic": (random_ids(1, 5), 10)}.get(
            family, (random_ids(1, 33), 28)
        )
    expected = theirs.generate(
        prompt,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        repetition_penalty=1.5,
    )
    assert generate(mine, prompt, new_tokens, repetition_penalty=1.5).tolist() == expected.tolist()
