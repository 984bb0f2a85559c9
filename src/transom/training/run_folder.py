"""The folder of a run: step folders that are whole or absent, pointers to the latest and the best, metrics.

A step folder is a model folder plus the trainer's own state. It is written under a temporary name, hashed,
flushed to disk and renamed, so that a kill at any moment leaves either all of it or nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transom.checkpoints.folders import (
    CHECKSUMS,
    TRAINER_STATE,
    TRAINER_TENSORS,
    read_pointer,
    sha256_of,
    verify_checksums,
)
from transom.checkpoints.load import read_safetensors, write_tensors, write_text
from transom.errors import RequestError, WorkError, notice
from transom.paths import json_text, read_json, sync

OWN_FILES = (
    "config.yaml",
    "run.json",
    "metrics.jsonl",
    "report.html",
    "latest",
    "best",
    "trace.json",
    "tensorboard",
)
TEMPORARY = ".tmp-"


class RunFolder:
    """`path` with its step folders; refuses to mix two runs."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def untouched(self) -> str:
        """What is left of a run that cannot go on, and what to try."""
        step = read_pointer(self.path, "latest") if self.path.exists() else None
        kept = "no checkpoint was written yet" if step is None else f"the checkpoint {step.name} is untouched"
        return f"{kept}; try a lower learning rate"

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder that is not free, not ours to empty (`overwrite`) or holds nothing to `resume`."""
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path}: a file; accepted is a folder to write the run in")
        occupied = self.path.exists() and any(self.path.iterdir())
        if resume:
            if read_pointer(self.path, "latest") is None:
                raise RequestError(f"{self.path}: no finished step to resume from")
        elif occupied and not overwrite:
            raise RequestError(
                f"{self.path}: not empty; accepted with --overwrite or --resume, or name another folder"
            )
        elif occupied:  # remove what a run writes and nothing else: the folder may hold other people's files
            foreign = [p.name for p in self.path.iterdir() if not _is_own(p)]
            if foreign:
                raise RequestError(f"{self.path}: holds {foreign[0]!r}, which no run wrote; name another folder")

    def prepare(self, *, resume: bool) -> None:
        """Make the folder ready, after `check`: new and empty, or without unfinished checkpoints."""
        if resume:
            for item in self.path.glob(f"*{TEMPORARY}*"):
                notice(f"{item}: unfinished, removed")
                _remove(item)
        elif self.path.exists():
            for item in self.path.iterdir():
                _remove(item)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be made ({error.strerror})") from None

    def save_step(
        self,
        step: int,
        write_model: Callable[[Path], None],
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: bool,
        keep_last: int,
    ) -> Path:
        """Write one step folder, move the pointers to it, and drop steps beyond `keep_last` and the best."""
        final = self.path / f"step_{step:06d}"
        temporary = self.path / f"{final.name}{TEMPORARY}{os.getpid()}"
        try:
            # The latest step saved again, on the way out or to be the best, is the same step: it stays.
            if not final.exists() or final != read_pointer(self.path, "latest"):
                temporary.mkdir(exist_ok=True)
                write_model(temporary)
                write_tensors(temporary / TRAINER_TENSORS, dict(tensors))
                write_text(temporary / TRAINER_STATE, json.dumps(state, indent=2))
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                sums = {file.relative_to(temporary).as_posix(): sha256_of(file) for file in files}
                write_text(temporary / CHECKSUMS, json.dumps(sums, indent=2))
                for file in temporary.rglob("*"):
                    sync(file)
                sync(temporary)
                if final.exists():  # left over from before somebody pointed `latest` to an earlier step
                    shutil.rmtree(final)
                temporary.rename(final)
            if best:  # before `latest`: a kill in between must not lose the record that the state holds
                self._point("best", final)
            self._point("latest", final)
            sync(self.path)
        except (OSError, WorkError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise WorkError(f"{final}: checkpoint not written, earlier ones are untouched ({error})") from None
        self._prune(keep_last)
        return final

    def _point(self, name: str, step: Path) -> None:
        temporary = self.path / f"{name}{TEMPORARY}{os.getpid()}"
        write_text(temporary, step.name)
        sync(temporary)
        temporary.replace(self.path / name)

    def _prune(self, keep_last: int) -> None:
        steps = [p for p in self.path.iterdir() if _is_step(p) and TEMPORARY not in p.name]
        steps.sort(key=lambda step: int(step.name.partition("_")[2]))
        kept = {read_pointer(self.path, name) for name in ("latest", "best")}
        for old in steps[:-keep_last]:
            if old not in kept:
                shutil.rmtree(old)

    def read_step(self, name: str = "latest") -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The step folder, trainer tensors and trainer state that a pointer names, checksums verified."""
        step = read_pointer(self.path, name)
        if step is None:
            raise RequestError(f"{self.path}: no finished step to resume from")
        verify_checksums(step)
        return step, read_safetensors(step / TRAINER_TENSORS), read_json(step / TRAINER_STATE)

    def cut_metrics(self, step: int) -> None:
        """Drop metric rows beyond `step`: the resumed run will write them again."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a kill may cut the last line
                continue
            if row["step"] <= step:
                kept.append(line)
        temporary = path.with_name(f"{path.name}{TEMPORARY}{os.getpid()}")
        write_text(temporary, "\n".join(kept))
        temporary.replace(path)

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        except OSError as error:
            raise WorkError(f"{self.path / 'metrics.jsonl'}: could not be written ({error})") from None


def _is_step(path: Path) -> bool:
    return re.fullmatch(rf"step_\d+({TEMPORARY}\d+)?", path.name) is not None and path.is_dir()


def _is_own(path: Path) -> bool:
    name, _, writer = path.name.partition(TEMPORARY)
    return (name in OWN_FILES and (not writer or writer.isdigit())) or _is_step(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
