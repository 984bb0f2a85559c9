"""Curves from metric rows, with a stand-in for the package, which is not among the tests'
dependencies.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import run_python
from transom.base.errors import RequestError
from transom.training.report.tensorboard import TensorBoard, writer_class


class Recorder:
    """What torch's SummaryWriter is asked for, written down."""

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.log_dir, self.purge_step = log_dir, purge_step
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[tuple[str, str, int]] = []
        self.flushed, self.closed = 0, False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, value: str, step: int) -> None:
        self.texts.append((name, value, step))

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The writers that are made while the package seems to be there."""
    made: list[Recorder] = []

    def make(**options: Any) -> Recorder:
        made.append(Recorder(**options))
        return made[-1]

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = make  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    return made


def test_rows_become_curves(opened: list[Recorder], tmp_path: Path) -> None:
    board = TensorBoard(tmp_path, first_step=7)
    board.write(
        {
            "step": 7,
            "loss": 2.5,
            "learning_rates": {"matrices": 0.02, "output": 1e-3},
            "tokens": 128,
        }
    )
    board.write({"step": 8, "held_out": {"bits_per_byte": 1.5, "sources": {"a/b": {"tokens": 3}}}})
    board.write(
        {"step": 9, "samples": [{"prompt": "The", "text": "cat"}], "expert_load": [[0.25, 0.75]]}
    )
    board.close()
    (writer,) = opened
    assert (writer.log_dir, writer.purge_step) == (str(tmp_path / "tensorboard"), 7)
    assert writer.scalars == [
        ("loss", 2.5, 7),
        ("learning_rates/matrices", 0.02, 7),
        ("learning_rates/output", 1e-3, 7),
        ("tokens", 128, 7),
        ("held_out/bits_per_byte", 1.5, 8),
        ("held_out/sources/a/b/tokens", 3, 8),
        ("expert_load/0/0", 0.25, 9),
        ("expert_load/0/1", 0.75, 9),
    ]
    assert writer.texts == [("samples/0/prompt", "The", 9), ("samples/0/text", "cat", 9)]
    assert writer.flushed == 3 and writer.closed


def test_what_is_left_out_is_said_once(
    opened: list[Recorder], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    board = TensorBoard(tmp_path)
    for step in (1, 2):
        row = {
            "loss": None,
            "odd": b"x",
            "rate": float("nan"),
            "load": [[0.1] * 8] * 9,
            "part": [0.1] * 64,
        }
        board.write({"step": step, **row})
    assert capsys.readouterr().err == (
        "transom: tensorboard: odd (bytes) is left out; metrics.jsonl has it\n"
        "transom: tensorboard: load (72 numbers) is left out; metrics.jsonl has it\n"
    )
    assert len(opened[0].scalars) == 2 * (1 + 64)


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(RequestError, match=r"^tensorboard: got True; .*pip install tensorboard"):
        writer_class()


def test_it_is_imported_only_when_asked_for() -> None:
    code = (
        "import transom.training.report.tensorboard, sys; print([n for n in sys.modules if "
        "'tensorboard' in n])"
    )
    assert run_python(code).strip() == "['transom.training.report.tensorboard']"
