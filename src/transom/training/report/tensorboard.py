"""Rows of metrics.jsonl as TensorBoard curves, if that package is installed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import notice, optional

FOLDER = "tensorboard"  # in the run folder
LEFT_OUT = "tensorboard: {} ({}) is left out; metrics.jsonl has it"
MOST_CURVES = 64  # of one field: every layer times every expert would drown all others


def writer_class() -> Any:
    """Return torch's `SummaryWriter`.

    Raises:
        RequestError: If the package is not installed.
    """
    needs = "tensorboard: got True; expected false, or the package (pip install tensorboard)"
    return optional("torch.utils.tensorboard", needs).SummaryWriter


class TensorBoard:
    """Writes every row that it is given. Open one per run, on rank 0 only."""

    def __init__(self, run: Path, *, first_step: int = 0) -> None:
        """Write to `run/tensorboard`, and hide older rows from `first_step` on."""
        self._writer = writer_class()(log_dir=str(run / FOLDER), purge_step=first_step)

    def write(self, row: Mapping[str, Any]) -> None:
        """Write every number of a row at its `step`.

        Nested names are joined by `/`, and lists are numbered. A field of more than `MOST_CURVES`
        numbers is left out, with a notice.
        """
        step = int(row["step"])
        for field, content in row.items():
            leaves = list(_flat(content, field)) if field != "step" else []
            if len(leaves) > MOST_CURVES:
                notice(LEFT_OUT.format(field, f"{len(leaves)} numbers"))
                continue
            for name, value in leaves:
                if isinstance(value, str):
                    self._writer.add_text(name, value, step)
                elif isinstance(value, (int, float)):
                    self._writer.add_scalar(name, value, step)
                elif value is not None:
                    notice(LEFT_OUT.format(name, type(value).__name__))
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the files."""
        self._writer.close()


def _flat(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield names and leaves of nested mappings and lists."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{name}/{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(item, f"{name}/{index}")
    else:
        yield name, value
