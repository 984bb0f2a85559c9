"""Prompt look-up on SmolLM2-135M: a text that repeats itself, and one that does not.

The peer of each row is plain decoding by the same program. transformers runs beside it with its own
prompt look-up.
"""

from __future__ import annotations

import inspect
import statistics
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transom.checkpoints.convert import convert
from transom.checkpoints.open_model import open_model
from transom.inference.decode_args import DecodeArgs
from transom.inference.loop import stream
from transom.inference.speculate import DraftCounts

NEW, MOST, ROUNDS = 65, 10, 2  # tokens; proposals per call; measured rounds
PROMPTS = {
    "repeating text": f"Repeat this code:\n\n```python\n{inspect.getsource(textwrap.dedent)}```",
    "new text": "Tell me a long story about a lighthouse.",
}
Program = Callable[[list[int]], "Clock"]  # appends `NEW` tokens greedily


class Clock:
    """When tokens arrived, as a streamer of transformers: the prompt first, then new tokens."""

    def __init__(self) -> None:
        self.arrived: list[tuple[float, int]] = []
        self.counts = DraftCounts()

    def put(self, ids: torch.Tensor) -> None:
        """Count tokens."""
        self.arrived.append((time.perf_counter(), ids.numel()))

    def end(self) -> None:
        """Do nothing; streamers have it."""

    @property
    def speed(self) -> float:
        """Tokens per second after the first call, which runs the prompt."""
        (start, _), *rest = self.arrived[1:]
        return sum(count for _, count in rest) / (rest[-1][0] - start)


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per text and program: tokens per second after the first, and the ratio."""
    opened = open_model("smollm2", device=str(device), dtype="bfloat16")
    programs = {**_transom(opened.model), **_transformers(device)}
    found = []
    for text, prompt in PROMPTS.items():
        ids = opened.template.encode([{"role": "user", "content": prompt}])
        clocks: dict[str, list[Clock]] = {name: [] for name in programs}
        for turn in range(1 + ROUNDS):  # the first warms up
            for name, program in list(programs.items())[:: 1 if turn % 2 else -1]:
                clocks[name].append(program(ids))
        speeds = {n: statistics.median(c.speed for c in clocks[n][1:]) for n in programs}
        for name, speed in speeds.items():
            peer, counts = name.replace("look-up", "plain"), clocks[name][-1].counts
            row = {"benchmark": "speculative decoding", "case": f"{name}, {text}", "peer": peer}
            row |= {"decode_tokens_per_s": round(speed, 1)}
            row |= {"ratio": round(speed / speeds[peer], 2)}
            found.append(row | (vars(counts) if counts.drafted_tokens else {}))
    return found


def _transom(model: Any) -> dict[str, Program]:
    made: dict[str, Program] = {}
    for way, most in (("plain", None), ("look-up", MOST)):

        def append(ids: list[int], most: int | None = most) -> Clock:
            clock, decode = Clock(), DecodeArgs(prompt_lookup_num_tokens=most)
            clock.put(torch.tensor(ids))
            options = {"max_new_tokens": NEW, "decode": decode, "counts": clock.counts}
            for row in stream(model, [ids], **options):
                clock.put(torch.tensor(row))
            return clock

        made[f"Transom, {way}"] = append
    return made


def _transformers(device: torch.device) -> dict[str, Program]:
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        convert("smollm2", Path(scratch) / "hf")
        model = AutoModelForCausalLM.from_pretrained(Path(scratch) / "hf", dtype=torch.bfloat16)
    model = model.to(device)
    made: dict[str, Program] = {}
    for way, given in (("plain", {}), ("look-up", {"prompt_lookup_num_tokens": MOST})):

        def append(ids: list[int], given: dict[str, Any] = given) -> Clock:
            tokens, clock = torch.tensor([ids], device=device), Clock()
            mask, ends = torch.ones_like(tokens), {"min_new_tokens": NEW, "max_new_tokens": NEW}
            options = {"do_sample": False, "streamer": clock, **ends, **given}
            model.generate(tokens, attention_mask=mask, **options)
            return clock

        made[f"transformers, {way}"] = append
    return made
