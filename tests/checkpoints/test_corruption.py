"""Every kind of tensor in Meta's and Mistral's folders reaches the logits: one that is spoiled is
seen.
"""

import re

import pytest
import torch

from tests.checkpoints.consolidated import (
    MISTRAL_PARAMS,
    PARAMS,
    VOCAB,
    cut,
    meta_state,
    mistral_state,
    mistral_twin,
    twin,
    write_meta,
    write_mistral,
)
from transom.checkpoints.load import load
from transom.layers.inputs import MaskedEmbedding, TransformerInput

SAME, SEEN = 2e-5, 1e-3


def kinds_of(state):
    """One key for every name without its layer (and expert): the last layer that has it."""
    return sorted({re.sub(r"\.\d+\.", ".N.", key): key for key in sorted(state)}.values())


def meta_folder(kind, states, at):
    return write_meta(at, PARAMS[kind], states)


@torch.no_grad()
def ours(folder, ids, pixels):
    mine = load(folder)
    if pixels is None:
        return mine(TransformerInput(ids)).logits
    mask = ids == VOCAB - 1
    images = mine.encode_images(pixels).flatten(0, 1)
    embedding = torch.zeros(*ids.shape, mine.args.dim).masked_scatter(mask.unsqueeze(-1), images)
    return mine(TransformerInput(ids, image_embedding=MaskedEmbedding(embedding, mask))).logits


def calls(kind):
    ids = torch.randint(1, VOCAB - 1, (2, 24), generator=torch.Generator().manual_seed(1))
    if kind != "llama4-vision":
        return ids, None
    ids[0, 2:20] = VOCAB - 1  # two tiles of nine
    return ids, torch.randn(2, 3, 24, 24, generator=torch.Generator().manual_seed(3))


def misses(spoiled, expected):
    """Names of tensors whose spoiling moved no logit by `SEEN`; `spoiled` yields (name, logits)."""
    return [name for name, logits in spoiled if float((logits - expected).abs().max()) < SEEN]


@pytest.mark.parametrize("kind", PARAMS)
def test_every_tensor_of_meta_counts(kind, tmp_path):
    theirs, (ids, pixels) = twin(kind), calls(kind)
    states = cut(kind, meta_state(kind, theirs), 2)
    with torch.no_grad():
        expected = (
            theirs(ids) if pixels is None else theirs(input_ids=ids, pixel_values=pixels)
        ).logits
    assert (
        float((ours(meta_folder(kind, states, tmp_path), ids, pixels) - expected).abs().max())
        < SAME
    )

    def spoiled():
        for key in kinds_of(states[0]):
            # What every rank holds is read from the first; of the others the last rank's part is
            # spoiled.
            rank = 0 if torch.equal(states[0][key], states[1][key]) else 1
            kept = states[rank][key]
            states[rank][key] = kept.roll(1, 0)
            yield key, ours(meta_folder(kind, states, tmp_path), ids, pixels)
            states[rank][key] = kept

    assert misses(spoiled(), expected) == []


@pytest.mark.parametrize("kind", MISTRAL_PARAMS)
def test_every_tensor_of_mistral_counts(kind, tmp_path):
    theirs, (ids, _) = mistral_twin(kind), calls(kind)
    state = mistral_state(kind, theirs, tmp_path / "hf")
    params = MISTRAL_PARAMS[kind]
    with torch.no_grad():
        expected = theirs(ids).logits
    assert (
        float(
            (ours(write_mistral(tmp_path / "m", params, state), ids, None) - expected).abs().max()
        )
        < SAME
    )

    def spoiled():
        for key in kinds_of(state):
            folder = write_mistral(
                tmp_path / "m", params, {**state, key: state[key].roll(1, 0).contiguous()}
            )
            yield key, ours(folder, ids, None)

    assert misses(spoiled(), expected) == []
