"""Forward calls of generation: the prefill of prompts, and the logits of the calls after it."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from transom.base.errors import WorkError, notice
from transom.base.runtime import dtype_name, evaluating
from transom.cache.model_cache import UNLIMITED, ModelCache
from transom.cache.prefix import PrefixCache
from transom.chat.marking import common_prefix
from transom.config.model_args import ModelArgs
from transom.inference.decode_plan import alone
from transom.inference.joined_weights import joined_weights
from transom.layers.inputs import TransformerInput, TransformerOutput, pad_rows
from transom.models.llm import LLM, Runner
from transom.models.nonfinite import first_nonfinite

# One token id per row, None for finished rows, step by step.
Tokens = Generator[list[int | None], None, None]
SHARED = 64  # tokens; a shorter common beginning of the rows costs less than a call of its own


def prefill(
    model: LLM,
    cache: ModelCache,
    rows: Sequence[Sequence[int]],
    step_size: int,
    runner: Runner | None = None,
) -> Tensor:
    """Store rows of token ids in the cache, and return the logits [B, V] after their last tokens.

    Args:
        model: The model.
        cache: Its cache of as many rows.
        rows: Token ids of each row, one or more.
        step_size: Tokens per forward call.
        runner: As for `LLM.forward`.

    Raises:
        WorkError: Logits are NaN or infinite.
    """
    rows, device = _after_shared(model, cache, rows, step_size), model.device
    tokens_BT, counts = pad_rows(rows)[0].to(device), [len(row) for row in rows]
    last_BV: Tensor | None = None
    for start in range(0, max(counts), step_size):
        piece_BT = tokens_BT[:, start : start + step_size]
        width = piece_BT.size(1)
        real = [min(max(count - start, 0), width) for count in counts]  # 0 after a row's end
        lengths_B = torch.tensor(real, device=device) if min(real) < width else None
        ends = [start < count <= start + width for count in counts]
        if any(ends):
            inputs = TransformerInput(piece_BT, lengths=lengths_B, logits="last")
            logits_BV = forward_logits(model, inputs, cache, runner)[:, 0]
            ends_B = torch.tensor(ends, device=device)
            check_finite(bool((not_finite(logits_BV) & ends_B).any()), logits_BV.dtype)
            last_BV = logits_BV if last_BV is None else logits_BV.where(ends_B[:, None], last_BV)
        else:
            with evaluating(model):
                inputs = TransformerInput(piece_BT, lengths=lengths_B, logits="none")
                model(inputs, cache, runner=runner)
        if cache.on_prefill is not None:
            cache.on_prefill(cache, [min(count, start + width) for count in counts])
    assert last_BV is not None, "the longest row ends in the last piece"
    return last_BV


def _after_shared(
    model: LLM, cache: ModelCache, rows: Sequence[Sequence[int]], step_size: int
) -> Sequence[Sequence[int]]:
    """Run the beginning that all rows of an empty cache share as one row, fill the cache with its
    states, and return the rest of the rows.
    """
    given = cache.bound or cache.has_context or cache.on_prefill is not None
    if given or len(rows) == 1:
        return rows
    count = min(common_prefix(list(rows[0]), list(row[:-1])) for row in rows)
    if count < SHARED:
        return rows
    prefixes = PrefixCache(model.args, max_bytes=UNLIMITED, slack=cache.slack)
    one = model.make_cache(1, cache.capacity, slack=cache.slack, kv_bits=cache.kv_bits)
    prefixes.watch(one, [rows[0][:count]], [0])
    prefill(model, one, [rows[0][:count]], step_size)
    prefixes.restore(cache, rows)
    cache.on_prefill = None  # the prefixes are not used again
    return [row[count:] for row in rows]


def forward_logits(
    model: LLM, inputs: TransformerInput, cache: ModelCache, runner: Runner | None = None
) -> Tensor:
    """Return the logits [B, T, V] of one call in evaluation mode; T = 1 for the `last` logits."""
    # The first call of a cache runs in PyTorch, on all threads.
    few = alone(runner, inputs.tokens.numel()) if cache.bound else contextlib.nullcontext()
    with few, evaluating(model):  # per call: between two tokens the caller may train
        logits_BTV = model(inputs, cache, runner=runner).logits
    assert isinstance(logits_BTV, Tensor), "the input asks for logits"
    return logits_BTV


def first_capacity(args: ModelArgs, prompt_tokens: int, total: int) -> int:
    """Return the slots of the first cache for a request of `total` tokens.

    Some rotary scalings choose frequencies from the capacity. The first cache then has the original
    length, if the prompt fits, so that short answers use the frequencies of short sequences.
    """
    scalings = [layer.rope.scaling for layer in args.layers if layer.rope is not None]
    originals = {s.original_max_seq_len for s in scalings if s is not None and s.by_length}
    return min((one for one in originals if prompt_tokens <= one < total), default=total)


def rebuild_larger(
    model: LLM, cache: ModelCache, rows: Sequence[Sequence[int]], capacity: int, step_size: int
) -> tuple[ModelCache, Tensor]:
    """Compute all keys again in a larger cache, and return it with the last logits [B, V].

    Beyond the original length, rotary frequencies change for all positions. A notice says so.
    """
    notice(
        f"{cache.capacity} tokens: the original length of this model's rotary frequencies; all "
        f"keys are computed again with the frequencies of longer sequences"
    )
    larger = model.make_cache(len(rows), capacity, kv_bits=cache.kv_bits)
    return larger, prefill(model, larger, rows, step_size)


def not_finite(logits_BV: Tensor) -> Tensor:
    """Return bool [B], the rows with a logit of NaN or inf, or with -inf only."""
    return ~logits_BV.amax(-1).isfinite()


class BrokenLogitsError(WorkError):
    """Logits are NaN or infinite: a token drawn from them would look like an answer."""


def check_finite(broken: bool, dtype: torch.dtype) -> None:
    """Raise a `BrokenLogitsError` for broken logits."""
    if broken:
        raise BrokenLogitsError(
            "logits: got NaN or infinite values; expected finite ones: a weight is not finite, or "
            f"values are too large for {dtype_name(dtype)}"
        )


def with_place(
    steps: Tokens, model: LLM, prompts: Sequence[Sequence[int]], step_size: int
) -> Tokens:
    """Yield the same tokens. Where logits are broken, the error says which module began it.

    Args:
        steps: The tokens of the generation, one per row, None for finished rows.
        model: The model.
        prompts: The tokens before them.
        step_size: Tokens per forward call of the search.
    """
    ids, rows = array("q"), len(prompts)
    # On the CPU, a decode plan multiplies by all weights of a block in one call.
    joined = joined_weights(model) if model.device.type != "cpu" else contextlib.nullcontext()
    try:
        with joined:
            for new in steps:
                ids.extend(-1 if id is None else id for id in new)
                yield new
    except BrokenLogitsError as error:
        texts = [[*prompt, *ids[row::rows]] for row, prompt in enumerate(prompts)]
        texts = [[id for id in text if id >= 0] for text in texts]
        with torch.inference_mode(), evaluating(model):
            place = first_nonfinite(model, _plain_calls(model, texts, step_size))
        if place is None:
            raise
        kind = dtype_name(model.dtype)
        raise WorkError(f"logits: got NaN or infinite values in {kind}; {place}") from error
    finally:
        steps.close()


def _plain_calls(
    model: LLM, rows: Sequence[Sequence[int]], step_size: int
) -> Iterator[Callable[[], TransformerOutput]]:
    """Yield the forward calls of rows of tokens, without anything that makes them fast."""
    for row in rows:
        cache = model.make_cache(1, len(row))
        for start in range(0, len(row), step_size):
            ids = torch.tensor([row[start : start + step_size]], device=model.device)
            yield partial(model, TransformerInput(ids, logits="last"), cache)
