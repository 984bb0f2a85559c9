"""Peak memory of attention over the sequence length, gradients included.

The memory of every mask rule must grow no faster than the sequence.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from transom.attention.backends import auto, choose
from transom.attention.mask import Layout, MaskSpec
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule

LENGTHS = (8192, 16384, 32768, 65536)
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 64
RULES = {
    "causal": LayerRule(),
    "window 512": LayerRule("window", 512),
    "chunk 8192": LayerRule("chunk", 8192),
    "causal, soft cap and sinks": LayerRule(),
}


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per rule: MiB of a forward and backward by length, and their growth."""
    if device.type != "cpu":
        return []
    out = []
    for case in RULES:
        mib, name = {}, ""
        for length in LENGTHS:
            command = [sys.executable, "-m", "benchmarks.attention_memory", case, str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            mib[str(length)], name = json.loads(done.stdout)
        first, last = LENGTHS[0], LENGTHS[-1]
        out.append(
            {
                "benchmark": "attention memory",
                "case": f"{case}, forward + backward",
                "peer": "linear growth from 8,192 to 65,536 tokens",
                "backend": name,
                "mib_by_length": mib,
                "ratio": round(mib[str(last)] / mib[str(first)] / (last / first), 3),
                "target": "at most 1.0, linear in length; dense scores give 8.0",
            }
        )
    return out


def _run(case: str, length: int) -> str:
    shapes = (
        (1, length, HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
        (1, length, KV_HEADS, HEAD_DIM),
    )
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    positions = torch.arange(length)[None]
    score = ScoreArgs(softcap=50.0, sinks_N=torch.zeros(HEADS)) if "sinks" in case else ScoreArgs()
    job = (
        q,
        CacheView((k, v), positions, new_at=0),
        MaskSpec(RULES[case], positions, layout=Layout((length,))),
        score,
    )
    auto(*job).sum().backward()
    return choose(*job).name


def main(case: str, length: int) -> None:
    """Print the MiB that a forward and backward adds to the peak, and the backend."""
    _run(case, 1024)  # what the first call allocates for good
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak so far is that of importing torch: begin anew
    before = _kib("VmRSS")
    name = _run(case, length)
    print(json.dumps([round((_kib("VmHWM") - before) / 1024, 1), name]))


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
