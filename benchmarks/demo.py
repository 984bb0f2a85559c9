"""The demo: held-out bits per byte beside compressors, in a fresh process."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from typing import Any

import torch


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return the document of `transom demo --json` as one row."""
    del device
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "transom",
            "demo",
            f"out={folder}/demo",
            "--json",
            "--quiet",
        ]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts = json.loads(done.stdout.splitlines()[-1])
    facts.pop("run")
    return [
        {
            "benchmark": "demo",
            "case": "transom demo",
            "peer": "xz -9e with the training files in front",
            **facts,
            "ratio": round(facts["xz_primed_bits_per_byte"] / facts["val_bits_per_byte"], 3),
            "target": "at most 1.60 bits per byte in at most 180 s of training",
        }
    ]
