"""How fast a model generates: tokens per second, and shares of what the machine can do.

A decode step reads every weight in use and the KV cache once, so the bandwidth of the memory limits
it. Prefill multiplies large matrices, so the rate of matrix products limits it. Both limits are
measured on the spot.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from transom.base.errors import expect, notice
from transom.base.runtime import (
    matmul_peak,
    memory_bytes,
    pick_device,
    pick_dtype,
    read_bandwidth,
    reset_peak_memory,
)
from transom.checkpoints.describe_model import DescribedModel
from transom.checkpoints.files.layout import CONFIG, PARAMS
from transom.checkpoints.load import LoadPlan, load
from transom.checkpoints.state import meta_model
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.inference.loop import check_language_model, stream
from transom.inference.room import check_memory, check_room
from transom.layers.linear import GroupedLinear
from transom.models.llm import LLM
from transom.planning import counts
from transom.planning.memory import weight_counts
from transom.planning.tables import amount


@dataclass(frozen=True)
class Range:
    """The median of several measurements, the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Range:
        """Return the range of one value or more."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Speed:
    """The speed of one batch size and prompt length.

    Attributes:
        batch_size: Prompts that run side by side.
        prompt_length: Tokens of each prompt.
        new_tokens: Tokens generated after each prompt.
        prefill_tokens_per_second: Prompt tokens of all rows, divided by the time to the first
            token.
        first_token_seconds: Time until the first token of every row is on the host.
        decode_tokens_per_second: New tokens of all rows after the first one.
        bytes_per_step: Bytes of weights and of the KV cache that a decode step reads.
        bandwidth_fraction: Bytes read per second of decoding, as a share of `read_bandwidth`.
        flops_per_prompt: FLOPs of the prefill of one row; only matrix products count.
        matmul_fraction: FLOPs per second of prefill, as a share of `matmul_peak`.
        peak_memory_bytes: As `memory_bytes`, during these measurements.
    """

    batch_size: int
    prompt_length: int
    new_tokens: int
    prefill_tokens_per_second: Range
    first_token_seconds: Range
    decode_tokens_per_second: Range
    bytes_per_step: float
    bandwidth_fraction: float
    flops_per_prompt: float
    matmul_fraction: float
    peak_memory_bytes: int


def measure_speed(
    model: LLM,
    *,
    batch_sizes: Sequence[int] = (1,),
    prompt_lengths: Sequence[int] = (512,),
    new_tokens: int = 128,
    repetitions: int = 3,
    decode: DecodeArgs = DEFAULT,
) -> Iterator[Speed]:
    """Measure prefill and decoding on random prompts, and yield one result after the other.

    Every pair of a batch size and a prompt length runs once to warm up, and then `repetitions`
    times.

    Args:
        model: A language model.
        batch_sizes: Rows of a batch.
        prompt_lengths: Tokens of each prompt.
        new_tokens: Tokens to generate after each prompt, two or more. The first one counts as
            prefill.
        repetitions: Measurements of each pair.
        decode: How the model runs.

    Raises:
        RequestError: The request can't be computed. It is raised before the model runs.
    """
    expect(new_tokens >= 2, "new_tokens", new_tokens, "2 or more")
    expect(repetitions >= 1, "repetitions", repetitions, "1 or more")
    for name, sizes in (("batch_sizes", batch_sizes), ("prompt_lengths", prompt_lengths)):
        expect(min(sizes, default=0) >= 1, name, list(sizes), "integers of 1 or more")
    file = decode.prompt_cache_file
    expect(file is None, "prompt_cache_file", file, "none: later prefills would skip the prompt")
    alone = max(batch_sizes) == 1 or not decode.proposals(None)
    expect(alone, "batch_sizes", list(batch_sizes), "1 with speculative decoding")
    check_language_model(model.args)
    check_room(model.args, max(prompt_lengths), new_tokens, decode.max_model_len)
    rows, longest = max(batch_sizes), max(prompt_lengths)
    given = model.args, rows, longest + new_tokens, model.dtype, model.device, decode
    check_memory(*given, least=longest + 2, option=("--new-tokens", longest))
    limits = read_bandwidth(model.device.type), matmul_peak(model.device.type, model.dtype)
    pairs = [(rows, length) for rows in batch_sizes for length in prompt_lengths]
    return (_measure(model, *pair, new_tokens, repetitions, decode, limits) for pair in pairs)


def _measure(
    model: LLM,
    rows: int,
    length: int,
    new_tokens: int,
    repetitions: int,
    decode: DecodeArgs,
    limits: tuple[float, float],
) -> Speed:
    seeded = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.args.vocab_size, (rows, length), generator=seeded).tolist()
    reset_peak_memory(model.device)
    times = []
    for _ in range(1 + repetitions):
        start = time.perf_counter()
        steps = stream(model, prompts, max_new_tokens=new_tokens, decode=decode)
        next(steps)
        first = time.perf_counter()
        for _ids in steps:
            pass
        times.append((first - start, time.perf_counter() - first))
    waits, rests = zip(*times[1:], strict=True)
    prefill = Range.of([rows * length / wait for wait in waits])
    decoding = Range.of([rows * (new_tokens - 1) / rest for rest in rests])
    size = 1 if decode.kv_bits == 8 else model.dtype.itemsize
    cached = rows * counts.kv_bytes(model.args, length + new_tokens // 2, size)
    read = weight_bytes_read(model, rows) + cached
    flops = counts.flops_per_token(model.args, length) * length
    flops -= counts.output_flops_per_token(model.args) * (length - 1)  # only the last has logits
    return Speed(
        batch_size=rows,
        prompt_length=length,
        new_tokens=new_tokens,
        prefill_tokens_per_second=prefill,
        first_token_seconds=Range.of(waits),
        decode_tokens_per_second=decoding,
        bytes_per_step=read,
        bandwidth_fraction=read * decoding.median / rows / limits[0],
        flops_per_prompt=flops,
        matmul_fraction=flops * prefill.median / length / limits[1],
        peak_memory_bytes=memory_bytes(model.device),
    )


def weight_bytes_read(model: LLM, tokens: int) -> float:
    """Return the bytes of weights that a call of so many tokens reads, as they are stored.

    Quantized weights count as their codes and scales, and experts in the expected number that the
    tokens visit. Token embeddings count if they are the output matrix, too.
    """
    total = float(_bytes(model.output or model.tok_embeddings) + _bytes(model.norm))
    for layer, block in zip(model.args.layers, model.layers, strict=True):
        total += _bytes(block)
        if layer.moe is not None:
            grouped = sum(_bytes(one) for one in block.modules() if isinstance(one, GroupedLinear))
            total -= grouped * (
                1 - counts.experts_visited(layer.moe, tokens) / layer.moe.num_experts
            )
    return total


def _bytes(module: nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


def open_or_draw(
    described: DescribedModel,
    device: str = "auto",
    dtype: str | None = None,
    keep_quantized: bool | None = None,
) -> LLM:
    """Return a model with its weights, or with random ones if its name is a config or a preset.

    The speed of a model with random weights is that of a trained one. They are drawn on the device
    and in the dtype, so that no other copy takes memory.

    Args:
        described: The result of `describe_model`.
        device: As for `load`.
        dtype: As for `load`; for random weights, None is bfloat16 where it is fast, else float32.
        keep_quantized: As for `load`.

    Raises:
        RequestError: As for `load`, or the memory is not enough for random weights.
    """
    location = described.location
    if location is not None and Path(described.name).name not in (CONFIG, PARAMS):
        return load(location, device, dtype, keep_quantized=keep_quantized)
    expected = f"a quantized GGUF file or folder, not {described.name}"
    expect(not keep_quantized, "keep_quantized", keep_quantized, expected)
    args, place = described.args, pick_device(device)
    kind, size = pick_dtype(dtype or "auto", place), counts.parameters(args)
    weights = {name: count * kind.itemsize for name, count in weight_counts(args).items()}
    check_memory(args, 1, 2, kind, place, DEFAULT, load=LoadPlan(args, weights, 0, kind, place))
    model = meta_model(args).to(kind).to_empty(device=place)
    for weight in model.parameters():
        weight.data.normal_(0.0, 0.02)
    notice(f"{described.name}: {amount(size)} random weights")
    return model.eval().requires_grad_(False)
