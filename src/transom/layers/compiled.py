"""torch.compile with a cache of its own results that lasts, in the cache folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from transom.base.files import cache_dir


def compile_forward(
    forward: Callable[..., Any], backend: str | Callable[..., Any] = "inductor", **options: Any
) -> Callable[..., Any]:
    """Return `torch.compile(forward)`; the next process finds its kernels in the cache folder.

    The user's own TORCHINDUCTOR_CACHE_DIR is kept.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_dir() / "inductor"))
    # Layers of all kinds share the code of a block. Beyond the limit, they would run uncompiled.
    config = torch._dynamo.config
    config.recompile_limit = max(64, config.recompile_limit)
    return torch.compile(forward, backend=backend, options=options or None)
