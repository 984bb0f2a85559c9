"""Small models and tokens that every test can afford."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs
from transom.models.llm import LLM

TINY_VISION: dict[str, Any] = {
    "image_size": 8,
    "patch_size": 2,
    "dim": 16,
    "n_layers": 2,
    "n_heads": 2,
    "hidden_dim": 24,
    "adapter_dim": 20,
    "output_dim": 20,
}


def tiny_args(**changes: Any) -> ModelArgs:
    """A two-layer model of a few thousand weights with grouped heads, with fields replaced by
    `changes`.
    """
    base: dict[str, Any] = {
        "dim": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_kv_heads": 2,
        "hidden_dim": 48,
        "vocab_size": 61,
        "max_seq_len": 256,
    }
    return ModelArgs.from_dict({**base, **changes})


def random_model(args: ModelArgs, seed: int = 0, std: float = 0.2) -> LLM:
    """A model with every weight drawn: `init_weights` would leave each block the identity.

    Vectors (norms) are drawn around 1, so that a norm whose weight is lost or applied twice shows.
    """
    model = LLM(args)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            draw = torch.randn(weight.shape, generator=generator) * std
            weight.copy_(draw + 1.0 if weight.ndim == 1 else draw)
    return model.eval()


def random_tokens(rows: int, count: int, seed: int = 0, vocab_size: int = 60) -> Tensor:
    """Tokens [rows, count] below `vocab_size`; the default leaves the last id of `tiny_args` for
    padding.
    """
    return torch.randint(vocab_size, (rows, count), generator=torch.Generator().manual_seed(seed))


def run_python(code: str) -> str:
    """Standard output of `code` in a fresh process that finds this source tree; its failure is the
    test's.
    """
    root = Path(__file__).parents[1]
    path = os.pathsep.join(
        [str(root), str(root / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
