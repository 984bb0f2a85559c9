"""Opening a folder of 1.1B parameters: time to the first token, memory, speed of conversion."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import interleaved
from transom.base.runtime import pick_dtype
from transom.checkpoints.convert import convert
from transom.checkpoints.files.layout import WEIGHTS
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.checkpoints.state import meta_model
from transom.config.model_args import ModelArgs
from transom.inference.loop import generate

# TinyLlama's: 1.1 billion parameters, 2.2 GB in bfloat16.
SHAPE: dict[str, Any] = {
    "dim": 2048,
    "n_layers": 22,
    "n_heads": 32,
    "n_kv_heads": 4,
    "hidden_dim": 5632,
    "vocab_size": 32000,
    "max_seq_len": 2048,
    "rope_layout": "halves",  # as the files have it
}
ROUNDS = 3
NEEDED_BYTES = 6 * 10**9  # the folder, one copy or conversion of it, and room for others
PROMPT = tuple(range(5, 21))
LOADERS, WRITERS = ("transom", "transformers"), ("native", "mistral", "copy")
# transformers imports much on first use: what its loading needs is named, so that it counts as an
# import.
_THEIRS = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto",
    "transformers.generation",
)
_OURS = ("transom.checkpoints.load", "transom.inference.loop")
Facts = dict[str, Any]
Measure = Callable[[str, str, str, bool], Facts]


def rows(
    device: torch.device, shape: Mapping[str, Any] = SHAPE, **how: Any
) -> list[dict[str, Any]]:
    """Return rows of loading, imports, memory and both conversions.

    If there is too little room on the disk, the result is one row that says so.

    Args:
        device: Only the CPU is measured.
        shape: The shape of the model.
        **how: `rounds`, and `measure` in place of a fresh process for each measurement.
    """
    if device.type != "cpu":
        return []
    with tempfile.TemporaryDirectory() as folder:
        free = shutil.disk_usage(folder).free
        if free < NEEDED_BYTES and shape is SHAPE:
            case = (
                f"left out: {free / 1e9:.1f} GB free for temporary files, "
                f"{NEEDED_BYTES / 1e9:.0f} GB needed"
            )
            return [{"benchmark": "load", "case": case}]
        parameters = write_folder(Path(folder) / "hf", shape)
        return _rows_of(
            folder, parameters, str(pick_dtype("auto", device)).removeprefix("torch."), **how
        )


def write_folder(folder: Path, shape: Mapping[str, Any]) -> int:
    """Write a folder of random bfloat16 weights in the format of transformers.

    Returns:
        Its number of parameters.
    """
    model = meta_model(ModelArgs.from_dict(dict(shape))).to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(1.0) if weight.ndim == 1 else weight.normal_(
                0.0, 0.02, generator=generator
            )
    save(model, folder, format="hf")
    _flush(folder)
    return sum(weight.numel() for weight in model.parameters())


def _rows_of(
    folder: str, parameters: int, dtype: str, rounds: int = ROUNDS, measure: Measure | None = None
) -> list[dict[str, Any]]:
    run = measure or in_fresh_process
    seen = _rounds(LOADERS, run, f"{folder}/hf", dtype, rounds)
    written = _rounds(WRITERS, run, f"{folder}/hf", f"{folder}/out", rounds)
    rows = [_loading(seen, dtype), _imports(rounds), _memory(seen, parameters, dtype)]
    if (
        dtype != "bfloat16"
    ):  # what loading costs in the files' own dtype, however slow its products are here
        own = {job: [run(job, f"{folder}/hf", "bfloat16", True)] for job in LOADERS}
        rows.append(_memory(own, parameters, "bfloat16"))
    size = (Path(folder) / "hf" / WEIGHTS).stat().st_size
    return rows + [_conversion(written, format, size) for format in WRITERS if format != "copy"]


def _rounds(
    jobs: Iterable[str], run: Measure, folder: str, word: str, rounds: int
) -> dict[str, list[Facts]]:
    """Return the results of each job in each round; memory is watched in the first round only."""
    found: dict[str, list[Facts]] = {job: [] for job in jobs}
    for turn in range(1 + rounds):
        for job in list(found)[:: 1 if turn % 2 else -1]:
            found[job].append(run(job, folder, word, turn == 0))
    return found


def _median(facts: list[Facts], key: str) -> float:
    return statistics.median(one[key] for one in facts[1:])


def _loading(seen: Mapping[str, list[Facts]], dtype: str) -> dict[str, Any]:
    ours, peer = (seen[job] for job in LOADERS)
    seconds, peer_seconds = _median(ours, "seconds"), _median(peer, "seconds")
    return {
        "benchmark": "load",
        "case": f"load and first token, {dtype}",
        "peer": "transformers from_pretrained and generate; fresh processes after imports, files "
        "in memory",
        "ours_only": "all weights looked through for NaN and infinity",
        "seconds": round(seconds, 2),
        "peer_seconds": round(peer_seconds, 2),
        "ratio": round(peer_seconds / seconds, 2),
        "target": "at least 2",
        "load_seconds": round(_median(ours, "load_seconds"), 2),
        "peer_load_seconds": round(_median(peer, "load_seconds"), 2),
        "same_token": "yes" if ours[0]["token"] == peer[0]["token"] else "no",
    }


def _imports(rounds: int) -> dict[str, Any]:
    commands = {
        name: [sys.executable, "-c", f"import {', '.join(modules)}"]
        for name, modules in (("ours", _OURS), ("peer", _THEIRS))
    }
    calls = {
        name: lambda command=command: subprocess.run(command, check=True)
        for name, command in commands.items()
    }
    seconds = interleaved(calls, torch.device("cpu"), rounds=rounds)
    return {
        "benchmark": "load",
        "case": "imports before that, torch among them",
        "peer": "transformers' Llama and its generation",
        "seconds": round(seconds["ours"], 2),
        "peer_seconds": round(seconds["peer"], 2),
        "ratio": round(seconds["peer"] / seconds["ours"], 2),
    }


def _memory(seen: Mapping[str, list[Facts]], parameters: int, dtype: str) -> dict[str, Any]:
    size = parameters * getattr(torch, dtype).itemsize
    ours, peer = (seen[job][0]["peak_bytes"] for job in LOADERS)
    return {
        "benchmark": "load",
        "case": f"peak anonymous memory, {dtype}, the imports' share included",
        "peer": "bytes of the model",
        "mib": round(ours / 2**20),
        "model_mib": round(size / 2**20),
        "ratio": round(ours / size, 3),
        "target": "at most 1.1",
        "before_mib": round(seen["transom"][0]["before_bytes"] / 2**20),
        "transformers_mib": round(peer / 2**20),
    }


def _conversion(written: Mapping[str, list[Facts]], format: str, size: int) -> dict[str, Any]:
    seconds, peer_seconds = (_median(written[job], "seconds") for job in (format, "copy"))
    first = written[format][0]
    return {
        "benchmark": "load",
        "case": f"convert hf to {format}",
        "peer": "copying the file; both until the last byte is on the disk",
        "seconds": round(seconds, 2),
        "peer_seconds": round(peer_seconds, 2),
        "ratio": round(peer_seconds / seconds, 2),
        "mb_per_s": round(size / seconds / 1e6),
        "buffered_seconds": round(_median(written[format], "buffered_seconds"), 2),
        "peer_buffered_seconds": round(_median(written["copy"], "buffered_seconds"), 2),
        "added_mib": round((first["peak_bytes"] - first["before_bytes"]) / 2**20),
    }


def in_fresh_process(job: str, folder: str, word: str, watched: bool) -> Facts:
    """Return what `python -m benchmarks.load` prints, so that jobs share no memory."""
    command = [sys.executable, "-m", "benchmarks.load", job, folder, word, *["watched"] * watched]
    return dict(
        json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    )


def measure(job: str, folder: str, word: str, watched: bool) -> Facts:
    """Return the seconds of one of `LOADERS` or `WRITERS`, and its memory if `watched`.

    `word` is the dtype of a loader, or the output folder of a writer.
    """
    works: dict[str, Callable[[str, str], Facts]] = {"transom": _ours, "transformers": _theirs}
    if job == "transformers":
        for module in _THEIRS:
            importlib.import_module(module)
    work = works.get(job) or (lambda source, out: _write(job, Path(source), Path(out)))
    if not watched:
        return work(folder, word)
    before = anonymous_bytes()
    highest, done = [before], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            highest[0] = max(highest[0], anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        facts = work(folder, word)
    finally:
        done.set()
        watcher.join()
    return {**facts, "before_bytes": before, "peak_bytes": highest[0]}


def _ours(folder: str, dtype: str) -> Facts:
    start = time.perf_counter()
    model = load(folder, dtype=dtype)
    loaded = time.perf_counter()
    token = int(generate(model, [list(PROMPT)], 1)[0, -1])
    return {"seconds": time.perf_counter() - start, "load_seconds": loaded - start, "token": token}


def _theirs(folder: str, dtype: str) -> Facts:
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    loaded = time.perf_counter()
    prompt = torch.tensor([PROMPT])
    mask = torch.ones_like(prompt)
    made = model.generate(
        prompt, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0
    )
    token = int(made[0, -1])
    return {"seconds": time.perf_counter() - start, "load_seconds": loaded - start, "token": token}


def _write(job: str, folder: Path, out: Path) -> Facts:
    """Convert a folder or copy its weights into `out`, and remove `out` afterwards."""
    start = time.perf_counter()
    if job == "copy":
        out.mkdir()
        shutil.copyfile(folder / WEIGHTS, out / WEIGHTS)
    else:
        convert(folder, out, "native" if job == "native" else "mistral")
    buffered = time.perf_counter()
    _flush(out)
    end = time.perf_counter()
    shutil.rmtree(out)
    return {"seconds": end - start, "buffered_seconds": buffered - start}


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def anonymous_bytes() -> int:
    """Return the memory of this process that is not backed by a file; Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:4], watched=len(sys.argv) > 4)))
