"""Results of a function on several ranks, which are processes that communicate through gloo."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transom.verify import forked_ranks


def run_ranks(work: Callable[..., Any], ranks: int, folder: Path, *args: Any) -> list[Any]:
    """Return what `work(*args)` returns on each rank."""
    forked_ranks.run_ranks(_written, ranks, folder, work, folder, args)
    return [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(ranks)]


def _written(rank: int, work: Callable[..., Any], folder: Path, args: tuple[Any, ...]) -> None:
    (folder / f"rank{rank}").write_bytes(pickle.dumps(work(*args)))
