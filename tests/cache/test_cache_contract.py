"""One contract for every cache: however the tokens arrive, logits are those of one uncached
forward.

The models are float64, so that equal means equal to 1e-9 and a single wrong key is plain to see.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.base.runtime import one_thread
from transom.cache.model_cache import ModelCache
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

WINDOW, CHUNK = 5, 6
PATTERNS = {
    "full": {},
    "window": {"sliding_window": WINDOW},
    "chunk": {
        "attention_chunk_size": CHUNK,
        "nope_layer_interval": 2,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
    },
    "mixed": {
        "layer_pattern": "SCFf",
        "n_layers": 4,
        "sliding_window": WINDOW,
        "attention_chunk_size": CHUNK,
    },
}
LATENT = {"kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
PATTERNS |= {
    "mixed, 8 bits": PATTERNS["mixed"],
    "latent, 8 bits": {
        "mla_args": LATENT,
        "n_kv_heads": None,
        "layer_pattern": "FS",
        "sliding_window": WINDOW,
    },
}
RINGS = ["window", "chunk", "mixed", "mixed, 8 bits", "latent, 8 bits"]
PAD = 60  # a token that no row contains
COUNT = 34
by_pattern = pytest.mark.parametrize("pattern", PATTERNS)
by_slack = pytest.mark.parametrize("slack", [0, 3])


@pytest.fixture(autouse=True, scope="module")
def small_steps():
    """One thread, and views and blocks cut often enough that a few dozen tokens cross several
    cuts.
    """
    with one_thread(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("transom.cache.store.BUCKET", 8)
        patch.setattr("transom.attention.sdpa.BLOCK", 8)
        yield


@functools.cache
def model_of(pattern: str) -> LLM:
    args = tiny_args(dim=16, hidden_dim=24, max_seq_len=64, **PATTERNS[pattern])
    return random_model(args, std=0.3).double()


def new_cache(pattern: str, *sizes: int, slack: int = 32) -> ModelCache:
    return model_of(pattern).make_cache(*sizes, slack=slack, kv_bits=bits_of(pattern))


def bits_of(pattern: str) -> int:
    return 8 if pattern.endswith("8 bits") else 16


@torch.no_grad()
def uncached(pattern: str, tokens: Tensor) -> Tensor:
    """Return the logits of one forward without a cache; with 8 bits, of one call that fills one,
    since queries read rounded states.
    """
    cache = new_cache(pattern, *tokens.shape) if bits_of(pattern) == 8 else None
    return model_of(pattern)(TransformerInput(tokens), cache).logits


@torch.no_grad()
def feed(
    pattern: str, cache: ModelCache, tokens: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    """Logits of one cached call; the spare slot that takes padding is poisoned behind it."""
    counts = None if lengths is None else torch.tensor(lengths)
    logits = model_of(pattern)(TransformerInput(tokens, lengths=counts), cache=cache).logits
    for layer in cache.layers:
        for state in layer.scales or layer.states:
            state[:, -1] = float("nan")
    return logits


def same(mine: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(mine, expected, rtol=0, atol=1e-9)


def cut(total: int, sizes: Sequence[int]) -> list[int]:
    """`sizes` repeated until they make `total`, the last one shortened."""
    out: list[int] = []
    while sum(out) < total:
        out.append(min(sizes[len(out) % len(sizes)], total - sum(out)))
    return out


CALLS = {
    "ones": [1],
    "whole": [COUNT],
    "uneven": [3, 7, 1, 1, 12, 2],
    "larger than the ring": [16],
    "slack + 1": [2, 1, 4],  # the largest written through, for slack 0 and for slack 3
    "slack + 2": [1, 2, 5],  # the smallest read side by side
}


@by_pattern
@by_slack
@pytest.mark.parametrize("calls", CALLS)
def test_any_call_sizes_equal_one_uncached_forward(pattern, slack, calls):
    tokens = random_tokens(2, COUNT)
    cache = new_cache(pattern, 2, COUNT, slack=slack)
    logits = [feed(pattern, cache, part) for part in tokens.split(cut(COUNT, CALLS[calls]), dim=1)]
    same(torch.cat(logits, 1), uncached(pattern, tokens))


def pad(rows: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Rows of unequal lengths padded on the right, with their lengths."""
    lengths = [row.numel() for row in rows]
    return torch.stack(
        [torch.cat((row, row.new_full((max(lengths) - row.numel(),), PAD))) for row in rows]
    ), lengths


@by_pattern
@by_slack
@pytest.mark.parametrize("poison", ["another token", "NaN"])
def test_rows_of_unequal_lengths_equal_each_row_alone(pattern, slack, poison):
    """Prefill, a long padded call, a decode step that one row sits out, and plain decoding."""
    model, sequences = model_of(pattern), random_tokens(3, COUNT)
    cache = new_cache(pattern, 3, 2 * COUNT, slack=slack)
    calls = [(9, 4, 1), (10, 3, 12), (1, 0, 1), (2, 3, 0), *[(1, 1, 1)] * 6]
    embedding, got, at = model.tok_embeddings.weight, [[], [], []], [0, 0, 0]
    kept = embedding[PAD].clone()
    try:
        if poison == "NaN":
            embedding.data[PAD] = float("nan")
        for counts in calls:
            tokens, lengths = pad(
                [row[a : a + n] for row, a, n in zip(sequences, at, counts, strict=True)]
            )
            logits = feed(pattern, cache, tokens, None if len(set(lengths)) == 1 else lengths)
            for row, n in enumerate(counts):
                got[row].append(logits[row, :n])
                at[row] += n
    finally:
        embedding.data[PAD] = kept
    assert cache.lengths_B.tolist() == at
    for row in range(3):
        same(torch.cat(got[row]), uncached(pattern, sequences[row : row + 1, : at[row]])[0])


def continues_as(pattern: str, cache: ModelCache, prefixes: Tensor, seed: int = 9) -> None:
    """The next tokens of `cache` get the logits of rows that only ever contained `prefixes`."""
    tokens = random_tokens(prefixes.size(0), 8, seed)
    logits = torch.cat([feed(pattern, cache, part) for part in tokens.split([1, 5, 2], dim=1)], 1)
    same(logits, uncached(pattern, torch.cat((prefixes, tokens), 1))[:, -8:])


@by_pattern
@by_slack
@pytest.mark.parametrize("prefill", [[24], [23, 1]], ids=["prefill", "decode"])
def test_rollback_equals_never_having_seen_the_tokens(pattern, slack, prefill):
    """For every count up to the limit; one more is refused, and nothing has changed."""
    tokens = random_tokens(2, 24)
    limit = slack + 1 if pattern in RINGS else 24
    for count in range(limit + 1):
        cache = new_cache(pattern, 2, COUNT, slack=slack)
        for part in tokens.split(prefill, dim=1):
            feed(pattern, cache, part)
        if pattern in RINGS:
            before = cache.snapshot()
            assert not cache.rollback(limit + 1, at_most=limit + 1)
            after = cache.snapshot()
            assert all(
                torch.equal(after[key].nan_to_num(), before[key].nan_to_num()) for key in before
            )
        assert cache.rollback(count, at_most=count)
        continues_as(pattern, cache, tokens[:, : 24 - count])


@by_pattern
def test_short_sequences_roll_back_to_nothing(pattern):
    """A ring that has not been full has forgotten nothing."""
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, random_tokens(2, 8))
    assert cache.rollback(8, at_most=8)
    continues_as(pattern, cache, random_tokens(2, 0))


@pytest.mark.parametrize("pattern", RINGS)
def test_two_rollbacks_share_one_limit(pattern):
    tokens = random_tokens(2, 24)
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, tokens)
    assert cache.rollback(2, at_most=2)
    assert not cache.rollback(3, at_most=3), "2 + 3 is more than slack + 1"
    assert cache.rollback(2, at_most=2)
    feed(pattern, cache, tokens[:, 20:21])  # one token back: one more may go
    assert not cache.rollback(2, at_most=2)
    assert cache.rollback(1, at_most=1)
    continues_as(pattern, cache, tokens[:, :20])


@pytest.mark.parametrize("pattern", RINGS)
def test_a_row_that_sat_out_a_call_has_regained_nothing(pattern):
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, random_tokens(2, 24))
    assert cache.rollback(4, at_most=4)
    feed(pattern, cache, random_tokens(2, 1), lengths=[1, 0])
    assert not cache.rollback(torch.tensor([0, 1]), at_most=1)


@by_pattern
def test_rollback_by_a_count_per_row(pattern):
    tokens = random_tokens(3, 24)
    cache = new_cache(pattern, 3, COUNT, slack=3)
    feed(pattern, cache, tokens)
    assert cache.rollback(torch.tensor([0, 4, 1]), at_most=4)
    rows = [torch.cat((row[: 24 - n], row[:6])) for row, n in zip(tokens, (0, 4, 1), strict=True)]
    logits = torch.cat(
        [feed(pattern, cache, part) for part in tokens[:, :6].split([1, 5], dim=1)], 1
    )
    for row, sequence in enumerate(rows):
        same(logits[row], uncached(pattern, sequence[None])[0, -6:])


@by_pattern
def test_fork_continues_the_chosen_rows_and_leaves_the_first_cache_alone(pattern):
    tokens = random_tokens(2, 20)
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, tokens)
    assert cache.rollback(1, at_most=1)
    other = cache.fork([1, 0, 1])
    assert other.batch_size == 3
    assert other.fork([0]).rollback(4, at_most=4) is (pattern not in RINGS), (
        "what is spent stays spent"
    )
    continues_as(pattern, other, tokens[[1, 0, 1], :19])
    continues_as(pattern, cache, tokens[:, :19], seed=8)


@by_pattern
def test_snapshot_is_restored_into_the_same_and_into_a_new_cache(pattern):
    tokens = random_tokens(2, 20)
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, tokens)
    assert cache.rollback(1, at_most=1)
    saved = cache.snapshot()
    feed(pattern, cache, random_tokens(2, 9, seed=5))
    for target in (cache, new_cache(pattern, 2, COUNT, slack=3)):
        target.restore(saved)
        # The limit travels too: one of slack + 1 tokens is already spent.
        assert target.rollback(4, at_most=4) is (pattern not in RINGS)
        target.restore(saved)
        continues_as(pattern, target, tokens[:, :19])


@by_pattern
def test_reset_forgets_everything(pattern):
    cache = new_cache(pattern, 2, COUNT, slack=3)
    feed(pattern, cache, random_tokens(2, 20, seed=4))
    cache.rollback(2, at_most=2)
    for layer in cache.layers:
        for state in layer.scales or layer.states:
            state.fill_(float("nan"))
    cache.reset()
    tokens = random_tokens(2, 8)
    logits = torch.cat([feed(pattern, cache, part) for part in tokens.split([5, 1, 2], dim=1)], 1)
    same(logits, uncached(pattern, tokens))
    assert cache.rollback(8, at_most=8), "a ring that starts again has forgotten nothing"


def test_a_forward_that_failed_leaves_the_rollback_limit_alone():
    cache = new_cache("window", 2, COUNT, slack=3)
    feed("window", cache, random_tokens(2, 24))
    assert cache.rollback(4, at_most=4)
    outside = torch.full((2, 2), 10**6)  # no such token, which only the embedding finds out
    with pytest.raises(IndexError):
        model_of("window")(TransformerInput(outside), cache=cache)
    assert not cache.rollback(1, at_most=1)


def test_the_row_that_gets_most_need_not_be_the_one_that_holds_most():
    """Rows of 18 and 2 tokens get 1 and 12 more: 19 slots are enough, though 18 + 12 are not
    there.
    """
    cache, tokens = new_cache("mixed", 2, 19), random_tokens(2, 18)
    feed("mixed", cache, tokens, [18, 2])
    more = random_tokens(2, 12, seed=1)
    got = feed("mixed", cache, more, [1, 12])
    whole = uncached("mixed", torch.cat([tokens[1:, :2], more[1:]], 1))
    same(got[1:], whole[:, 2:])


def test_overflow_is_refused_and_leaves_room_for_what_fits():
    cache = new_cache("mixed", 2, 20)
    tokens = random_tokens(2, 20)
    feed("mixed", cache, tokens[:, :15])
    with pytest.raises(RequestError, match=r"cache: got 15 \+ 6 tokens"):
        feed("mixed", cache, random_tokens(2, 6))
    assert cache.rollback(
        torch.tensor([5, 5]), at_most=5
    )  # the host does not know how long rows are now
    same(feed("mixed", cache, tokens[:, 10:]), uncached("mixed", tokens)[:, 10:])


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda model: model.make_cache(0), "batch_size: got 0"),
        (lambda model: model.make_cache(2, slack=-1), "slack: got -1"),
        (lambda model: model.make_cache(2, kv_bits=4), "kv_bits: got 4"),
        (lambda model: model.make_cache(2).rollback(2, at_most=1), "rollback: got 2"),
        (lambda model: model.make_cache(2).rollback(-1, at_most=1), "rollback: got -1"),
        (
            lambda _: random_model(tiny_args(layer_pattern="FB")).make_cache(),
            "layer 1: got pattern B",
        ),
    ],
)
def test_impossible_caches_and_rollbacks_are_refused(act, message):
    with pytest.raises(RequestError, match=message):
        act(model_of("window"))


def test_cache_filled_under_inference_mode_serves_outside_it():
    model, tokens = model_of("mixed"), random_tokens(2, 20)
    with torch.inference_mode():
        cache = new_cache("mixed", 2, COUNT, slack=3)
        model(TransformerInput(tokens), cache=cache)
        forked, restored = cache.fork([0, 1]), new_cache("mixed", 2, COUNT, slack=3)
        restored.restore(cache.snapshot())
    for each in (cache, forked, restored):
        assert each.rollback(2, at_most=2)
        continues_as("mixed", each, tokens[:, :18])
        each.reset()


@by_pattern
@by_slack
def test_random_walk_of_updates_rollbacks_and_forks(pattern, slack):
    """Whatever was accepted, the rows are those of a plain list of tokens."""
    choose = random.Random(slack)
    rows: list[list[int]] = [[], [], []]
    cache, refused, rolled = new_cache(pattern, 3, 60, slack=slack), 0, 0
    for step in range(70):
        kind = choose.choices(["update", "padded", "rollback", "per row", "fork"], [8, 4, 3, 3, 1])[
            0
        ]
        if max(map(len, rows)) > 44:
            cache.reset()
            rows = [[], [], []]
        if kind in ("update", "padded"):
            most = choose.choice([1, 1, 2, slack + 1, slack + 2, 14])
            counts = [most if kind == "update" else choose.randint(0, most) for _ in rows]
            counts[choose.randrange(3)] = most
            new = random_tokens(3, most, seed=step)
            parts = [row[:n] for row, n in zip(new, counts, strict=True)]
            tokens, lengths = pad(parts)
            logits = feed(pattern, cache, tokens, None if kind == "update" else lengths)
            rows = [row + part.tolist() for row, part in zip(rows, parts, strict=True)]
            whole, ends = pad([torch.tensor(row, dtype=torch.int64) for row in rows])
            expected = uncached(pattern, whole)
            for b, n in enumerate(counts):
                same(logits[b, :n], expected[b, ends[b] - n : ends[b]])
        elif kind == "fork":
            source = [choose.randrange(3) for _ in rows]
            cache, rows = cache.fork(source), [list(rows[i]) for i in source]
        else:
            counts = [choose.randint(0, slack + 2) for _ in rows]
            if kind == "rollback":
                counts = [counts[0]] * 3
            done = cache.rollback(
                counts[0] if kind == "rollback" else torch.tensor(counts), at_most=max(counts)
            )
            refused, rolled = refused + (not done), rolled + done
            if done:
                rows = [row[: max(0, len(row) - n)] for row, n in zip(rows, counts, strict=True)]
        assert cache.lengths_B.tolist() == list(map(len, rows))
    assert rolled > 5, "the walk must have rolled back"
    assert (refused > 0) == (pattern in RINGS), "only rings forget"
