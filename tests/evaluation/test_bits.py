"""Held-out scores against a token-by-token recount."""

import math

import numpy as np
import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.evaluation.bits import first_documents, score_each
from transom.evaluation.score import Score
from transom.layers.inputs import TransformerInput


class Documents:
    def __init__(self, lengths, vocab):
        rng = np.random.default_rng(0)
        self.texts = [rng.integers(2, vocab, size=n) for n in lengths]
        self.bytes = np.array([3 * n for n in lengths])

    def __len__(self):
        return len(self.texts)

    def document(self, index):
        return self.texts[index]


def recount(model, docs, window, stride):
    """-log p of every token after the first, each once, given the longest context its window
    has.
    """
    nats = 0.0
    for text in docs.texts:
        ids = [0, *text.tolist(), 1]
        scored = start = 0
        while scored < len(ids) - 1:
            inputs = ids[start : min(start + window, len(ids) - 1)]
            logp = (
                model(TransformerInput(torch.tensor([inputs])), inference=True)
                .logits[0]
                .log_softmax(-1)
            )
            for at in range(scored - start, len(inputs)):
                nats -= float(logp[at, ids[start + at + 1]])
            scored = start + len(inputs)
            start += stride
    return nats


@pytest.mark.parametrize(("window", "stride"), [(8, 4), (8, 8), (16, 1)])
def test_every_token_is_scored_once(window, stride):
    model = random_model(tiny_args(max_seq_len=32))
    docs = Documents([1, 7, 8, 9, 40, 16], model.args.vocab_size)
    framing = {"bos_id": 0, "eos_id": 1}
    each = score_each(model, docs, **framing, window=window, stride=stride, batch_tokens=40)
    got = sum(each, Score())
    assert got.count == sum(len(text) + 1 for text in docs.texts)
    assert got.bytes == docs.bytes.sum()
    assert got.loss_sum == pytest.approx(recount(model, docs, window, stride), rel=1e-5)
    assert got.bits_per_byte == pytest.approx(got.loss_sum / math.log(2) / got.bytes)


def test_a_limit_counts_whole_documents():
    model = random_model(tiny_args(max_seq_len=32))
    docs = Documents([10, 10, 10], model.args.vocab_size)
    first = first_documents(docs, 0, 1, 12)
    got = sum(score_each(model, docs, bos_id=0, eos_id=1, window=8, indices=first), Score())
    assert (got.count, got.bytes) == (22, 60)
