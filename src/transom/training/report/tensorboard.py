"""The rows of metrics.jsonl as TensorBoard curves, where that package is installed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice

FOLDER = "tensorboard"  # in the run folder
MOST_CURVES = 64  # of one field: every layer times every expert would drown all others


def writer_class() -> Any:
    """torch's `SummaryWriter`; a missing package is a `RequestError` that says how to get it."""
    try:
        return importlib.import_module("torch.utils.tensorboard").SummaryWriter
    except ImportError:
        raise RequestError(
            "tensorboard = True: the package is not installed; pip install tensorboard, or "
            "expected false"
        ) from None


class TensorBoard:
    """Mirrors every row given to `write`; open one per run, on rank 0 only."""

    def __init__(self, run: Path, *, first_step: int = 0) -> None:
        """Curves go to `run/tensorboard`; what an interrupted run wrote from `first_step` on is
        hidden.
        """
        self._writer = writer_class()(log_dir=str(run / FOLDER), purge_step=first_step)
        self._left_out: set[str] = set()

    def write(self, row: Mapping[str, Any]) -> None:
        """Every number of a row at its `step`: nested names joined by `/`, texts as texts, lists by
        index.

        A field of more than `MOST_CURVES` numbers is left out, which is said once.
        """
        step = int(row["step"])
        for field, content in row.items():
            leaves = list(_flat(content, field)) if field != "step" else []
            if len(leaves) > MOST_CURVES:
                self._leave_out(field, f"{len(leaves)} numbers")
                continue
            for name, value in leaves:
                if isinstance(value, str):
                    self._writer.add_text(name, value, step)
                elif isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)
                elif value is not None:
                    self._leave_out(name, type(value).__name__)
        self._writer.flush()

    def _leave_out(self, name: str, what: str) -> None:
        if name not in self._left_out:
            self._left_out.add(name)
            notice(f"tensorboard: {name} ({what}) is left out; metrics.jsonl has it")

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, leaf) of nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}/{index}")
    else:
        yield name, value
