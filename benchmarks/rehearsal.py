"""Rehearsing a step of 1,024 ranks: seconds and memory of the process."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import torch

CASES = {
    "llama3-8b, tensor 8": ("llama3-8b", "parallel.tensor=8"),
    "mixtral-8x7b, expert 8": ("mixtral-8x7b", "parallel.expert=8"),
}
RANKS, WORDS = 1024, ("data.seq_len=4096", "data.batch_size=1024", "activation_checkpoint=full")
# Resident memory at its highest, in bytes, as the last line of the process.
CODE = """
import sys, torch
from transom.base.runtime import memory_bytes
from transom.cli.main import main
code = main(sys.argv[1:])
print(memory_bytes(torch.device("cpu")))
sys.exit(code)
"""


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per model, each rehearsed in a process of its own."""
    if device.type != "cpu":
        return []
    found = []
    for case, (model, degree) in CASES.items():
        words = ["train", f"model={model}", degree, *WORDS, "--rehearse", str(RANKS), "--json"]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True
        )
        seconds = time.perf_counter() - start
        *_, document, memory = done.stdout.splitlines()
        needed = sum(json.loads(document)["memory"].values())
        row = {"benchmark": "rehearsal", "case": case, "ranks": RANKS, "seconds": round(seconds, 1)}
        found.append(
            {**row, "process_gb": round(int(memory) / 1e9, 2), "rank_gb": round(needed / 1e9, 2)}
        )
    return found
