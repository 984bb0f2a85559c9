"""Seconds of a complete process: what a user waits before anything happens, and for a token."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from transom.checkpoints.convert import convert

CASES = {
    "transom --help": ([sys.executable, "-m", "transom", "--help"], 0.3),
    "import transom": ([sys.executable, "-c", "import transom"], 0.2),
    "transom inspect llama3-8b": ([sys.executable, "-m", "transom", "inspect", "llama3-8b"], 1.0),
    "python -c pass": ([sys.executable, "-c", "pass"], None),
}
PROMPT = "The capital of France is"
FIRST_TOKEN = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer({PROMPT!r}, return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0]))
"""


def rows(device: torch.device, part: str = "") -> list[dict[str, Any]]:
    """Return the median of interleaved runs; `part` is `processes` or `first token`, "" is both."""
    del device
    made: list[dict[str, Any]] = []
    if part != "first token":
        seconds = _interleaved({name: command for name, (command, _) in CASES.items()}, 7)
        made += [
            {
                "benchmark": "start-up",
                "case": name,
                "seconds": round(seconds[name], 3),
                "target": limit and f"at most {limit} s",
            }
            for name, (_, limit) in CASES.items()
        ]
    if part != "processes":
        made += _first_token()
    return made


def _first_token() -> list[dict[str, Any]]:
    """Return the rows of one greedy token of SmolLM2, by a verb and by a script that opens its
    folder of the same dtype with transformers.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        convert("smollm2", folder, dtype="bfloat16")
        generate = [sys.executable, "-m", "transom", "generate"]
        one = ["--prompt", PROMPT, "--max-tokens", "1"]
        peer = "transformers"
        seconds = _interleaved(
            {
                "transom generate smollm2": [*generate, "smollm2", *one],
                "transom generate smollm2 --keep-quantized": [
                    *generate,
                    "smollm2",
                    "--keep-quantized",
                    *one,
                ],
                "transom generate FOLDER": [*generate, str(folder), *one],
                peer: [sys.executable, "-c", FIRST_TOKEN, str(folder)],
            },
            5,
        )
    return [
        {
            "benchmark": "first token of SmolLM2",
            "case": name,
            "peer": peer,
            "seconds": round(taken, 2),
            "ratio": round(seconds[peer] / taken, 2),
            "target": None if name == peer else "ratio at least 2",
        }
        for name, taken in seconds.items()
    ]


def _interleaved(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each command, after one run that fills caches."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(1 + rounds):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True, env=environment)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}
