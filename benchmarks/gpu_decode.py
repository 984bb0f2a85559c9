"""Decoding and prefill of an 8B shape on a GPU, as shares of what the GPU can do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from transom.base.runtime import matmul_peak, read_bandwidth, synchronize
from transom.config.model_args import ModelArgs
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.inference.speed import measure_speed, weight_bytes_read
from transom.models.llm import LLM
from transom.planning.counts import kv_bytes
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model

SHAPE: Mapping[str, Any] = {  # Llama 3.1 8B
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "hidden_dim": 14336,
    "vocab_size": 128256,
    "max_seq_len": 40960,
}
PROMPT, SKIPPED, TIMED = 300, 32, 180  # tokens; the first steps compile and record
PREFILL = 32768  # tokens, in one call: its attention is causal without a mask


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return rows for batch 1 in bfloat16 and int4, compiled and not, and for 32k of prefill."""
    return cases(device, SHAPE, prefill=PREFILL)


def cases(
    device: torch.device, shape: Mapping[str, Any], *, prefill: int, compile: bool = True
) -> list[dict[str, Any]]:
    """Return the rows of a shape with random weights; without `compile` for a quick trial."""
    model, dtype = random_weights(ModelArgs.from_dict(dict(shape)), device)
    limits = read_bandwidth(device.type), matmul_peak(device.type, dtype)
    name = f"{shape['n_layers']} layers of {shape['dim']}, {str(dtype).removeprefix('torch.')}"
    made = [_decode(model, f"decode, {name}, plain", False, limits[0], None)]
    made += [_decode(model, f"decode, {name}, --compile", compile, limits[0], 0.75)]
    made += [_prefill(model, f"prefill of {prefill:,} tokens, {name}", prefill)]
    quantize_model(model, QuantizeArgs(kind="int4", group=32))
    four = _decode(model, f"decode, {name}, int4, --compile", compile, limits[0], None)
    faster = four["tokens_per_second"] / made[1]["tokens_per_second"]
    against = {"peer": "bfloat16, --compile", "ratio": round(faster, 3), "target": 1.7}
    return [*made, {**four, **against}]


def random_weights(args: ModelArgs, device: torch.device) -> tuple[LLM, torch.dtype]:
    """Return a model whose weights are drawn on the device in bfloat16."""
    with torch.device("meta"):
        model = LLM(args).to(torch.bfloat16)
    model.to_empty(device=device)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(std=0.02)
    return model.eval(), torch.bfloat16


def _decode(
    model: LLM, case: str, compile: bool, bandwidth: float, target: float | None
) -> dict[str, Any]:
    """Time steps after the first ones, in which kernels are compiled and recorded."""
    prompt = torch.randint(model.args.vocab_size, (PROMPT,)).tolist()
    decode = DecodeArgs(compile=compile)
    steps = stream(model, [prompt], max_new_tokens=SKIPPED + TIMED, decode=decode)
    start = time.perf_counter()
    for _ in range(SKIPPED):
        next(steps)
    synchronize(model.device)
    begun = time.perf_counter()
    for _ids in steps:
        pass
    synchronize(model.device)
    speed = TIMED / (time.perf_counter() - begun)
    read = weight_bytes_read(model, 1)
    read += kv_bytes(model.args, PROMPT + SKIPPED + TIMED // 2, model.dtype.itemsize)
    return {
        "benchmark": "gpu_decode",
        "case": case,
        "peer": "reading the same bytes at the measured bandwidth",
        "tokens_per_second": round(speed, 1),
        "ratio": round(read * speed / bandwidth, 3),
        "target": target,
        "seconds_of_the_first_steps": round(begun - start, 1),
    }


def _prefill(model: LLM, case: str, tokens: int) -> dict[str, Any]:
    decode = DecodeArgs(prefill_step_size=tokens)
    lengths = {"prompt_lengths": (tokens,), "new_tokens": 2, "repetitions": 2}
    (speed,) = measure_speed(model, **lengths, decode=decode)
    return {
        "benchmark": "gpu_decode",
        "case": case,
        "peer": "the same FLOPs at the measured peak of matrix products",
        "tokens_per_second": round(speed.prefill_tokens_per_second.median, 1),
        "ratio": round(speed.matmul_fraction, 3),
        "target": 0.6,
    }
