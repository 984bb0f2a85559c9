"""Sampling equals the definitions of transformers, and draws follow the softmax."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from transom.base.errors import RequestError
from transom.base.runtime import mixed_seed
from transom.inference.sampler import Sampler, sample
from transom.inference.sampling import (
    SamplingArgs,
    apply_repetition_penalty,
    apply_temperature,
    keep_min_p,
    keep_top_k,
    keep_top_p,
)


def random_logits(rows=8, vocab=200, seed=0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda x: keep_top_k(x, 7), TopKLogitsWarper(7)),
        (lambda x: keep_top_k(x, 500), TopKLogitsWarper(500)),
        (lambda x: keep_top_p(x, 0.8), TopPLogitsWarper(0.8)),
        (lambda x: keep_top_p(x, 0.01), TopPLogitsWarper(0.01)),
        (lambda x: keep_min_p(x, 0.05), MinPLogitsWarper(0.05)),
        (lambda x: keep_min_p(x, 1.0), MinPLogitsWarper(1.0)),
    ],
)
def test_cuts_equal_transformers(ours, theirs):
    logits = random_logits()
    assert torch.equal(ours(logits), theirs(None, logits))


def test_repetition_penalty_equals_transformers():
    logits = random_logits()
    seen = torch.randint(0, 200, (8, 30), generator=torch.Generator().manual_seed(1))
    theirs = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    mask = torch.zeros(8, 200, dtype=torch.bool).scatter(1, seen, True)
    assert torch.equal(torch.where(mask, apply_repetition_penalty(logits, 1.3), logits), theirs)


def test_all_together_equals_transformers_in_its_order():
    logits = random_logits(rows=1)
    args = SamplingArgs(temperature=0.7, top_k=50, top_p=0.9, min_p=0.02, repetition_penalty=1.4)
    scores, seen = logits.clone(), logits.topk(3).indices
    for step in (
        RepetitionPenaltyLogitsProcessor(1.4),
        TemperatureLogitsWarper(0.7),
        TopKLogitsWarper(50),
        TopPLogitsWarper(0.9),
        MinPLogitsWarper(0.02),
    ):
        scores = step(seen, scores)
    for seed in range(50):
        sampler = Sampler(args, 1, 200, seeds=[seed])
        sampler.see(seen.tolist())
        uniform = torch.rand(1, generator=torch.Generator().manual_seed(seed))
        assert sampler(logits).tolist() == sample(scores.softmax(-1), uniform).tolist()


def test_the_token_that_crosses_top_p_stays():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    assert keep_top_p(logits, 0.6).isfinite().tolist() == [[True, True, False, False]]


def test_frequencies_follow_the_softmax():
    logits = random_logits(rows=1, vocab=12, seed=3) / 2
    rows = 20000
    sampler = Sampler(SamplingArgs(temperature=1.0), rows, 12)
    counts = torch.bincount(sampler(logits.expand(rows, -1)), minlength=12)
    expected = logits[0].softmax(-1) * rows
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 31.3  # 11 degrees of freedom: the 0.1% point


def test_draw_never_lands_on_a_token_without_probability():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    almost_one = 1 - 2.0**-24
    uniform = torch.tensor([0.0, 0.25, 0.499, 0.5, almost_one])
    assert sample(probs.expand(5, -1), uniform).tolist() == [1, 1, 1, 3, 3]


def test_draw_survives_sums_that_are_not_monotone():
    class Wobbly(torch.Tensor):
        """Sums as a parallel scan may give them: one unit in the last place up where nothing was
        added.
        """

        def cumsum(self, dim):
            return torch.tensor([[0.4, 1.0 - 2**-22, 1.0, 1.0 - 2**-22]])

    probs = torch.tensor([[0.4, 0.6, 0.0, 0.0]]).as_subclass(Wobbly)
    assert sample(probs, torch.tensor([1 - 2.0**-24])).tolist() == [1]


def test_a_row_draws_alone():
    args = SamplingArgs(temperature=1.0, seed=11)
    logits = random_logits(rows=3)
    together, alone = Sampler(args, 3, 200), Sampler(args, 1, 200, seeds=[mixed_seed(11, 2)])
    for _ in range(10):
        assert together(logits)[2] == alone(logits[2:])[0]


def test_neighbouring_seeds_share_no_stream():
    logits = torch.zeros(8, 200)
    drawn = []
    for seed in (0, 1, 2**32):
        sampler = Sampler(SamplingArgs(temperature=1.0, seed=seed), 8, 200)
        drawn += list(zip(*(sampler(logits).tolist() for _ in range(6)), strict=True))
    assert len(set(drawn)) == 24


def test_generated_tokens_are_penalised_and_prompts_are_not():
    args = SamplingArgs(frequency_penalty=1.0, presence_penalty=0.5)
    sampler = Sampler(args, 1, 4)
    sampler.see([[0, 0, 0]])
    logits = torch.tensor([[3.0, 2.4, 1.0, 0.0]])
    # Said once, 0 stands at 3 - 1.5 = 1.5 and 1 at 2.4 - 1.5 = 0.9; then 2 at 1.0 beats 0 at 3 -
    # 2.5 and 1.
    assert [sampler(logits).item() for _ in range(4)] == [0, 1, 0, 2]


def test_repetition_counts_prompt_and_answer():
    sampler = Sampler(SamplingArgs(repetition_penalty=2.0), 1, 3)
    sampler.see([[0]])
    logits = torch.tensor([[3.0, 2.4, 1.3]])
    # 0 stands at 1.5 from the start, 1 at 1.2 once it was said.
    assert [sampler(logits).item() for _ in range(3)] == [1, 0, 0]


def test_a_vanishing_temperature_is_greedy():
    logits = random_logits()
    sampler = Sampler(SamplingArgs(temperature=1e-40), 8, 200)
    assert torch.equal(sampler(logits), logits.argmax(-1))
    assert apply_temperature(torch.tensor([[3.0, -math.inf]]), 1e-30).softmax(-1).tolist() == [
        [1.0, 0.0]
    ]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("top_k", 0),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("seed", -1),
    ],
)
def test_impossible_values_are_named(field, value):
    with pytest.raises(RequestError, match=f"^{field}: got "):
        SamplingArgs(**{field: value})


def test_one_seed_per_row():
    with pytest.raises(RequestError, match="seeds: got 2"):
        Sampler(SamplingArgs(), 3, 10, seeds=[1, 2])


@pytest.mark.parametrize(
    ("args", "warped"),
    [
        (SamplingArgs(), lambda x: x),
        (SamplingArgs(1.0), lambda x: x),
        (
            SamplingArgs(0.7, top_k=5),
            lambda x: TopKLogitsWarper(5)(None, TemperatureLogitsWarper(0.7)(None, x)),
        ),
    ],
    ids=["greedy", "as it is", "apply_temperature and cut"],
)
def test_log_probabilities_are_those_of_the_distribution_drawn_from(args, warped):
    logits, found = random_logits(), []
    sampler = Sampler(args, 8, 200, log_probs=found)
    ids = [sampler(logits) for _ in range(3)]
    theirs = warped(logits).log_softmax(-1)
    for drawn, log_probs in zip(ids, found, strict=True):
        torch.testing.assert_close(log_probs, theirs.gather(1, drawn[:, None])[:, 0])


def test_numbers_that_are_drawn_ahead_are_those_drawn_one_by_one():
    logits = torch.zeros(2, 1000).double()
    sampler = Sampler(SamplingArgs(temperature=1.0), 2, 1000, [3, 4])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    for _ in range(130):  # more than are drawn at a time
        numbers = torch.cat([torch.rand(1, generator=one) for one in generators])
        assert torch.equal(sampler(logits), sample(logits.softmax(-1), numbers))
