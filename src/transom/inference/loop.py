"""The generation loop: prefill of the prompts in chunks, then one decode step per token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from transom.base.copies import runs_ahead, to_host
from transom.base.errors import RequestError, expect
from transom.cache.model_cache import ModelCache
from transom.config.model_args import ModelArgs
from transom.inference.compiled import compiled_steps
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.inference.decode_plan import alone, decode_plan
from transom.inference.forward import (
    Tokens,
    check_finite,
    first_capacity,
    forward_logits,
    not_finite,
    prefill,
    rebuild_larger,
    with_place,
)
from transom.inference.prompt_cache import PromptCache
from transom.inference.room import check_memory, check_room
from transom.inference.sampler import Sampler
from transom.inference.sampling import SamplingArgs
from transom.inference.speculate import DraftCounts, Proposer, choose_proposer, speculate
from transom.inference.step_times import part
from transom.layers.inputs import TransformerInput, pad_rows
from transom.models.llm import LLM

GREEDY = SamplingArgs()
# Ids, where a tensor can't contain None: of rows after their stop token, and of rows with logits
# that are not finite.
FINISHED, BROKEN = -1, -2


def stream(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingArgs = GREEDY,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    decode: DecodeArgs = DEFAULT,
    cache: ModelCache | None = None,
    log_probs: list[Tensor] | None = None,
    draft: Proposer | None = None,
    counts: DraftCounts | None = None,
) -> Tokens:
    """Continue a batch of prompts, and yield the new tokens step by step.

    Args:
        model: A language model. It runs in evaluation mode under `torch.inference_mode`.
        prompts: Token ids of each row. Rows may differ in length.
        max_new_tokens: Number of steps at most.
        sampling: How tokens are chosen; greedy decoding by default.
        seeds: One seed per row, instead of those derived from `sampling.seed`.
        stop_tokens: Ids that finish a row. The stop token is yielded too.
        decode: How the model runs.
        cache: A KV cache that has the beginning of each prompt; only the rest of it is run. After
            every yield it has all tokens of a row but the last one yielded. On a GPU, which runs
            the next step already, this holds once the stream has ended or was closed.
        log_probs: A list to which every step appends the log-probabilities of its tokens, float32
            [B] in nats; see `Sampler`. Those of finished rows have no meaning.
        draft: A `DraftModel` that proposes tokens. With it, or with `prompt_lookup_num_tokens`, the
            cache may also have tokens after the last one yielded, until the stream has ended or is
            closed.
        counts: Where proposed and accepted tokens are counted.

    Yields:
        One token id per row, None for finished rows. The stream ends with its last row.

    Raises:
        RequestError: The request can't be computed. It is raised before the model runs.
        WorkError: Logits are NaN or infinite.
    """
    args, device = model.args, model.device
    expect(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "1 or more")
    _check_prompts(prompts, args.vocab_size)
    if args.context_dim is not None and (cache is None or not cache.has_context):
        raise RequestError("context: got none; expected a cache whose first call had a context")
    check_language_model(args)
    longer: int | None = None
    if cache is None:
        longest = max(map(len, prompts))
        total = longest + max_new_tokens
        check_room(args, longest, max_new_tokens, decode.max_model_len)
        check_memory(args, len(prompts), total, model.dtype, device, decode, least=longest + 1)
        first = first_capacity(args, longest, total)
        longer = total if first < total else None
        cache = model.make_cache(len(prompts), first, kv_bits=decode.kv_bits)
        if decode.prompt_cache_file is not None:
            PromptCache(model, decode).restore(cache, prompts)
    rest = _not_cached(prompts, cache, 1 if longer else max_new_tokens)
    sampler = Sampler(sampling, len(prompts), args.vocab_size, seeds, device, log_probs)
    sampler.see(prompts)
    proposer = choose_proposer(decode, draft, len(prompts), cache)
    if proposer is not None:
        ends = max_new_tokens, frozenset(stop_tokens)
        parts = model, cache, prompts[0], rest[0], sampler, *proposer
        steps = speculate(*parts, *ends, decode, longer, counts or DraftCounts())
    else:
        given = model, cache, prompts, rest, sampler, max_new_tokens, stop_tokens
        steps = _run(*given, decode, longer)
    return with_place(steps, model, prompts, decode.prefill_step_size)


def generate(
    model: LLM,
    tokens_BT: Tensor | list[list[int]],
    max_new_tokens: int,
    *,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    draft: Proposer | None = None,
    **options: Any,
) -> Tensor:
    """Continue a batch of prompts and return prompts and new tokens as one tensor.

    Args:
        model: A language model.
        tokens_BT: Integer ids [B, T], or lists of ids, which may differ in length.
        max_new_tokens: New tokens per row.
        seeds: One seed per row, instead of those derived from `seed`.
        stop_tokens: Ids that finish a row. None are assumed: without them every row gets
            `max_new_tokens` tokens.
        pad_token: The id after the stop token of a finished row, and after shorter lists.
        draft: A `DraftModel` that proposes tokens.
        **options: Fields of `DecodeArgs`, which say how the model runs, and of `SamplingArgs`:
            temperature: 0 takes the most likely token (default). Otherwise logits are divided by
                it: below 1 sharpens the distribution, above 1 flattens it.
            top_k: Sample from the k most likely tokens only. None keeps all (default).
            top_p: Nucleus sampling: sample from the most likely tokens whose probabilities reach
                this sum. 1 keeps all (default).
            min_p: Drop tokens with less than this share of the highest probability. 0 keeps all
                (default).
            repetition_penalty: Above 1, tokens of prompt and answer become less likely: positive
                logits are divided by it, negative ones multiplied. 1 changes nothing (default).
            frequency_penalty: Subtracted from a logit for each time its token was generated; -2 to
                2, 0 by default.
            presence_penalty: Subtracted from a logit if its token was generated at all; -2 to 2, 0
                by default.
            seed: Seed of the random numbers. Every row has a stream of its own, so its tokens do
                not depend on the other rows.

    Returns:
        int64 [B, T + max_new_tokens] on the device of `tokens_BT`: the prompts as given, with new
        tokens from column T on in every row, whatever the length of its prompt.

    Raises:
        RequestError: The request can't be computed, for example because it exceeds `max_seq_len`.
        WorkError: Logits are NaN or infinite.
    """
    tokens_BT, prompts = _padded(tokens_BT, pad_token)
    names = {field.name for field in dataclasses.fields(DecodeArgs)} & set(options)
    decode = DecodeArgs(**{name: options.pop(name) for name in names})
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=SamplingArgs(**options),
        seeds=seeds,
        stop_tokens=stop_tokens,
        decode=decode,
        draft=draft,
    )
    new_TB = [[pad_token if id is None else id for id in ids] for ids in steps]
    new_TB += [[pad_token] * len(prompts)] * (max_new_tokens - len(new_TB))
    return torch.cat([tokens_BT, torch.tensor(new_TB, device=tokens_BT.device).T], 1)


def _padded(tokens: Tensor | list[list[int]], pad_token: int) -> tuple[Tensor, list[list[int]]]:
    """Return the prompts as one right-padded tensor [B, T] and as lists."""
    if not isinstance(tokens, Tensor):
        return pad_rows(tokens, pad_token)[0], tokens
    fits = tokens.ndim == 2 and not tokens.is_floating_point()
    found = f"{tokens.dtype} {list(tokens.shape)}"
    expect(fits, "tokens", found, "integer ids of a shape [batch, tokens]")
    return tokens, tokens.tolist()


@torch.inference_mode()  # a `with` around a yield would leave the caller in inference mode
def _run(
    model: LLM,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    rest: Sequence[Sequence[int]],
    sampler: Sampler,
    max_new_tokens: int,
    stop_tokens: Sequence[int],
    decode: DecodeArgs,
    longer: int | None,
) -> Tokens:
    """Yield the tokens of each step.

    A device that runs ahead has the next step in its queue before the tokens of this one are read.

    `longer` is the capacity of the cache to continue with where `cache` is of the original length
    of the rotary frequencies (see `rebuild_larger`).
    """
    given: list[Tensor] = []
    compiled = compiled_steps(model) if decode.compile else None
    plan = decode_plan(model) if compiled is None else None
    logits_BV = prefill(model, cache, rest, decode.prefill_step_size, plan)
    alive_B = torch.ones(len(rest), dtype=torch.bool, device=logits_BV.device)
    stops = {*stop_tokens}
    stops_S = torch.tensor([*stops], dtype=torch.int64, device=logits_BV.device)
    step = compiled or partial(forward_logits, model, runner=plan)
    left = rows = len(rest)  # rows without a stop token, as far as tokens have been read
    ahead = runs_ahead(logits_BV.device)

    def advance() -> Tensor:
        """Return the logits [B, V] after `ids_B`, which the cache gets."""
        nonlocal cache, longer
        if longer:
            given.append(ids_B)
            if cache.bound == cache.capacity:
                cache.sync_length()  # the bound counts calls, but finished rows do not grow
            if cache.bound == cache.capacity:
                added = torch.stack(given, 1).tolist()
                texts = [[*row, *new] for row, new in zip(prompts, added, strict=True)]
                step_size, capacity, longer = decode.prefill_step_size, longer, None
                cache, logits_BV = rebuild_larger(model, cache, texts, capacity, step_size)
                return logits_BV
        lengths_B = alive_B.long() if left < rows else None  # finished rows store nothing
        inputs = TransformerInput(ids_B[:, None], lengths=lengths_B, logits="last")
        return step(inputs, cache)[:, 0]

    for remaining in reversed(range(max_new_tokens)):
        with part("sampling"), alone(plan):
            ids_B = sampler(logits_BV)
            shown_B = ids_B.masked_fill(not_finite(logits_BV), BROKEN)
        all_run = left == rows and not ahead  # as far as the host knows
        read = to_host(shown_B if all_run else shown_B.masked_fill(~alive_B, FINISHED))
        if ahead:
            alive_B = alive_B & (ids_B[:, None] != stops_S).all(-1)
        if ahead and remaining:
            logits_BV = advance()
        ids = read()
        check_finite(BROKEN in ids, logits_BV.dtype)
        stopped, all_ran = sum(id in stops for id in ids), left == rows
        left -= stopped
        if stopped and not ahead:
            alive_B = alive_B & (ids_B[:, None] != stops_S).all(-1)
        if ahead and remaining and stopped and all_ran:  # the queued step has stored a stop token
            _take_back(cache, 1 if not left else (~alive_B).long())
        try:
            yield [None if id == FINISHED else id for id in ids]
        except GeneratorExit:
            if ahead and remaining and left:
                _take_back(cache, 1 if left == rows else alive_B.long())
            raise
        if not left:
            return
        if not ahead and remaining:
            logits_BV = advance()


def _take_back(cache: ModelCache, count_B: Tensor | int) -> None:
    """Remove 0 or 1 tokens of each row, which a step has stored whose tokens nobody reads.

    Rings allow it: a step of one token per row overwrites nothing that the step before needs.
    """
    before, cache.rolled_back = cache.rolled_back, 0
    cache.rollback(count_B, 1)
    cache.rolled_back = before + 1


def truncate_after_interrupt(cache: ModelCache, at_most: int, in_flight: int) -> None:
    """Roll a cache of one row back to a state that is valid after an interrupted stream.

    If a ring has already overwritten keys that it needs, the cache is reset.

    Args:
        cache: The cache.
        at_most: Number of tokens that it may have afterwards.
        in_flight: Upper bound of the tokens of the call that was interrupted.
    """
    excess = max(0, int(cache.lengths_B.max()) - at_most)
    if not cache.rollback(excess, excess + in_flight):
        cache.reset()


def check_language_model(args: ModelArgs) -> None:
    """Raise a `RequestError` for a model that has a head for labels or embeddings."""
    if args.head is not None:
        raise RequestError(f"head: got {args.head.kind!r}; expected a language model without head")


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    expect(len(prompts) > 0, "prompts", [], "one or more")
    for row, prompt in enumerate(prompts):
        expect(len(prompt) > 0, f"prompt {row}", [], "one token or more")
        for id in prompt:
            if not 0 <= id < vocab_size:
                raise RequestError(f"prompt {row}: got token {id}; expected 0 to {vocab_size - 1}")


def _not_cached(
    prompts: Sequence[Sequence[int]], cache: ModelCache, max_new_tokens: int
) -> list[Sequence[int]]:
    """Return the tokens of each prompt that the cache does not have, and check that they fit."""
    rows = cache.batch_size
    expect(len(prompts) == rows, "prompts", len(prompts), f"the cache's {rows} rows")
    cached = cache.lengths_B.tolist()
    rest = [prompt[count:] for prompt, count in zip(prompts, cached, strict=True)]
    for prompt, count in zip(prompts, cached, strict=True):
        found = f"{len(prompt)} tokens"
        expect(count < len(prompt), "prompt", found, f"more than the cache's {count}")
    needed = max(map(len, prompts)) + max_new_tokens - 1  # the last token is not stored
    fits = not cache.bounded or needed <= cache.capacity
    expect(fits, "cache", f"{needed} tokens", f"at most its capacity of {cache.capacity}")
    return rest
