"""Streaming a model from the disk: bytes per second, beside reading its file in order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from benchmarks.load import SHAPE, write_folder
from transom.base.runtime import memory_bytes, reset_peak_memory, resident_bytes
from transom.checkpoints.files.file_pieces import PAGE, SourceFile
from transom.checkpoints.files.layout import WEIGHTS
from transom.checkpoints.load import load
from transom.inference.weight_streaming import Offload
from transom.layers.inputs import TransformerInput

LARGE = {**SHAPE, "n_layers": 8}  # 1 GB in bfloat16
PROMPT = 128  # tokens of a prefill
CALLS = 4  # in a row


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return rows of one token and of a prompt, every layer read from the disk.

    Nothing is in the page cache: our reads pass by it, and what accelerate reads is dropped before
    each of its calls.
    """
    if device.type != "cpu":
        return []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        write_folder(folder, LARGE)
        os.sync()
        return _rows_of(folder)


def _rows_of(folder: Path) -> list[dict[str, Any]]:
    path = folder / WEIGHTS
    size, source = path.stat().st_size, SourceFile(path)
    plans: list[Any] = []
    load(folder, offload=Offload("disk"), before_weights=plans.append)
    before = resident_bytes()
    offload = Offload("disk", plans[0].weight_bytes)
    model = load(folder, offload=offload, before_weights=lambda plan: 0)
    memory = torch.empty((1 << 25) + PAGE, dtype=torch.uint8)
    buffer = memory[-memory.data_ptr() % PAGE :][: 1 << 25]

    def in_order() -> None:
        for start in range(0, size - len(buffer), len(buffer)):
            source.read_into(buffer, start)

    def call(tokens: int) -> Callable[[], object]:
        inputs = TransformerInput(torch.ones(1, tokens, dtype=torch.int64), logits="last")

        def run() -> None:
            for _ in range(CALLS):
                model(inputs, inference=True)
            # What the next call begins with: this one had it from the last one.
            for future, _ in offload.stream._pending.values():
                future.result()

        return run

    ours = {"one token": call(1), f"a prompt of {PROMPT} tokens": call(PROMPT)}
    reset_peak_memory(torch.device("cpu"))
    call(1)()
    peak = memory_bytes(torch.device("cpu")) - before
    theirs = _accelerate(folder)
    cases = {"in order": in_order, "accelerate": theirs, **ours}
    seconds = interleaved(cases, torch.device("cpu"), rounds=5)
    read = CALLS * sum(one.nbytes for block in model.layers for one in block.parameters())
    sequential = (size - size % len(buffer)) / seconds["in order"]
    of_token = {"target": "at least 0.7", "accelerate_seconds": round(seconds["accelerate"], 3)}
    return [
        {
            "benchmark": "offload",
            "case": name,
            "peer": "its file read in order, 8 MiB at a time, past the page cache",
            "seconds": round(seconds[name] / CALLS, 3),
            "mb_per_s": round(read / seconds[name] / 1e6),
            "peer_mb_per_s": round(sequential / 1e6),
            "ratio": round(read / seconds[name] / sequential, 2),
            **(of_token if name == "one token" else {}),
            "model_mb": round(size / 1e6),
            "added_mb": round(peak / 1e6),
        }
        for name in ours
    ]


def _accelerate(folder: Path) -> Callable[[], object]:
    """Return a call of one token of the same model, whose layers accelerate reads from the disk."""
    from accelerate import init_empty_weights, load_checkpoint_and_dispatch
    from transformers import AutoConfig, AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    places = {f"model.layers.{index}": "disk" for index in range(LARGE["n_layers"])}
    places |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb"), "cpu")
    scratch = folder.parent / "offload"
    model = load_checkpoint_and_dispatch(
        model, str(folder), {**places, "lm_head": "cpu"}, offload_folder=str(scratch)
    )
    ids = torch.ones(1, 1, dtype=torch.int64)

    def run() -> object:
        for path in (folder / WEIGHTS, *scratch.glob("*")):
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
        with torch.no_grad():
            return model(ids)

    return run
