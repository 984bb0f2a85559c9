"""Speculative decoding: cheap proposals for the next tokens, verified by one call of the model.

A call of 1 + k tokens costs little more than a call of one token while decoding is limited by the
memory of the weights. The loop proposes up to k tokens, runs them in one call with the KV cache,
accepts the longest prefix that the model would have generated, and rolls the cache back.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.cache.model_cache import ModelCache
from transom.inference.decode_args import DecodeArgs
from transom.inference.decode_plan import alone, decode_plan
from transom.inference.forward import (
    Tokens,
    check_finite,
    forward_logits,
    not_finite,
    prefill,
    rebuild_larger,
)
from transom.inference.sampler import Sampler
from transom.inference.step_times import part
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

SIZES = (4, 3, 2)  # tokens of the n-grams that are looked up, the longest first


@dataclass
class DraftCounts:
    """How many tokens were proposed, and how many of them the model accepted."""

    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Proposal:
    """Proposed tokens.

    Attributes:
        ids: Their ids, in order.
        probs: The distribution float32 [V] that each was drawn from. Empty where the proposals
            involve no chance, so that each is a point mass.
    """

    ids: list[int] = field(default_factory=list)
    probs: list[Tensor] = field(default_factory=list)


class Proposer(Protocol):
    """Something that proposes the next tokens of one row."""

    def propose(self, tokens: list[int], most: int, sampler: Sampler) -> Proposal:
        """Return at most `most` tokens that may follow `tokens`.

        Args:
            tokens: The ids of the prompt and of the new tokens.
            most: Upper bound of the number of proposals, 0 or more.
            sampler: The sampler of the model, whose options and penalties proposals may follow.
        """


class PromptLookup:
    """Proposes what followed the last tokens where they occurred before (prompt look-up).

    The last 4, 3 or 2 tokens are looked up in the prompt and the answer. At most as many tokens are
    proposed as the two places have in common, so that a short match by chance costs little. If
    the proposals reach the end of the text, the text repeats itself, and so do they.
    """

    def __init__(self) -> None:
        self._next: dict[
            tuple[int, ...], int
        ] = {}  # by n-gram: the place after its last occurrence
        self._seen = 0

    def propose(self, tokens: list[int], most: int, sampler: Sampler) -> Proposal:
        """Return the tokens that followed the latest occurrence of the longest n-gram."""
        for place in range(self._seen + 1, len(tokens)):  # an n-gram counts once a token follows it
            for size in SIZES:
                if size <= place:
                    self._next[tuple(tokens[place - size : place])] = place
        self._seen = max(self._seen, len(tokens) - 1)
        for size in SIZES:
            start = self._next.get(tuple(tokens[-size:]))
            if start is not None:
                period = tokens[start:]
                count = _common_suffix(tokens, start, most)
                return Proposal([period[i % len(period)] for i in range(count)])
        return Proposal()


def _common_suffix(tokens: Sequence[int], place: int, most: int) -> int:
    """Return how many tokens before `place` equal the last ones, at most `most`."""
    count = 0
    while count < min(most, place) and tokens[place - 1 - count] == tokens[-1 - count]:
        count += 1
    return count


def verify(
    sampler: Sampler, logits_TV: Tensor, proposal: Proposal, stops: Collection[int]
) -> list[int]:
    """Return the tokens that the model generates: those that it accepts, and one of its own.

    Args:
        sampler: The sampler, which has counted all earlier tokens.
        logits_TV: Logits after the last token and after each proposal, T = proposals + 1.
        proposal: The proposals.
        stops: Ids that end the text, also inside of the proposals.

    Returns:
        1 to T ids, in the distribution of the model (Leviathan et al. 2023, arXiv 2211.17192). A
        proposal of a point mass is accepted if the token that the sampler draws is equal. The
        tokens are then those of decoding without proposals and with the same seed.

    Raises:
        WorkError: Logits that a token is drawn from are NaN or infinite.
    """
    broken, new = not_finite(logits_TV).tolist(), list[int]()
    for place, logits_1V in enumerate(logits_TV.split(1)):
        check_finite(broken[place], logits_TV.dtype)  # those after a rejected one do not matter
        drafted = proposal.ids[place] if place < len(proposal.ids) else None
        if drafted is not None and proposal.probs:
            new.append(sampler.accept_or_replace(logits_1V, drafted, proposal.probs[place]))
        else:
            new.append(int(sampler(logits_1V)))
        if new[-1] != drafted or new[-1] in stops:
            break
    return new


@torch.inference_mode()  # a `with` around a yield would leave the caller in inference mode
def speculate(
    model: LLM,
    cache: ModelCache,
    prompt: Sequence[int],
    rest: Sequence[int],
    sampler: Sampler,
    proposer: Proposer,
    most: int,
    max_new_tokens: int,
    stops: Collection[int],
    decode: DecodeArgs,
    longer: int | None,
    counts: DraftCounts,
) -> Tokens:
    """Yield the tokens of each step of one row.

    Args:
        model: The model.
        cache: Its KV cache, which has the prompt up to `rest`. After a yield it may also have
            accepted tokens that are yielded next, until the stream has ended or is closed.
        prompt: All tokens of the prompt.
        rest: Those that the cache lacks.
        sampler: How tokens are chosen.
        proposer: Proposes tokens.
        most: Proposals per call at most.
        max_new_tokens: Number of steps at most.
        stops: Ids that end the text.
        decode: How the model runs.
        longer: The capacity of the cache to continue with; see `rebuild_larger`.
        counts: Where proposals and accepted ones are counted.
    """
    tokens, left, proposal = list(prompt), max_new_tokens, Proposal()
    plan = decode_plan(model)
    logits_TV = prefill(model, cache, [rest], decode.prefill_step_size, plan)
    while True:
        with part("sampling"), alone(plan):
            new = verify(sampler, logits_TV, proposal, stops)
        rejected = len(proposal.ids) - (len(new) - 1)
        kept = cache.rollback(rejected, rejected)
        assert kept, "rings can roll back more tokens than are proposed"
        counts.drafted_tokens += len(proposal.ids)
        counts.accepted_tokens += len(new) - 1
        tokens += new
        left -= len(new)
        for ahead, id in zip(reversed(range(len(new))), new, strict=True):
            try:
                yield [id]
            except GeneratorExit:  # accepted tokens that nobody reads
                cache.rollback(ahead, ahead)
                raise
        if not left or new[-1] in stops:
            return
        if longer and cache.bound == cache.capacity:
            cache, logits_TV = rebuild_larger(
                model, cache, [tokens], longer, decode.prefill_step_size
            )
            longer, proposal = None, Proposal()
            continue
        fits = min(left, cache.capacity - cache.bound) if cache.bounded else left
        proposal = proposer.propose(tokens, min(most, fits - 1), sampler)
        tokens_1T = torch.tensor([[tokens[-1], *proposal.ids]], device=model.device)
        logits_TV = forward_logits(model, TransformerInput(tokens_1T), cache, plan)[0]


def choose_proposer(
    decode: DecodeArgs, draft: Proposer | None, rows: int, cache: ModelCache
) -> tuple[Proposer, int] | None:
    """Return the proposer of a request and the most tokens per call, or None for plain decoding.

    Raises:
        RequestError: Two proposers, a number without a draft model, several rows, or a cache that
            can't be rolled back so far.
    """
    name, looked_up = "prompt_lookup_num_tokens", decode.prompt_lookup_num_tokens
    drafted = decode.num_draft_tokens
    if draft is not None:
        expect(looked_up is None, name, looked_up, "none with a draft model")
        name = "num_draft_tokens"
    else:
        expect(drafted is None, "num_draft_tokens", drafted, "a draft model with it")
    most = decode.proposals(draft)
    if not most:
        return None
    expect(rows == 1, "prompts", f"{rows} rows", "one row with speculative decoding")
    if decode.compile:
        notice("speculative decoding runs without --compile")
    expect(most <= cache.slack, name, most, f"at most the cache's slack of {cache.slack}")
    return draft or PromptLookup(), most
