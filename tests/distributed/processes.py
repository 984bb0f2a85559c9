"""Commands in processes of their own, and the ranks that they start."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT = 240  # seconds of one command; the machine may be busy
MODEL = "model={dim: 32, n_layers: 2, n_heads: 4, n_kv_heads: 2, hidden_dim: 48, max_seq_len: 64}"


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def words(folder: Path, *more: str) -> list[str]:
    """Return the arguments of a small run on texts that are written into a folder."""
    texts = folder / "texts"
    if not texts.exists():
        texts.mkdir()
        for number in range(5):
            draw = random.Random(number)
            pets = ("cat", "dog", "hen", "owl", "sees", "calls", "the", "a")
            text = " ".join(draw.choice(pets) for _ in range(800))
            (texts / f"{number}.txt").write_text(text)
    return [
        *("train", f"data.sources={texts}", "data.held_out=0", "data.seq_len=32", MODEL),
        *("data.batch_size=8", "tokenizer.kind=bytes", "device=cpu", "dtype=float32"),
        *("dry_run=false", "optimizer.lr=0.01", *more),
    ]


def start(command: list[str], **changes: str) -> subprocess.Popen[str]:
    """Start `transom` with these arguments."""
    return subprocess.Popen(
        [sys.executable, "-m", "transom", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**changes),
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of a command."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        for rank in ranks_of(process).values():
            os.kill(rank, signal.SIGKILL)
        process.kill()
        out, err = process.communicate()
        raise AssertionError(f"the command hangs\n{out}\n{err}") from None
    return process.returncode, out, err


def run(command: list[str], **changes: str) -> tuple[int, str, str]:
    return finish(start(command, **changes))


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """Return the process of each rank that a command has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            pairs = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        values = dict(pair.split(b"=", 1) for pair in pairs if b"=" in pair)
        if parent == launcher.pid and b"RANK" in values:
            found[int(values[b"RANK"])] = int(folder.name)
    return found


def rows(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run) if "loss" in row]


def wait_for_step(
    process: subprocess.Popen[str], run: Path, step: int, saved: bool = False
) -> None:
    """Wait until a run has taken a number of steps, and has written a checkpoint if `saved`."""
    end = time.monotonic() + LIMIT
    while max((row["step"] for row in rows(run)), default=0) < step or (
        saved and not (run / "latest").exists()
    ):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.02)
