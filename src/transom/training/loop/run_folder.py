"""The folder of a run: step folders that are whole or absent, pointers to the latest and the best,
metrics.

A step folder is a model folder plus the trainer's own state. It is written under a temporary name,
hashed, flushed to disk and renamed, so that a kill at any moment leaves either all of it or
nothing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transom.base.errors import RequestError, WorkError, notice
from transom.base.files import json_text, read_json, sha256_of, sync, write_text
from transom.base.locks import FolderLock
from transom.checkpoints.files.checksums import (
    CHECKSUMS,
    TRAINER_STATE,
    TRAINER_TENSORS,
    verify_checksums,
)
from transom.checkpoints.files.location import read_pointer
from transom.checkpoints.files.safetensors_files import read_safetensors, write_tensors

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
    """`path` with its step folders. One process at a time may write into it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    def lock(self) -> None:
        """Keep other processes from writing here until `release`; raise `RequestError` if one
        already writes.
        """
        if self._lock is None:
            self._lock = FolderLock(self.path)
            weakref.finalize(self, self._lock.release)

    def release(self) -> None:
        """Let other processes write here."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    @property
    def untouched(self) -> str:
        """What is left of a run that cannot go on, and what to try."""
        step = self._pointed("latest")
        kept = (
            "no checkpoint was written yet"
            if step is None
            else f"the checkpoint {step.name} is untouched"
        )
        return f"{kept}; try a lower learning rate"

    @property
    def has_steps(self) -> bool:
        """Return whether there is a step to resume from; raise `RequestError` if `latest` names a
        missing one.
        """
        return self.path.is_dir() and read_pointer(self.path, "latest") is not None

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder with files unless it has a step to `resume` or only a run to
        `overwrite`.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path}: a file; expected a folder to write the run in")
        begun = (self.path / "run.json").exists()
        if (
            resume and begun and not self.has_steps and self._steps()
        ):  # killed after its first step was written
            self._point("latest", self._steps()[-1])
        if resume and self.has_steps:
            return
        items = list(self.path.iterdir()) if self.path.exists() else []
        if items and not overwrite and not resume:
            raise RequestError(
                f"{self.path}: not empty; valid only with --overwrite or --resume, or name another "
                f"folder"
            )
        foreign = [item.name for item in items if not _is_own(item)]
        if foreign:  # a run removes only what runs write
            raise RequestError(
                f"{self.path}: holds {foreign[0]!r}, which no run wrote; name another folder"
            )

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Remove unfinished checkpoints if the latest step is resumed, else everything that a run
        wrote.
        """
        self.check(overwrite=overwrite, resume=resume)  # again, since files may have been added
        goes_on = resume and self.has_steps
        items = list(self.path.iterdir()) if self.path.exists() else []
        # The files that make it a run are removed first, so that a kill leaves nothing to resume.
        for item in sorted(items, key=lambda item: item.name not in ("latest", "best", "run.json")):
            if goes_on and TEMPORARY in item.name:
                notice(f"{item}: unfinished, removed")
            if not goes_on or TEMPORARY in item.name:
                _remove(item)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{self.path}: cannot be made ({error.strerror})") from None

    def write_file(self, name: str, text: str) -> None:
        """Write one file of the run; a kill leaves the old file or the new one."""
        temporary = self.path / f"{name}{TEMPORARY}{os.getpid()}"
        write_text(temporary, text)
        sync(temporary)
        temporary.replace(self.path / name)

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
        """Write one step folder, move the pointers to it, and drop steps beyond `keep_last` and the
        best.
        """
        final = self.path / f"step_{step:06d}"
        temporary = self.path / f"{final.name}{TEMPORARY}{os.getpid()}"
        try:
            # The latest step saved again, on the way out or to be the best, is the same step: it
            # stays.
            if not final.exists() or final != self._pointed("latest"):
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
                if (
                    final.exists()
                ):  # left over from before somebody pointed `latest` to an earlier step
                    shutil.rmtree(final)
                temporary.rename(final)
            if (
                best
            ):  # before `latest`: a kill in between must not lose the record that the state holds
                self._point("best", final)
            self._point("latest", final)
            sync(self.path)
        except (OSError, WorkError) as error:
            raise WorkError(
                f"{final}: checkpoint not written, earlier ones are untouched ({error})"
            ) from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(keep_last)
        return final

    def _point(self, name: str, step: Path) -> None:
        self.write_file(name, step.name)

    def _pointed(self, name: str) -> Path | None:
        """Return the step that a pointer names, or None if the pointer or the step is missing."""
        try:
            return read_pointer(self.path, name)
        except RequestError:
            return None

    def _steps(self) -> list[Path]:
        """Return the finished steps in their order."""
        items = self.path.iterdir() if self.path.exists() else ()
        steps = [item for item in items if _is_step(item) and TEMPORARY not in item.name]
        return sorted(steps, key=lambda step: int(step.name.partition("_")[2]))

    def _prune(self, keep_last: int) -> None:
        kept = {name: self._pointed(name) for name in ("latest", "best")}
        if kept["best"] is None and (self.path / "best").exists():
            notice(
                f"{self.path}: the step that `best` names is missing; `latest` is used until "
                f"there is a better one"
            )
            (self.path / "best").unlink()
        for old in self._steps()[:-keep_last]:
            if old not in kept.values():
                shutil.rmtree(old)

    def read_step(self, name: str = "latest") -> tuple[Path, dict[str, Tensor], dict[str, Any]]:
        """The step folder, trainer tensors and trainer state that a pointer names, checksums
        verified.
        """
        step = read_pointer(self.path, name)
        if step is None:
            raise RequestError(f"{self.path}: no finished step to resume from")
        verify_checksums(step)
        return step, read_safetensors(step / TRAINER_TENSORS), read_json(step / TRAINER_STATE)

    def cut_metrics(self, step: int, *, unmeasured: bool) -> None:
        """Remove rows that the resumed run writes again: those after `step` and, if `unmeasured`,
        its scores.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return
        kept = []
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # a kill may cut the last line
                continue
            again = unmeasured and row["step"] == step and "loss" not in row and "event" not in row
            if row["step"] <= step and not again:
                kept.append(line)
        self.write_file(path.name, "\n".join(kept))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to metrics.jsonl."""
        try:
            with (self.path / "metrics.jsonl").open("a", encoding="utf-8") as file:
                file.write(json_text(row) + "\n")
        except OSError as error:
            raise WorkError(
                f"{self.path / 'metrics.jsonl'}: could not be written ({error})"
            ) from None


def _is_step(path: Path) -> bool:
    return re.fullmatch(rf"step_\d+({TEMPORARY}\d+)?", path.name) is not None and path.is_dir()


def _is_own(path: Path) -> bool:
    name, _, writer = path.name.partition(TEMPORARY)
    return (name in OWN_FILES and (not writer or writer.isdigit())) or _is_step(path)


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()
