"""Output matrix and cross-entropy in chunks against full logits, forward and backward."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.common import interleaved
from transom.config.model_args import ModelArgs
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import head_loss
from transom.training.losses.log_probs import chunk_tokens

TOKENS, DIM = 1024, 768
VOCABULARIES = (131072, 32768, 8192)


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per vocabulary: time, and memory above hidden states and weights."""
    out = []
    for vocab_size in VOCABULARIES:
        cases = _cases(vocab_size, device)
        seconds = interleaved(cases, device, rounds=5)
        if device.type == "cuda":
            mib = {name: cuda_peak_mib(call) for name, call in cases.items()}
            how = "peak allocated by torch"
        else:
            del cases
            mib = {
                name: subprocess_peak_mib("benchmarks.head_loss", name, str(vocab_size))
                for name in seconds
            }
            how = "peak resident memory of a fresh process"
        out.append(
            {
                "benchmark": "head loss",
                "case": f"{TOKENS:,} tokens, dim {DIM}, vocabulary {vocab_size:,}, forward + "
                f"backward",
                "peer": "full logits and torch's cross_entropy",
                "tokens_per_chunk": chunk_tokens(TOKENS, vocab_size),
                "seconds": round(seconds["ours"], 4),
                "peer_seconds": round(seconds["peer"], 4),
                "ratio": round(seconds["peer"] / seconds["ours"], 2),
                "mib": mib["ours"],
                "peer_mib": mib["peer"],
                "memory_share": round(mib["ours"] / mib["peer"], 2),
                "memory": how,
                "target": "memory_share at most 0.45, ratio at least 0.95"
                if vocab_size == VOCABULARIES[0]
                else None,
            }
        )
    return out


def _cases(vocab_size: int, device: torch.device) -> dict[str, Callable[[], None]]:
    model = LLM(
        ModelArgs(dim=DIM, n_layers=1, n_heads=12, vocab_size=vocab_size, tie_embeddings=True)
    )
    weight = model.tok_embeddings.weight
    torch.nn.init.normal_(weight, std=DIM**-0.5)
    model.to(device)
    hidden = torch.randn(1, TOKENS, DIM, device=device, requires_grad=True)
    targets = torch.randint(vocab_size, (1, TOKENS), device=device)
    half = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    def run(loss: Callable[[], torch.Tensor]) -> None:
        with half:
            value = loss()
        value.backward()
        hidden.grad = model.tok_embeddings.weight.grad = None

    def full() -> torch.Tensor:
        logits = F.linear(hidden, model.tok_embeddings.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")

    return {
        "ours": lambda: run(lambda: head_loss(model, hidden, targets)),
        "peer": lambda: run(full),
    }


def cuda_peak_mib(call: Callable[[], object]) -> float:
    """Return the largest MiB that torch allocates during a call, above what it had before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


def subprocess_peak_mib(module: str, *words: str) -> float:
    """Return the MiB that `python -m MODULE WORDS` prints; a fresh process has no earlier peak."""
    command = [sys.executable, "-m", module, *words]
    return float(
        json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    )


def resident_peak_mib(call: Callable[[], object]) -> float:
    """Return the largest MiB that a call adds to this process's resident memory; Linux only."""
    Path("/proc/self/clear_refs").write_text(
        "5"
    )  # the peak so far is that of importing torch: begin anew
    before = _kib("VmRSS")
    call()
    return round((_kib("VmHWM") - before) / 1024, 1)


def _kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


if __name__ == "__main__":
    small, large = (
        _cases(size, torch.device("cpu"))[sys.argv[1]] for size in (64, int(sys.argv[2]))
    )
    small()  # what the first call allocates for good
    print(json.dumps(resident_peak_mib(large)))
