"""SmolLM2-135M from its GGUF file: prefill and decode beside llama.cpp and transformers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from tests.llama_cpp import LlamaCpp
from transom.checkpoints.convert import convert
from transom.checkpoints.files.packaged import packaged_model
from transom.checkpoints.open_model import open_model
from transom.inference.loop import generate

LONG, SHORT, NEW = 512, 64, 33  # tokens
PEER = "llama.cpp, Q4_1"
Program = Callable[[list[int], int], object]  # appends so many tokens to a prompt, greedily


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per program and dtype: tokens per second of prefill and of decoding."""
    programs = {**_transom(device), **_transformers(device)}
    threads = torch.get_num_threads()
    with LlamaCpp(packaged_model("smollm2") or "", LONG + 1, threads) as peer:
        programs[PEER] = peer.greedy
        ids = torch.randint(1000, 40_000, (LONG,), generator=torch.Generator().manual_seed(0))

        def seconds(length: int, new: int) -> dict[str, float]:
            prompt = ids[:length].tolist()
            calls = {name: partial(one, prompt, new) for name, one in programs.items()}
            return interleaved(calls, device, rounds=3)

        prefill, first, both = seconds(LONG, 1), seconds(SHORT, 1), seconds(SHORT, NEW)
    decode = {name: (NEW - 1) / (both[name] - first[name]) for name in programs}
    return [
        {
            "benchmark": "SmolLM2",
            "case": name,
            "peer": PEER,
            "prefill_tokens_per_s": round(LONG / prefill[name], 1),
            "prefill_ratio": round(prefill[PEER] / prefill[name], 2),
            "decode_tokens_per_s": round(decode[name], 1),
            "ratio": round(decode[name] / decode[PEER], 2),
        }
        for name in programs
    ]


def _transom(device: torch.device) -> dict[str, Program]:
    made: dict[str, Program] = {}
    for name, kept in (("float32", False), ("bfloat16", False), ("codes of Q4_1", True)):
        dtype = "float32" if kept else name
        model = open_model("smollm2", device=str(device), dtype=dtype, keep_quantized=kept).model

        def append(prompt: list[int], new: int, model: Any = model) -> object:
            return generate(model, torch.tensor([prompt], device=device), new)

        made[f"Transom, {name}"] = append
    return made


def _transformers(device: torch.device) -> dict[str, Program]:
    from transformers import AutoModelForCausalLM

    made: dict[str, Program] = {}
    with tempfile.TemporaryDirectory() as scratch:
        convert("smollm2", Path(scratch) / "hf")
        for dtype in (torch.float32, torch.bfloat16):
            model = AutoModelForCausalLM.from_pretrained(Path(scratch) / "hf", dtype=dtype)
            model = model.to(device)

            def append(prompt: list[int], new: int, model: Any = model) -> object:
                tokens = torch.tensor([prompt], device=device)
                return model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=False,
                    min_new_tokens=new,
                    max_new_tokens=new,
                )

            made[f"transformers, {str(dtype).removeprefix('torch.')}"] = append
    return made
