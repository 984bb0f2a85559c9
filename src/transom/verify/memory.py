"""What `transom inspect --memory` says against what a model takes in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch

from transom.base.runtime import memory_bytes, reset_peak_memory
from transom.checkpoints.files.location import find_model
from transom.checkpoints.gguf.weights import quantized_types
from transom.checkpoints.load import load, load_plan
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.models.llm import LLM
from transom.planning import memory
from transom.verify.findings import Finding, exact
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model
from transom.verify.targets import small_models

ROWS, DECODED = 3, 8
LENGTHS, FULL_LENGTH = (20, 100), 1024  # tokens; windows have rings in the longer one only
# Resident memory also has what the allocator keeps, and what libraries allocate for themselves.
SHARE = 0.25


def check(model: str | None = None) -> Iterator[Finding]:
    """Compare bytes of weights and caches exactly, and with `model` also the peak of its memory.

    Args:
        model: A folder or name that `load` opens. It runs on the CPU in the dtype of its files,
            with the weights of a quantized GGUF file in their codes.
    """
    if model is not None:
        location = find_model(model)
        kept = bool(quantized_types(location.model)) or None
        planned = load_plan(location, keep_quantized=kept).weights
        built = load(location, keep_quantized=kept)
        yield from _compare(model, built, planned, 1, (FULL_LENGTH,))
        return
    for name, args in small_models(None, SAMPLES):
        sizes = {kind: 4 * count for kind, count in memory.weight_counts(args).items()}
        yield from _compare(name, sample_model(args, dtype=torch.float32), sizes, ROWS, LENGTHS)


def _compare(
    name: str, model: LLM, planned: Mapping[str, int], rows: int, lengths: tuple[int, ...]
) -> Iterator[Finding]:
    found: Counter[str] = Counter()
    for path, weight in model.named_parameters():
        found[memory.weight_kind(path)] += weight.nbytes
    wrong = [f"{part} {size:,}" for part, size in (planned.items() ^ found.items())]
    yield exact("weights by kind", name, wrong)
    for bits in (16, 8):
        decode, kind = DecodeArgs(kv_bits=bits), (model.dtype.itemsize, model.device.type)
        for length in lengths:
            tokens = min(length, model.args.max_seq_len)
            case = f"{name}, {bits} bits, {rows} x {tokens} tokens"
            reset_peak_memory(model.device)
            cache = model.make_cache(rows, tokens, kv_bits=bits)
            prompts = random_tokens(model.args, rows, tokens - DECODED).tolist()
            for _ in stream(model, prompts, max_new_tokens=DECODED, decode=decode, cache=cache):
                pass
            plan = memory.memory_plan(model.args, decode.workload(rows, tokens, *kind), planned)
            yield exact("bytes of the cache", case, abs(sum(plan.cache.values()) - cache.bytes))
            if length == FULL_LENGTH:
                total, peak = plan.total + memory.PROGRAM_BYTES, memory_bytes(model.device)
                detail = f"{total:,} bytes planned, {peak:,} resident"
                yield Finding("peak of memory", case, abs(peak - total) / total, SHARE, detail)
