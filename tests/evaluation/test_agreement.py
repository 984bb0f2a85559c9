"""Divergence, first choices and loss of two models, against the plain formulas in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from tests.helpers import random_model, random_tokens, tiny_args
from transom.evaluation import agreement as module
from transom.evaluation.agreement import agreement, logits_of, next_tokens
from transom.layers.inputs import TransformerInput

ROWS = [*random_tokens(5, 20), random_tokens(1, 7)[0]]


def models(**fields):
    return random_model(tiny_args(**fields)), random_model(tiny_args(**fields), seed=1)


def test_numbers_are_those_of_the_formulas():
    one, other = models()
    found = agreement(logits_of(one, ROWS), logits_of(other, ROWS), next_tokens(ROWS))
    kl, flips, largest, nats, tokens = 0.0, 0, 0.0, [], 0
    for row in ROWS:
        p, q = (m(TransformerInput(row[None])).logits[0].detach().double() for m in (one, other))
        kl += float(
            F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="sum")
        )
        flips += int((p.argmax(-1) != q.argmax(-1)).sum())
        largest = max(largest, float((p - q).abs().max()))
        nats.append(F.cross_entropy(q[:-1], row[1:], reduction="none"))
        tokens += len(row)
    assert (found.tokens, found.flips) == (
        tokens,
        flips,
    ) and found.top1_agreement == 1 - flips / tokens
    assert math.isclose(found.kl, kl / tokens, rel_tol=1e-5)
    assert math.isclose(found.largest_logit_difference, largest, rel_tol=1e-5)
    assert math.isclose(found.nats, float(torch.cat(nats).mean()), rel_tol=1e-5)


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1, 30.0])
def test_small_divergences_do_not_drown_and_large_ones_stay_finite(scale):
    draws = torch.Generator().manual_seed(0)
    first = torch.randn(50, 4000, generator=draws)
    second = first + scale * torch.randn(50, 4000, generator=draws)
    p, q = (logits.double().log_softmax(-1) for logits in (first, second))
    expected = float((p.exp() * (p - q)).sum(-1).mean())
    assert math.isclose(agreement([first], [second]).kl, expected, rel_tol=2e-2)


def test_a_model_agrees_with_itself_and_chunks_do_not_count(monkeypatch):
    one, other = models()
    assert agreement(logits_of(one, ROWS), logits_of(one, ROWS)).kl == 0
    whole = agreement(logits_of(one, ROWS), logits_of(other, ROWS), next_tokens(ROWS))
    monkeypatch.setattr(module, "LOGITS", 61 * 3)
    cut = agreement(list(logits_of(one, ROWS)), logits_of(other, ROWS), next_tokens(ROWS))
    assert max(len(part) for part in logits_of(one, ROWS)) == 3
    assert math.isclose(cut.kl, whole.kl, rel_tol=1e-5) and math.isclose(
        cut.nats, whole.nats, rel_tol=1e-5
    )
    assert (cut.flips, cut.tokens) == (whole.flips, whole.tokens)


def test_a_flip_is_as_wide_as_the_first_model_sees_it():
    first = torch.tensor([[2.0, 1.5, 0.0], [0.0, 3.0, 1.0]])
    second = torch.tensor([[1.0, 1.6, 0.0], [0.0, 3.0, 1.0]])
    found = agreement([first], [second])
    assert found.flips == 1 and found.top1_agreement == 0.5
    assert math.isclose(found.widest_flip, 0.5, rel_tol=1e-6)


def test_labels_of_a_head_are_compared_per_row():
    one, other = models(head={"kind": "classification", "num_labels": 3})
    found = agreement(logits_of(one, ROWS), logits_of(other, ROWS))
    assert (found.tokens, found.nats) == (len(ROWS), None) and found.kl > 0


def test_a_nan_is_never_equal():
    logits = torch.randn(2, 5)
    bad = logits.clone()
    bad[1, 2] = math.nan
    assert math.isnan(agreement([logits], [bad]).kl)
