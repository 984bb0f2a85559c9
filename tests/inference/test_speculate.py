"""Speculative decoding: the tokens of plain decoding, or sampled ones of the same distribution."""

from collections import Counter

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.base.runtime import one_thread
from transom.inference.decode_args import DecodeArgs
from transom.inference.draft import DraftModel
from transom.inference.loop import generate, stream
from transom.inference.sampler import Sampler
from transom.inference.sampling import SamplingArgs
from transom.inference.speculate import DraftCounts, PromptLookup, Proposal, verify
from transom.layers.inputs import TransformerInput

KINDS = {
    "full": {},
    "window": {"sliding_window": 5},
    "chunk": {"attention_chunk_size": 6, "nope_layer_interval": 2, "n_layers": 4},
    "hybrid": {"layer_pattern": "SCFf", "n_layers": 4, "sliding_window": 5}
    | {"attention_chunk_size": 6},
    "latent": {"n_kv_heads": None}
    | {"mla_args": {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}},
}
PROMPT = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
SAMPLING = [
    SamplingArgs(),
    SamplingArgs(repetition_penalty=1.3, frequency_penalty=0.5, presence_penalty=0.3),
    SamplingArgs(temperature=0.8, seed=3),
    SamplingArgs(temperature=0.7, top_k=20, top_p=0.9, min_p=0.02, repetition_penalty=1.1, seed=5),
]


@pytest.fixture(autouse=True)
def _one_thread():
    with one_thread():
        yield


def model_of(kind="full", seed=0, **changes):
    """A model in float64, whose logits do not depend on the number of tokens of a call."""
    return random_model(tiny_args(**KINDS[kind], **changes), seed, std=0.3).double()


def tokens_of(model, prompt=PROMPT, new=40, sampling=SAMPLING[0], **options):
    steps = stream(model, [prompt], max_new_tokens=new, sampling=sampling, **options)
    return [row[0] for row in steps]


def repeating(model):
    """A prompt that the model's own answer continues, so that look-ups are often right."""
    answer = tokens_of(model)
    return PROMPT + answer + PROMPT


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 6, 32])
def test_greedy_look_up_equals_plain_decoding(kind, most):
    model, counts = model_of(kind), DraftCounts()
    prompt = repeating(model)
    decode = DecodeArgs(prompt_lookup_num_tokens=most)
    assert tokens_of(model, prompt, decode=decode, counts=counts) == tokens_of(model, prompt)
    assert counts.accepted_tokens > 0


class Guesses:
    """Proposes the tokens that plain decoding generates, some of them replaced by wrong ones."""

    def __init__(self, text, wrong=(), vocab=61):
        self.text = [(id + 1) % vocab if place in wrong else id for place, id in enumerate(text)]

    def propose(self, tokens, most, sampler):
        return Proposal(self.text[len(tokens) : len(tokens) + most])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 3, 32])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rejected_tokens_leave_no_trace_in_the_cache(kind, most, dtype):
    model = model_of(kind).to(dtype)  # C++ code runs the blocks in float32
    text = PROMPT + tokens_of(model, new=90)
    wrong = torch.randint(100, (25,), generator=torch.Generator().manual_seed(most)).tolist()
    cache, options = model.make_cache(1, 130), {"decode": DecodeArgs(num_draft_tokens=most)}
    counts, draft = DraftCounts(), Guesses(text, wrong)
    new = tokens_of(model, new=70, cache=cache, draft=draft, counts=counts, **options)
    assert PROMPT + new == text[:80]
    assert 0 < counts.accepted_tokens < counts.drafted_tokens
    assert int(cache.lengths_B[0]) == cache.bound == 79
    assert tokens_of(model, text[:80], new=20, cache=cache) == text[80:]


def test_a_stop_token_among_the_proposals_ends_the_row():
    model = model_of()
    plain = tokens_of(model, new=30)
    stop = plain[10]
    cut = plain[: plain.index(stop) + 1]
    cache, log_probs = model.make_cache(1, 60), []
    options = {"draft": Guesses(PROMPT + plain), "decode": DecodeArgs(num_draft_tokens=7)}
    options |= {"cache": cache, "log_probs": log_probs}
    assert tokens_of(model, new=30, stop_tokens=[stop], **options) == cut
    assert len(log_probs) == len(cut)
    assert int(cache.lengths_B[0]) == len(PROMPT) + len(cut) - 1


@pytest.mark.parametrize("new", [1, 2, 3, 9])
def test_no_token_too_many(new):
    model = model_of()
    plain = tokens_of(model, new=30)
    cache = model.make_cache(1, len(PROMPT) + new - 1)  # the last token is not stored
    options = {"draft": Guesses(PROMPT + plain), "decode": DecodeArgs(num_draft_tokens=4)}
    assert tokens_of(model, new=new, cache=cache, **options) == plain[:new]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [1, 2, 4, 8, 30])
def test_a_stream_that_is_left_early_can_be_continued(kind, read):
    """The cache is ahead of what was read, and closing the stream rolls it back."""
    model = model_of(kind)
    plain = tokens_of(model, new=60)
    cache = model.make_cache(1, 200)
    draft = Guesses(PROMPT + plain, wrong=range(14, 99, 9))
    options = {"draft": draft, "decode": DecodeArgs(num_draft_tokens=6), "cache": cache}
    steps = stream(model, [PROMPT], max_new_tokens=50, **options)
    got = [next(steps)[0] for _ in range(read)]
    assert got == plain[:read]
    assert read - 1 <= int(cache.lengths_B[0]) - len(PROMPT) <= read - 1 + 6
    steps.close()
    assert int(cache.lengths_B[0]) == len(PROMPT) + read - 1
    text = PROMPT + got + [7]
    assert tokens_of(model, text, new=20, cache=cache) == tokens_of(model, text, new=20)


def test_frequencies_of_a_longer_context_are_used_from_the_same_token_on():
    scaling = {"kind": "longrope", "factor": 4.0, "original_max_seq_len": 24}
    scaling |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    model = model_of(rope_scaling=scaling)
    plain = tokens_of(model, new=40)
    options = {"draft": Guesses(PROMPT + plain, wrong=[13, 30]), "decode": DecodeArgs()}
    assert tokens_of(model, new=40, **options) == plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_greedy_draft_model_changes_no_token(kind, seed):
    model, counts = model_of(kind), DraftCounts()
    draft = DraftModel(model_of(kind, seed))
    decode = DecodeArgs(num_draft_tokens=5)
    plain = tokens_of(model, new=60)
    assert tokens_of(model, new=60, decode=decode, draft=draft, counts=counts) == plain
    assert counts.drafted_tokens > 0
    if seed == 0:  # the model itself
        assert counts.accepted_tokens == counts.drafted_tokens
    again = tokens_of(model, PROMPT + plain[:9] + [3], decode=decode, draft=draft)
    assert again == tokens_of(model, PROMPT + plain[:9] + [3])  # the draft cache is rolled back


@pytest.mark.parametrize("sampling", SAMPLING)
def test_look_up_keeps_the_tokens_of_a_seed(sampling):
    """Proposals of point masses are accepted if the sampler draws them: nothing else changes."""
    model, counts = model_of(), DraftCounts()
    prompt, decode = repeating(model), DecodeArgs(prompt_lookup_num_tokens=8)
    expected, log_probs = [], []
    plain = tokens_of(model, prompt, sampling=sampling, log_probs=expected)
    found = tokens_of(
        model, prompt, sampling=sampling, decode=decode, counts=counts, log_probs=log_probs
    )
    assert found == plain
    torch.testing.assert_close(torch.cat(log_probs), torch.cat(expected))
    assert counts.drafted_tokens > 0


def exact_probabilities(model, prompt, sampling, count):
    """The probability of every continuation of `count` tokens, from one forward per prefix."""
    vocab = model.args.vocab_size
    probabilities = {(): 1.0}
    for _ in range(count):
        longer = {}
        for text, probability in probabilities.items():
            logits = model(TransformerInput(torch.tensor([[*prompt, *text]]))).logits[:, -1]
            seen, counts = torch.zeros(1, vocab, dtype=torch.bool), torch.zeros(1, vocab)
            seen[0, prompt] = True
            for id in text:
                counts[0, id] += 1
            given = (seen if sampling.reads_prompt else None,)
            given += (counts if sampling.counts_tokens else None,)
            for id, p in enumerate(sampling.adjust(logits, *given).softmax(-1)[0].tolist()):
                longer[(*text, id)] = probability * p
        probabilities = longer
    return probabilities


def chi_square_excess(sampling, draws):
    """How far sampled answers are from their distribution, in standard deviations."""
    shape = {"vocab_size": 5, "dim": 8, "n_heads": 2, "n_kv_heads": 1, "hidden_dim": 8}
    model, other = (random_model(tiny_args(**shape, n_layers=1), s, std=0.9) for s in (0, 1))
    prompt, draft = [1, 2, 3, 1], DraftModel(other)
    with torch.inference_mode():
        expected = exact_probabilities(model, prompt, sampling, 3)
    counts, found = DraftCounts(), Counter()
    for seed in range(draws):
        options = {"seeds": [seed], "draft": draft, "counts": counts}
        options["decode"] = DecodeArgs(num_draft_tokens=2)
        found[tuple(tokens_of(model, prompt, 3, sampling, **options))] += 1
    assert 0.2 < counts.accepted_tokens / counts.drafted_tokens < 0.9
    assert all(expected[text] > 0 for text in found)
    rare = [text for text, p in expected.items() if draws * p < 5]
    cells = [([text], p) for text, p in expected.items() if text not in rare]
    cells.append((rare, sum(expected[text] for text in rare)))
    chi = sum(
        (sum(found[t] for t in texts) - draws * p) ** 2 / (draws * p) for texts, p in cells if p
    )
    freedom = len(cells) - 1
    return (chi - freedom) / (2 * freedom) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("sampling", SAMPLING[2:])
def test_a_draft_model_keeps_the_distribution(sampling):
    assert chi_square_excess(sampling, 2000) < 3.5


@pytest.mark.slow
def test_a_wrong_rule_of_rejection_fails_the_test_above(monkeypatch):
    """Drawing a replacement from the model's distribution, and not from the rest of it."""

    def wrong(self, logits_1V, drafted, probs_V):
        wanted_1V = self.adjusted(logits_1V).softmax(-1)
        if bool(self.uniform(probs_V.device) * probs_V[drafted] < wanted_1V[0, drafted]):
            ids_1 = torch.tensor([drafted])
        else:
            ids_1 = torch.multinomial(wanted_1V[0], 1)
        self._record(self.adjusted(logits_1V), ids_1)
        return int(ids_1)

    monkeypatch.setattr(Sampler, "accept_or_replace", wrong)
    assert chi_square_excess(SAMPLING[2], 2000) > 6


def test_distributions_that_share_no_token_are_replaced_by_that_of_the_model():
    """A vanishing temperature leaves one token of each."""
    sampler = Sampler(SamplingArgs(temperature=1e-9), 1, 5)
    logits_1V = torch.tensor([[0.0, 3.0, 1.0, 0.0, 0.0]])
    for drafted, found in ((2, 1), (1, 1)):
        probs_V = torch.nn.functional.one_hot(torch.tensor(drafted), 5).float()
        assert sampler.accept_or_replace(logits_1V, drafted, probs_V) == found


def test_a_draft_model_may_end_before_the_model():
    model, counts = model_of(), DraftCounts()
    draft = DraftModel(model_of(max_seq_len=24))
    options = {"draft": draft, "counts": counts}
    assert tokens_of(model, new=40, **options) == tokens_of(model, new=40)
    assert 0 < counts.drafted_tokens < 20


@pytest.mark.parametrize("rows", [50, 70])
def test_a_draft_model_may_have_other_unused_rows(rows):
    """Models round their vocabulary up differently; ids without a token are never generated."""
    model, draft = model_of(), DraftModel(random_model(tiny_args(vocab_size=rows)))
    sampling = SamplingArgs(temperature=1.0, repetition_penalty=1.2)
    found = tokens_of(model, sampling=sampling, draft=draft)
    assert len(found) == 40


def test_an_interrupted_draft_is_computed_again(monkeypatch):
    model = model_of()
    draft = DraftModel(model_of(seed=1))
    attention = draft.model.layers[1].attention
    forward, calls = attention.forward, []

    def interrupt(*args):
        calls.append(None)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return forward(*args)

    monkeypatch.setattr(attention, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(model, draft=draft, new=60)
    counts = DraftCounts()
    assert tokens_of(model, draft=draft, new=60, counts=counts) == tokens_of(model, new=60)
    fresh = DraftCounts()
    tokens_of(model, draft=DraftModel(model_of(seed=1)), new=60, counts=fresh)
    assert counts == fresh


def test_nan_logits_after_a_proposal_are_not_sampled():
    model = model_of()
    plain = tokens_of(model, new=4)
    model.tok_embeddings.weight.data[plain[1]] = float("nan")
    options = {"draft": Guesses(PROMPT + plain), "decode": DecodeArgs(num_draft_tokens=3)}
    with pytest.raises(WorkError, match="logits: got NaN"):
        tokens_of(model, new=6, **options)


def test_nan_logits_after_a_rejected_proposal_do_not_end_the_text():
    logits_TV = torch.zeros(2, 61)
    logits_TV[0, 5], logits_TV[1] = 1, float("nan")
    sampler = Sampler(SamplingArgs(), 1, 61)
    assert verify(sampler, logits_TV, Proposal([7]), ()) == [5]


@pytest.mark.parametrize(
    ("tokens", "most", "found"),
    [
        ([7], 4, []),
        ([1, 2, 3, 4], 4, []),
        ([1, 2, 9, 3, 1, 2], 4, [9, 3]),  # as many as the places have in common
        ([5, 1, 2, 9, 3, 4, 5, 1, 2], 8, [9, 3, 4]),
        ([5, 1, 2, 9, 3, 4, 5, 1, 2], 1, [9]),
        ([1, 2, 7, 1, 2, 8, 4, 1, 2], 4, [8, 4]),  # the latest place
        ([6, 1, 2, 7, 1, 2, 8, 6, 1, 2], 2, [7, 1]),  # the longest n-gram
        ([4, 4, 4, 4], 6, [4, 4, 4]),  # a text that repeats itself
        ([1, 2, 1, 2, 1, 2], 3, [1, 2, 1]),
        ([1, 1], 3, []),
        ([1, 2, 9, 1, 2], 0, []),
    ],
)
def test_what_is_looked_up(tokens, most, found):
    sampler = Sampler(SAMPLING[0], 1, 61)
    assert PromptLookup().propose(tokens, most, sampler).ids == found
    growing = PromptLookup()
    for count in range(1, len(tokens)):
        growing.propose(tokens[:count], most, sampler)
    assert growing.propose(tokens, most, sampler).ids == found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"prompts": [[1], [2]]}, "prompts: got '2 rows'; expected one row"),
        ({"slack": 3}, "prompt_lookup_num_tokens: got 4; expected at most the cache's slack of 3"),
        ({"draft": Guesses([])}, "prompt_lookup_num_tokens: got 4; expected none with a draft"),
    ],
)
def test_a_request_that_cannot_be_speculated_on_is_refused(options, sentence):
    model = model_of("window")
    prompts, slack = options.pop("prompts", [PROMPT]), options.pop("slack", 32)
    cache = model.make_cache(len(prompts), 60, slack=slack)
    decode = DecodeArgs(prompt_lookup_num_tokens=4)
    with pytest.raises(RequestError, match=sentence):
        stream(model, prompts, max_new_tokens=4, cache=cache, decode=decode, **options)


@pytest.mark.parametrize("most", [0, 33])
def test_the_number_of_proposals_has_bounds(most):
    with pytest.raises(RequestError, match=f"num_draft_tokens: got {most}"):
        DecodeArgs(num_draft_tokens=most)


def test_a_number_of_proposals_needs_a_draft_model():
    with pytest.raises(RequestError, match="num_draft_tokens: got 8; expected a draft model"):
        generate(model_of("full"), [PROMPT], 4, num_draft_tokens=8)


def test_generate_takes_the_options():
    model = model_of()
    prompt = repeating(model)
    plain = generate(model, [prompt], 20)
    assert torch.equal(generate(model, [prompt], 20, prompt_lookup_num_tokens=8), plain)
    assert torch.equal(generate(model, [prompt], 20, draft=DraftModel(model)), plain)
