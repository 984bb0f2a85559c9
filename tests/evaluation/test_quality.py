"""Scores of quantized models against plain formulas, and text that a calibration has not read."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.evaluation.intervals import figure
from transom.evaluation.quality import measure_quality, text_bytes, unseen
from transom.evaluation.token_rows import TokenRows
from transom.layers.inputs import TransformerInput
from transom.tokenizers.training import byte_tokenizer

ROWS = (*random_tokens(4, 40), random_tokens(1, 9)[0])


def models(count):
    args = tiny_args(vocab_size=byte_tokenizer().vocab_size)
    return [random_model(args, seed=seed) for seed in range(count)]


def test_scores_are_those_of_the_formulas_over_all_rows():
    original, other = models(2)
    scores = measure_quality(original, {"other": other}, ROWS, byte_tokenizer())
    nats, kl, same, sizes, predicted = {"original": 0.0, "other": 0.0}, 0.0, 0, 0, 0
    for row in ROWS:
        logits = {
            name: one(TransformerInput(row[None])).logits[0].detach().double().log_softmax(-1)
            for name, one in (("original", original), ("other", other))
        }
        for name, log_probs in logits.items():
            nats[name] += float(F.nll_loss(log_probs[:-1], row[1:], reduction="sum"))
        p, q = logits["original"], logits["other"]
        kl += float((p.exp() * (p - q)).sum())
        same += int((p.argmax(-1) == q.argmax(-1)).sum())
        predicted += len(row)
        sizes += len(bytes(row[1:].tolist()))  # a token is a byte
    assert set(scores["original"]) == {"bits_per_byte"}
    for name, own in scores.items():
        assert own["bits_per_byte"].score == pytest.approx(nats[name] / math.log(2) / sizes, 1e-5)
    assert scores["other"]["kl"].score == pytest.approx(kl / predicted, 1e-4)
    assert scores["other"]["top1_agreement"].score == same / predicted
    low, high = (figure(scores["other"]["kl"])[end] for end in ("low", "high"))
    assert low < kl / predicted < high


def test_bytes_are_those_of_the_text_after_the_first_token():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("aé🙂")
    assert text_bytes(tokenizer, torch.tensor(ids)) == len("é🙂".encode())


def test_rows_that_share_32_tokens_with_other_text_are_left_out(capsys):
    row = torch.arange(100)
    rows = TokenRows("x.txt", "", (row, row + 200, row[:10]))
    far, near = torch.arange(68, 99), torch.arange(68, 100)
    assert len(unseen(rows, [far]).rows) == 3
    kept = unseen(rows, [near])
    assert [len(one) for one in kept.rows] == [100, 10] and int(kept.rows[0][0]) == 200
    assert "x.txt: 1 row left out of it, which the calibration has read" in capsys.readouterr().err
    assert kept.sha256 != unseen(rows, [far]).sha256
    with pytest.raises(RequestError, match=r"held_out: got 'x\.txt', text that the calibration"):
        unseen(TokenRows("x.txt", "", (row,)), [row])


def test_logits_that_are_not_numbers_fail():
    original, other = models(2)
    other.norm.weight.data.fill_(math.nan)
    with pytest.raises(WorkError, match="other model: logits are NaN or infinite"):
        measure_quality(original, {"other": other}, ROWS, byte_tokenizer())
