"""A device that runs one step ahead of the tokens that are read gives the same result as one that
waits. The order of such a device is played on the CPU.
"""

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.base.errors import WorkError
from transom.base.runtime import one_thread
from transom.inference import loop
from transom.inference.loop import generate, stream
from transom.inference.sampling import SamplingArgs

KINDS = {
    "full": {},
    "window": {"sliding_window": 5},
    "chunk": {"attention_chunk_size": 6, "nope_layer_interval": 2},
    "experts": {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 32}},
}
PROMPTS = [list(range(1, 20)), [7], [5, 9, 30, 2]]
STEPS = 14
SAMPLING = SamplingArgs(temperature=1.0, top_p=0.95, presence_penalty=0.3)


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def run(model, prompts, *, stop_tokens=(), cut=None, slack=0):
    """Tokens, log-probabilities, lengths and continuation of a run that is closed after `cut`
    steps.
    """
    cache, log_probs = model.make_cache(len(prompts), 60, slack=slack), []
    options = {"sampling": SAMPLING, "cache": cache, "log_probs": log_probs}
    steps = stream(model, prompts, max_new_tokens=STEPS, stop_tokens=stop_tokens, **options)
    ids = []
    for one in steps:
        ids.append(one)
        assert len(log_probs) == len(ids)
        if len(ids) == cut:
            steps.close()
    new = [[row[i] for row in ids if row[i] is not None] for i in range(len(prompts))]
    lengths = cache.lengths_B.tolist()
    assert lengths == [len(p) + len(row) - 1 for p, row in zip(prompts, new, strict=True)]
    numbers = [
        row[: len(one)].tolist() for row, one in zip(torch.stack(log_probs, 1), new, strict=True)
    ]
    texts = [[*prompt, *row, 3] for prompt, row in zip(prompts, new, strict=True)]
    return ids, numbers, lengths, list(stream(model, texts, max_new_tokens=4, cache=cache))


@pytest.fixture
def both(monkeypatch):
    """Runs a function with a device that waits, and with one that runs ahead."""

    def run_both(function):
        waits = function()
        monkeypatch.setattr(loop, "runs_ahead", lambda device: True)
        ahead = function()
        monkeypatch.undo()
        return waits, ahead

    return run_both


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_finish_at_different_steps(kind, both):
    model = random_model(tiny_args(**KINDS[kind])).double()
    free = [list(row) for row in zip(*run(model, PROMPTS)[0], strict=True)]
    stops = [free[0][3], free[1][8], free[2][11]]
    waits, ahead = both(lambda: run(model, PROMPTS, stop_tokens=stops))
    assert 3 < len(waits[0]) < STEPS and any(None in row for row in waits[0])
    assert ahead == waits


@pytest.mark.parametrize("kind", ["full", "window"])
@pytest.mark.parametrize("cut", [1, 6, 13, 14])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["batch", "alone"])
def test_a_stream_that_is_closed_early(kind, cut, prompts, both):
    model = random_model(tiny_args(**KINDS[kind])).double()
    stop = run(model, prompts)[0][4][0]
    waits, ahead = both(lambda: run(model, prompts, stop_tokens=[stop], cut=cut))
    assert ahead == waits


def test_a_ring_that_was_rolled_back_as_far_as_it_goes(both):
    model = random_model(tiny_args(**KINDS["window"])).double()
    prompts = [list(range(1, 40)), list(range(20, 50))]

    def after_rollback():
        cache = model.make_cache(2, 80, slack=3)
        list(stream(model, prompts, max_new_tokens=1, cache=cache))
        assert cache.rollback(4, 4)
        texts = [prompt[:-3] for prompt in prompts]
        free = list(stream(model, texts, max_new_tokens=9, cache=cache.fork([0, 1])))
        options = {"max_new_tokens": 9, "stop_tokens": [free[2][0]], "cache": cache}
        return list(stream(model, texts, **options)), cache.lengths_B.tolist()

    waits, ahead = both(after_rollback)
    assert waits == ahead


def test_keys_that_are_computed_again_for_longer_sequences(both):
    scaling = {"kind": "dynamic", "factor": 4.0, "original_max_seq_len": 24}
    model = random_model(tiny_args(rope_scaling=scaling)).double()
    stop = int(generate(model, PROMPTS, STEPS)[1, -2])
    waits, ahead = both(lambda: generate(model, PROMPTS, STEPS, stop_tokens=[stop]))
    assert torch.equal(waits, ahead)


def test_logits_that_break_are_not_yielded(both):
    model = random_model(tiny_args()).double()
    prompt = [1, 2]
    first = int(generate(model, [prompt], 1)[0, -1])
    model.tok_embeddings.weight.data[first] = float("nan")

    def tokens_before_the_error():
        got = []
        with pytest.raises(WorkError, match="logits: got NaN"):
            got += stream(model, [prompt], max_new_tokens=4)
        return got

    waits, ahead = both(tokens_before_the_error)
    assert ahead == waits == [[first]]
