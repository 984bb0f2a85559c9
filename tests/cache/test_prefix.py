"""A cache that was filled from stored prefixes continues as one that has run all tokens."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.cache.model_cache import ModelCache
from transom.cache.prefix import PrefixCache
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

STEP, SLACK, TOTAL = 8, 3, 60
WINDOW, CHUNK = 5, 6
MLA = {"kv_lora_rank": 12, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 8}
PATTERNS = {
    "full": {},
    "window": {"sliding_window": WINDOW},
    "wide window": {"sliding_window": 20},
    "chunk": {"attention_chunk_size": CHUNK},
    "hybrid": {
        "layer_pattern": "SCFf",
        "n_layers": 4,
        "sliding_window": WINDOW,
        "attention_chunk_size": CHUNK,
    },
    "latent": {"n_kv_heads": None, "mla_args": MLA},
}
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


@functools.cache
def model_of(pattern: str) -> LLM:
    return random_model(tiny_args(max_seq_len=256, **PATTERNS[pattern]), std=0.3).double()


@torch.no_grad()
def run(model: LLM, cache: ModelCache, tokens: list[int], step: int = STEP) -> torch.Tensor:
    """Logits [T, V] of the tokens, which are passed in calls of `step`."""
    parts = [tokens[i : i + step] for i in range(0, len(tokens), step)]
    return torch.cat([model(TransformerInput(torch.tensor([p])), cache).logits[0] for p in parts])


def stored(model: LLM, tokens: list[int], capacity: int = 256) -> PrefixCache:
    """The prefixes of a prompt that was passed in calls of `STEP` tokens."""
    prefixes = PrefixCache(model.args, slack=SLACK)
    cache = model.make_cache(1, capacity, slack=SLACK)
    for start in range(0, len(tokens), STEP):
        run(model, cache, tokens[start : start + STEP])
        prefixes.add(cache, 0, tokens[: start + STEP])
    return prefixes


def words(seed: int, count: int = TOTAL) -> list[int]:
    return random_tokens(1, count, seed)[0].tolist()


@by_pattern
@pytest.mark.parametrize("shared", [1, 7, 8, 9, 31, 32, 47, 50, 58, 59])
def test_a_restored_prefix_continues_as_one_that_has_run(pattern, shared):
    """Bit for bit at an edge of calls; inside a call its tokens had another shape of product."""
    model, first = model_of(pattern), words(0)
    prompt = first[:shared] + words(1)
    prefixes, cache = stored(model, first), model.make_cache(1, 256, slack=SLACK)
    (count,) = prefixes.restore(cache, [prompt])
    everywhere = pattern in ("full", "latent", "wide window")
    assert count <= shared
    assert count >= (shared if everywhere else shared // STEP * STEP)
    cold = model.make_cache(1, 256, slack=SLACK)
    if count:
        run(model, cold, prompt[:count])
    error = run(model, cache, prompt[count:]) - run(model, cold, prompt[count:])
    assert error.abs().max() <= (1e-12 if count % STEP else 0.0)


@by_pattern
@pytest.mark.parametrize("capacities", [(256, 64), (64, 256), (256, 300)])
def test_the_capacities_of_the_two_caches_may_differ(pattern, capacities):
    model, first = model_of(pattern), words(0, 24)
    prefixes = stored(model, first, capacities[0])
    cache, cold = (model.make_cache(1, capacities[1], slack=SLACK) for _ in range(2))
    (count,) = prefixes.restore(cache, [first + words(1, 9)])
    assert count == 24
    run(model, cold, first)
    torch.testing.assert_close(run(model, cache, words(1, 9)), run(model, cold, words(1, 9)))


@by_pattern
def test_rows_are_restored_separately(pattern):
    model, first, other = model_of(pattern), words(0), words(1)
    prefixes = stored(model, first)
    prompts = [first[:32] + other[:5], other[:9], first[:8] + other[:2]]
    cache = model.make_cache(3, 256, slack=SLACK)
    counts = prefixes.restore(cache, prompts)
    assert counts == [32, 0, 8]
    rest = [prompt[count:] for prompt, count in zip(prompts, counts, strict=True)]
    lengths = torch.tensor(list(map(len, rest)))
    padded = torch.tensor([row + [0] * (9 - len(row)) for row in rest])
    with torch.no_grad():
        logits = model(TransformerInput(padded, lengths=lengths, logits="last"), cache).logits
    for row, prompt in enumerate(prompts):
        alone = run(model, model.make_cache(1, 256, slack=SLACK), prompt)[-1]
        torch.testing.assert_close(logits[row, 0], alone)


@by_pattern
def test_a_rollback_after_a_restore_is_exact_or_refused(pattern):
    model, first, other = model_of(pattern), words(0), words(1)
    prefixes = stored(model, first)
    for ran in (0, 2):
        for back in range(1, 12):
            cache = model.make_cache(1, 256, slack=SLACK)
            (count,) = prefixes.restore(cache, [first])
            if ran:
                run(model, cache, other[:ran])
            before = (first[:count] + other[:ran])[:-back]
            if not cache.rollback(back, back):
                assert back > min(SLACK + 1, SLACK + ran)
                continue
            cold = model.make_cache(1, 256, slack=SLACK)
            run(model, cold, before)
            torch.testing.assert_close(run(model, cache, other[:7]), run(model, cold, other[:7]))


def test_what_was_used_longest_ago_goes_first():
    model = model_of("hybrid")
    one, two, three = words(0, 16), words(1, 16), words(2, 16)
    probe = model.make_cache(1, 256, slack=SLACK)
    prefixes = stored(model, one)
    per_prompt = prefixes.bytes
    assert per_prompt == sum(node.bytes for _, node in prefixes.nodes()) > 0
    prefixes.max_bytes = 2 * per_prompt

    def add(tokens):
        cache = model.make_cache(1, 256, slack=SLACK)
        for start in (0, STEP):
            run(model, cache, tokens[start : start + STEP])
            prefixes.add(cache, 0, tokens[: start + STEP])

    add(two)
    prefixes.restore(model.make_cache(1, 256, slack=SLACK), [[*one, 0]])
    add(three)
    assert prefixes.bytes <= prefixes.max_bytes
    assert [prefixes.match(tokens, probe)[1] for tokens in (one, two, three)] == [16, 0, 16]


def test_states_of_other_frequencies_or_variants_are_not_used():
    scaling = {"kind": "dynamic", "factor": 4.0, "original_max_seq_len": 32}
    model = random_model(tiny_args(rope_scaling=scaling)).double()
    prefixes, first = stored(model, words(0, 16), 32), [*words(0, 16), 1]
    assert prefixes.restore(model.make_cache(1, 20, slack=SLACK), [first]) == [16]
    assert prefixes.restore(model.make_cache(1, 64, slack=SLACK), [first]) == [0]
    prefixes.variant = "an adapter"
    assert prefixes.restore(model.make_cache(1, 32, slack=SLACK), [first]) == [0]


def test_a_ring_that_was_rolled_back_stores_nothing():
    """It has overwritten the oldest tokens of its snapshot."""
    model, first = model_of("window"), words(0, 40)
    prefixes, cache = PrefixCache(model.args, slack=SLACK), model.make_cache(1, 256, slack=SLACK)
    run(model, cache, first)
    assert cache.rollback(3, 3)
    prefixes.add(cache, 0, first[:37])
    assert prefixes.bytes == 0
    run(model, cache, first[37:])
    prefixes.add(cache, 0, first)
    assert prefixes.bytes > 0


def test_codes_of_8_bits_are_restored_with_their_scales():
    model, first = model_of("hybrid"), words(0, 24)
    caches = [model.make_cache(1, 256, slack=SLACK, kv_bits=bits) for bits in (8, 8, 8, 16)]
    prefixes = PrefixCache(model.args, slack=SLACK)
    run(model, caches[0], first)
    prefixes.add(caches[0], 0, first)
    assert prefixes.restore(caches[1], [[*first, 0]]) == [24]
    run(model, caches[2], first)
    assert torch.equal(run(model, caches[1], words(1, 9)), run(model, caches[2], words(1, 9)))
    assert prefixes.restore(caches[3], [[*first, 0]]) == [0]


def test_a_model_that_reads_a_context_is_refused():
    with pytest.raises(RequestError, match="context: got a model that reads one"):
        PrefixCache(tiny_args(context_dim=8))
