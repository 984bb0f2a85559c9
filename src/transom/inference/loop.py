"""The one generation loop: prompts in chunks, then one token per row and step, out of a key/value
cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.base.errors import RequestError, WorkError, notice, require
from transom.base.runtime import evaluating
from transom.cache.model_cache import ModelCache
from transom.config.model_args import ModelArgs
from transom.inference.sampling import Sampler, SamplingArgs
from transom.layers.inputs import TransformerInput, right_padded
from transom.models.llm import LLM

GREEDY = SamplingArgs()
FINISHED = -1  # what a row gets after its stop token, where a tensor cannot hold None


def stream(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: SamplingArgs = GREEDY,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    prefill_step_size: int = 512,
    cache: ModelCache | None = None,
    log_probs: list[Tensor] | None = None,
) -> Iterator[list[int | None]]:
    """Continue `prompts`, which may differ in length: yields one new token per row, None for
    finished rows.

    A row that gets one of `stop_tokens` yields it and is finished; the stream ends with its last
    row, or after `max_new_tokens`. A given `cache` already holds the beginning of each prompt, and
    that part is not run again; after every yield it holds all of a row's tokens but the last one
    yielded. A list given as `log_probs` gets a tensor [B] with every yield, as `Sampler` says;
    those of finished rows mean nothing. What cannot be done is a `RequestError` before the model
    runs.
    """
    steps = _steps(
        model,
        prompts,
        max_new_tokens,
        sampling,
        seeds,
        stop_tokens,
        prefill_step_size,
        cache,
        log_probs,
    )
    return ([None if id == FINISHED else id for id in ids_B.tolist()] for ids_B in steps)


def generate(
    model: LLM,
    tokens_BT: Tensor | list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    seed: int = 0,
    seeds: Sequence[int] | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    lengths: Tensor | Sequence[int] | None = None,
    prefill_step_size: int = 512,
) -> Tensor:
    """[B, T + max_new_tokens]: the prompts as given, then the new tokens, on the device of
    `tokens_BT`.

    It never stops early unless `stop_tokens` are given; rows that meet one are filled up with
    `pad_token`. `lengths` [B] are the real tokens of right-padded rows; whatever its length, the
    new tokens of a row stand from column T on. Lists of unequal lengths are padded with `pad_token`
    here.
    """
    tokens_BT, prompts = _padded(tokens_BT, lengths, pad_token)
    sampling = SamplingArgs(
        temperature,
        top_k,
        top_p,
        min_p,
        repetition_penalty,
        frequency_penalty,
        presence_penalty,
        seed,
    )
    steps = _steps(
        model, prompts, max_new_tokens, sampling, seeds, stop_tokens, prefill_step_size, None
    )
    new_BT = torch.stack(list(steps), 1).to(tokens_BT.device)
    new_BT = F.pad(new_BT, (0, max_new_tokens - new_BT.size(1)), value=FINISHED)
    return torch.cat([tokens_BT, new_BT.masked_fill(new_BT == FINISHED, pad_token)], 1)


def _padded(
    tokens: Tensor | list[list[int]], lengths: Tensor | Sequence[int] | None, pad_token: int
) -> tuple[Tensor, list[list[int]]]:
    """The prompts as one right-padded tensor [B, T] and as lists of their real tokens."""
    if not isinstance(tokens, Tensor):
        require(
            lengths is None, "lengths", lengths, "valid only with a tensor; lists have their own"
        )
        return right_padded(tokens, pad_token), tokens
    if tokens.ndim != 2 or tokens.is_floating_point():
        raise RequestError(
            f"tokens of {tokens.dtype} {tuple(tokens.shape)}: expected ids [batch, tokens]"
        )
    rows: list[list[int]] = tokens.tolist()
    if lengths is None:
        return tokens, rows
    counts = [int(length) for length in lengths]
    fits = len(counts) == len(rows) and all(1 <= count <= tokens.size(1) for count in counts)
    require(fits, "lengths", counts, f"expected {len(rows)} numbers from 1 to {tokens.size(1)}")
    return tokens, [row[:count] for row, count in zip(rows, counts, strict=True)]


def _steps(
    model: LLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: SamplingArgs,
    seeds: Sequence[int] | None,
    stop_tokens: Sequence[int],
    prefill_step_size: int,
    cache: ModelCache | None,
    log_probs: list[Tensor] | None = None,
) -> Iterator[Tensor]:
    """Check everything now, not at the first step; then the ids [B] of each step, `FINISHED` where
    a row is.
    """
    args, device = model.args, model.device
    require(max_new_tokens >= 1, "max_new_tokens", max_new_tokens, "expected 1 or more")
    require(prefill_step_size >= 1, "prefill_step_size", prefill_step_size, "expected 1 or more")
    _check_prompts(prompts, args.vocab_size)
    if args.context_dim is not None and (cache is None or not cache.has_context):
        raise RequestError(
            "context: this model reads one; expected a cache whose first call was given it"
        )
    check_language_model(args)
    longer: int | None = None
    if cache is None:
        longest = max(map(len, prompts))
        total = longest + max_new_tokens
        check_room(args, longest, max_new_tokens)
        first = first_capacity(args, longest, total)
        longer = total if first < total else None
        cache = model.make_cache(len(prompts), first)
    rest = _not_held(prompts, cache, 1 if longer else max_new_tokens)
    sampler = Sampler(sampling, len(prompts), args.vocab_size, seeds, device, log_probs)
    sampler.see(prompts)
    stops_S = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    return _run(model, cache, rest, sampler, max_new_tokens, stops_S, prefill_step_size, longer)


# as a decorator: a `with` around a yield would leave the caller in inference mode
@torch.inference_mode()
def _run(
    model: LLM,
    cache: ModelCache,
    rest: Sequence[Sequence[int]],
    sampler: Sampler,
    max_new_tokens: int,
    stops_S: Tensor,
    prefill_step_size: int,
    longer: int | None,
) -> Iterator[Tensor]:
    """`longer` is the capacity to go on with where `cache` was built for the original length (see
    `rebuild_larger`).
    """
    given: list[Tensor] = []
    logits_BV = prefill(model, cache, rest, prefill_step_size)
    alive_B = torch.ones(len(rest), dtype=torch.bool, device=logits_BV.device)
    broken_B = torch.zeros_like(alive_B)
    waits = stops_S.numel() > 0 or logits_BV.device.type == "cpu"
    for remaining in reversed(range(max_new_tokens)):
        broken_B = broken_B | (alive_B & _not_finite(logits_BV))
        if (
            waits or not remaining
        ):  # elsewhere the host does not wait for the device before the last step
            _refuse_broken(broken_B, logits_BV.dtype)
        ids_B = sampler(logits_BV)
        yield ids_B.masked_fill(~alive_B, FINISHED)
        lengths_B = None
        if stops_S.numel():  # only then does the host wait for the device
            alive_B = alive_B & ~torch.isin(ids_B, stops_S)
            left = int(alive_B.sum())
            if left == 0:
                return
            lengths_B = (
                alive_B.long() if left < len(rest) else None
            )  # finished rows store nothing more
        if longer:
            given.append(ids_B)
            if cache.bound == cache.capacity:
                cache.sync_length()  # the bound counts calls; a row that has finished grows no more
            if remaining and cache.bound == cache.capacity:
                cache, logits_BV = rebuild_larger(
                    model, cache, rest, given, longer, prefill_step_size
                )
                longer = None
                continue
        if remaining:
            inputs = TransformerInput(ids_B[:, None], lengths=lengths_B, logits="last")
            logits_BV = _logits_BV(model, inputs, cache)


def first_capacity(args: ModelArgs, prompt_tokens: int, total: int) -> int:
    """Slots to begin with: all, or the original length where a longer cache would choose other
    frequencies.
    """
    scalings = [layer.rope.scaling for layer in args.layers if layer.rope is not None]
    originals = {s.original_max_seq_len for s in scalings if s is not None and s.by_length}
    return min((one for one in originals if prompt_tokens <= one < total), default=total)


def rebuild_larger(
    model: LLM,
    cache: ModelCache,
    prompts: Sequence[Sequence[int]],
    given: Sequence[Tensor],
    capacity: int,
    step_size: int,
) -> tuple[ModelCache, Tensor]:
    """A larger cache of the same rows, every key computed again, and the logits [B, V] behind their
    last tokens.

    Rotary frequencies that depend on the length are other ones beyond the original length, for all
    positions.
    """
    notice(
        f"{cache.capacity} tokens: the original length of this model's rotary frequencies; all "
        f"are computed again with those of longer sequences"
    )
    rows = [
        [*prompt, *new]
        for prompt, new in zip(prompts, torch.stack(list(given), 1).tolist(), strict=True)
    ]
    larger = model.make_cache(len(rows), capacity)
    return larger, prefill(model, larger, rows, step_size)


def prefill(model: LLM, cache: ModelCache, rows: Sequence[Sequence[int]], step_size: int) -> Tensor:
    """Store `rows` in the cache, `step_size` tokens per call; the logits [B, V] behind each row's
    last token.
    """
    device = model.device
    tokens_BT = right_padded(rows).to(device)
    counts = [len(row) for row in rows]
    last_BV: Tensor | None = None
    for start in range(0, max(counts), step_size):
        piece_BT = tokens_BT[:, start : start + step_size]
        width = piece_BT.size(1)
        real = [
            min(max(count - start, 0), width) for count in counts
        ]  # 0 for a row that ended before
        lengths_B = torch.tensor(real, device=device) if min(real) < width else None
        ends = [start < count <= start + width for count in counts]
        if not any(ends):
            with evaluating(model):
                model(TransformerInput(piece_BT, lengths=lengths_B, logits="none"), cache)
            continue
        logits_BV = _logits_BV(
            model, TransformerInput(piece_BT, lengths=lengths_B, logits="last"), cache
        )
        ends_B1 = torch.tensor(ends, device=device)[:, None]
        last_BV = logits_BV if last_BV is None else torch.where(ends_B1, logits_BV, last_BV)
    assert last_BV is not None, "the longest row ends in the last piece"
    _refuse_broken(_not_finite(last_BV), last_BV.dtype)
    return last_BV


def _not_finite(logits_BV: Tensor) -> Tensor:
    """Return the rows [B] from which no token can be drawn: one logit is NaN or inf, or all are
    -inf.
    """
    return ~logits_BV.amax(-1).isfinite()


def _refuse_broken(broken_B: Tensor, dtype: torch.dtype) -> None:
    """Raise a `WorkError` if a row is broken: any token that is drawn from it would look like an
    answer.
    """
    if bool(broken_B.any()):
        name = str(dtype).removeprefix("torch.")
        raise WorkError(
            f"the model's logits are NaN or infinite: a weight is, or values are too large for "
            f"{name}"
        )


def _logits_BV(model: LLM, inputs: TransformerInput, cache: ModelCache) -> Tensor:
    with evaluating(model):  # per call: between two tokens the caller may train
        logits_B1V = model(inputs, cache).logits
    assert isinstance(logits_B1V, Tensor), "asked for"
    return logits_B1V[:, 0]


def truncate_after_interrupt(cache: ModelCache, at_most: int, in_flight: int) -> None:
    """Make a cache of one row whole after an interrupted stream, holding `at_most` tokens or fewer.

    The call that was cut short had `in_flight` tokens or fewer. Where a ring has already
    overwritten what it needs, the cache ends up empty.
    """
    excess = max(0, int(cache.lengths_B.max()) - at_most)
    if not cache.rollback(excess, excess + in_flight):
        cache.reset()


def keeps_every_token(args: ModelArgs) -> bool:
    """Whether some layer sees everything before it, so that `max_seq_len` limits prompt and new
    tokens.
    """
    return any(layer.rule.size == 0 for layer in args.layers)


def check_language_model(args: ModelArgs) -> None:
    """Raise a `RequestError` for a model with labels or embeddings in place of next tokens."""
    if args.head is not None:
        raise RequestError(
            f"head: got {args.head.kind!r}; expected a language model, which has a next token"
        )


def check_room(args: ModelArgs, prompt_tokens: int, new_tokens: int) -> None:
    """A `RequestError` where prompt and new tokens together are more than the model is meant
    for.
    """
    if keeps_every_token(args) and prompt_tokens + new_tokens > args.max_seq_len:
        raise RequestError(
            f"a prompt of {prompt_tokens} tokens and {new_tokens} new: expected "
            f"{args.max_seq_len} together, the model's max_seq_len"
        )


def _check_prompts(prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    if not prompts:
        raise RequestError("prompts: none given; expected one or more")
    for row, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise RequestError(f"prompt {row}: empty; expected one token or more")
        for id in prompt:
            if not 0 <= id < vocab_size:
                raise RequestError(f"prompt {row} has token {id}: expected 0 to {vocab_size - 1}")


def _not_held(
    prompts: Sequence[Sequence[int]], cache: ModelCache, max_new_tokens: int
) -> list[Sequence[int]]:
    """What the cache does not hold yet of each prompt, checked to be something and to fit."""
    if cache.batch_size != len(prompts):
        raise RequestError(f"{len(prompts)} prompts: this cache was built for {cache.batch_size}")
    held = cache.lengths_B.tolist()
    rest = [prompt[count:] for prompt, count in zip(prompts, held, strict=True)]
    for prompt, count in zip(prompts, held, strict=True):
        if count >= len(prompt):
            raise RequestError(
                f"a prompt of {len(prompt)} tokens: expected more than the cache's {count}"
            )
    needed = max(map(len, prompts)) + max_new_tokens - 1  # the last token is never stored
    if cache.bounded and needed > cache.capacity:
        raise RequestError(f"{needed} tokens to store: this cache holds {cache.capacity}")
    return rest
