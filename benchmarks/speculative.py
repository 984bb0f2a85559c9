"""Prompt look-up on SmolLM2-135M: a text that repeats itself, and one that does not.

The peer of each row is plain decoding by the same program. transformers runs beside it with its own
prompt look-up.
"""

from __future__ import annotations

import inspect
import tempfile
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from transom.checkpoints.convert import convert
from transom.checkpoints.open_model import open_model
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.inference.speculate import DraftCounts

NEW, MOST = 97, 10  # tokens; proposals per call
PROMPTS = {
    "repeating text": f"Repeat this code:\n\n```python\n{inspect.getsource(textwrap.dedent)}```",
    "new text": "Tell me a long story about a lighthouse.",
}
Program = Callable[[list[int], int], int]  # appends tokens greedily, and returns how many


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per text and program: tokens per second after the first, and the ratio."""
    opened = open_model("smollm2", device=str(device), dtype="bfloat16")
    counts: dict[str, DraftCounts] = {}
    programs = {**_transom(opened.model, counts), **_transformers(device)}
    found = []
    for text, prompt in PROMPTS.items():
        ids = opened.template.encode([{"role": "user", "content": prompt}])
        calls = {
            (name, new): partial(program, ids, new)
            for name, program in programs.items()
            for new in (1, NEW)
        }
        seconds = interleaved(calls, device, rounds=2)
        speeds = {n: (NEW - 1) / (seconds[n, NEW] - seconds[n, 1]) for n in programs}
        for name, speed in speeds.items():
            peer = name.replace("look-up", "plain")
            row = {"benchmark": "speculative decoding", "case": f"{name}, {text}"}
            row |= {"peer": peer, "decode_tokens_per_s": round(speed, 1)}
            row |= {"ratio": round(speed / speeds[peer], 2), **vars(counts.get(name, _NO_COUNTS))}
            found.append(row)
    return found


def _transom(model: Any, counts: dict[str, DraftCounts]) -> dict[str, Program]:
    made: dict[str, Program] = {}
    for way, most in (("plain", None), ("look-up", MOST)):

        def append(ids: list[int], new: int, way: str = way, most: int | None = most) -> int:
            counts[f"Transom, {way}"] = kept = DraftCounts()
            decode = DecodeArgs(prompt_lookup_num_tokens=most)
            return len(list(stream(model, [ids], max_new_tokens=new, decode=decode, counts=kept)))

        made[f"Transom, {way}"] = append
    return made


def _transformers(device: torch.device) -> dict[str, Program]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        convert("smollm2", Path(scratch) / "hf")
        model = AutoModelForCausalLM.from_pretrained(Path(scratch) / "hf", dtype=torch.bfloat16)
    model = model.to(device)
    made: dict[str, Program] = {}
    for way, options in (("plain", {}), ("look-up", {"prompt_lookup_num_tokens": MOST})):

        def append(ids: list[int], new: int, options: dict[str, Any] = options) -> int:
            tokens = torch.tensor([ids], device=device)
            options = {**options, "min_new_tokens": new, "max_new_tokens": new}
            mask = torch.ones_like(tokens)
            out = model.generate(tokens, attention_mask=mask, do_sample=False, **options)
            return out.size(1) - len(ids)

        made[f"transformers, {way}"] = append
    return made


_NO_COUNTS = DraftCounts()
