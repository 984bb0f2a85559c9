"""Two processes of one thread against one: the tokens per second of `transom train`."""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from transom.config.model_args import ModelArgs
from transom.planning.counts import parameters

SHAPE: dict[str, Any] = {
    "dim": 320,
    "n_layers": 6,
    "n_heads": 5,
    "hidden_dim": 864,
    "max_seq_len": 512,
}
VOCABULARY = 8192
ROWS, LENGTH, STEPS, ROUNDS = 8, 256, 6, 3
CASES = {
    "1 process": (1, "parallel.replicate=1"),
    "2 processes, replicate 2": (2, "parallel.replicate=2"),
    "2 processes, shard 2": (2, "parallel.shard=2"),
}


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per case: tokens per second, and how often those of one process."""
    assert device.type == "cpu", "two processes need two devices"
    rates: dict[str, list[float]] = {case: [] for case in CASES}
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts"
        texts.mkdir()
        (texts / "one.txt").write_text("the quick brown fox " * 20_000)
        for turn in range(ROUNDS):
            for case in list(CASES)[:: 1 if turn % 2 else -1]:
                rates[case].append(_tokens_per_second(Path(folder), *CASES[case]))
    middle = {case: statistics.median(values) for case, values in rates.items()}
    size = parameters(ModelArgs(**SHAPE, vocab_size=VOCABULARY))
    return [
        {
            "benchmark": "scale",
            "case": f"{case}, 1 thread each, {ROWS} x {LENGTH} tokens",
            "peer": "1 process",
            "parameters": size,
            "tokens_per_second": round(middle[case], 1),
            "ratio": round(middle[case] / middle["1 process"], 3),
            "target": 1.5 if "replicate" in case else None,
        }
        for case in CASES
    ]


def _tokens_per_second(folder: Path, ranks: int, degree: str) -> float:
    """Return the median over the steps of a run but the first two, which warm up."""
    shape = ", ".join(f"{name}: {value}" for name, value in SHAPE.items())
    command = [
        *("train", f"data.sources={folder / 'texts'}", f"out={folder / 'run'}", "--overwrite"),
        *(f"model={{{shape}, vocab_size: {VOCABULARY}}}", "tokenizer.kind=bytes"),
        *("data.held_out=0", f"data.seq_len={LENGTH}", f"data.batch_size={ROWS}"),
        *(f"steps={STEPS}", "device=cpu", "dtype=float32", "dry_run=false", "--quiet"),
    ]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    place |= {"OMP_NUM_THREADS": "1", "TRANSOM_CACHE": str(folder / "cache")}
    processes = [
        subprocess.Popen(  # in this session, as the agent of torchrun does not
            [sys.executable, "-m", "transom", *command, degree],
            stdout=subprocess.DEVNULL,
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    codes = [process.wait() for process in processes]
    assert not any(codes), "a rank failed"
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return statistics.median(
        row["tokens_per_second"] for row in found if "loss" in row and row["step"] > 2
    )
