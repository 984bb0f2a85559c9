"""Multiple choice against sums of log-probabilities that `transformers` finds."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.twins import LONGEST
from transom.base.errors import RequestError
from transom.evaluation.choices import encode_pair, score_choices
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.task_data import ChoiceRow, DataSet

ROWS = [
    ChoiceRow(
        "a:1",
        "The quick brown fox jumps over the lazy",
        ("dog", "fox and the dog", "naïve café"),
        0,
    ),
    ChoiceRow("a:2", "One of ", ("A", "B", "C", "D"), 3),
    ChoiceRow("a:3", "Größe und", ("日本語", "emoji"), 1),
]


def logprob(model, tokenizer, prompt, choice):
    """By one forward of `transformers` per choice."""
    head, ids = tokenizer(prompt.rstrip()).input_ids, tokenizer(f"{prompt} {choice}").input_ids
    with torch.no_grad():
        logp_TV = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(logp_TV[at - 1, ids[at]]) for at in range(len(head), len(ids)))


def score(model, rows, **args):
    return score_choices(model, DataSet("a", "choices", rows), EvalArgs(**args))


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_log_probabilities_are_those_of_transformers(folder, opened, batch_tokens):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    got = score(opened, ROWS, batch_tokens=batch_tokens)
    for row, found in zip(ROWS, got.rows, strict=True):
        want = [logprob(model, tokenizer, row.prompt, choice) for choice in row.choices]
        assert found["logprobs"] == pytest.approx(want, rel=1e-5)
        assert found["acc"] == np.argmax(want)
    assert (got.facts["ties"], got.facts["cut"]) == (0, 0)


def test_lengths_divide_by_characters_or_bytes(opened):
    row = ChoiceRow("a:1", "Größe", ("é" * 8, "abcdefghij"), 0)
    got = score(opened, [row])
    (found,) = got.rows
    some = found["logprobs"]
    assert found["acc_norm"] == np.argmax([some[0] / 8, some[1] / 10])
    assert found["acc_bytes"] == np.argmax([some[0] / 16, some[1] / 10])
    assert got.scores["acc_bytes"].score == (found["acc_bytes"] == 0)


def test_ties_are_counted_and_the_first_counts(opened):
    got = score(opened, [ChoiceRow("a:1", "The", ("dog", "dog"), 1)])
    assert (got.facts["ties"], got.rows[0]["acc"], got.scores["acc"].score) == (1, 0, 0.0)


def test_what_does_not_fit_is_cut_from_the_left(opened):
    long = ChoiceRow("a:1", "x " * LONGEST + "The quick brown", ("fox", "dog"), 0)
    assert score(opened, [long, ROWS[0]]).facts["cut"] == 2
    head, rest = encode_pair(opened, long.prompt, " fox", "")
    assert len(head) + len(rest) > LONGEST + 1
    with pytest.raises(RequestError, match="tokens of a continuation: got"):
        score(opened, [ChoiceRow("a:1", "The", ("x " * LONGEST, "dog"), 0)])


def test_spaces_before_the_boundary_belong_to_the_continuation(opened):
    head, rest = encode_pair(opened, "One of ", " A", "")
    assert (
        head == opened.tokenizer.encode_prompt("One of") and opened.tokenizer.decode(rest) == "  A"
    )
