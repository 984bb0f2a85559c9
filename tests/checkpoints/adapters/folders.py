"""Folders of tiny models and of adapters for them, which the tests of merging share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers import random_model, tiny_args
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.fingerprint import fingerprint, write_facts
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.tokenizers.training import byte_tokenizer


def write_base(
    folder: Path,
    format: Any = "hf",
    dtype: str = "bfloat16",
    seed: int = 0,
    std: float = 0.15,
    **fields: Any,
) -> Path:
    """A model that reads bytes, with its tokenizer."""
    tokenizer = byte_tokenizer()
    changes = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_dim": 64,
        "rope_layout": "halves",
        **fields,
    }
    save(random_model(tiny_args(**changes), seed=seed, std=std), folder, format, tokenizer, dtype)
    return folder


def write_adapter(
    folder: Path,
    base: Path,
    *,
    seed: int = 0,
    size: float = 0.1,
    quantize: dict[str, Any] | None = None,
    dtype: str | None = None,
    facts: bool = True,
    **lora: Any,
) -> Path:
    """An adapter with every part drawn, by `size`, and `transom.json` unless there are to be no
    `facts`.
    """
    model = load(base, dtype="float32")
    apply_lora(model, LoraArgs(**{"rank": 4, "alpha": 8.0, **lora}))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if ".lora." in key:
                weight.add_(torch.randn(weight.shape, generator=draws) * size)
    save_adapter(model, folder, base=str(base))
    if facts:
        write_facts(folder, base, fingerprint(base), quantize, dtype)
    return folder


def write_run(folder: Path, base: Path, **adapter: Any) -> Path:
    """A run whose steps are adapters: the best is the first of two."""
    for seed, step in enumerate(("step_000010", "step_000020")):
        write_adapter(folder / step, base, seed=seed, **adapter)
    (folder / "best").write_text("step_000010\n")
    (folder / "latest").write_text("step_000020\n")
    return folder
