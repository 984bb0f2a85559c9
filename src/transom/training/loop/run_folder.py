"""The folder of a run: step folders, pointers to the latest and the best one, and metrics.

A step folder is a model folder with the state of the trainer. It is written under a temporary name,
hashed, flushed to disk and renamed, so that a kill leaves either all of it or nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transom.base.errors import RequestError, WorkError, explained, notice
from transom.base.files import json_text, read_json, sync, write_text, writing
from transom.base.locks import FolderLock
from transom.checkpoints.files.checksums import (
    TRAINER_STATE,
    TRAINER_TENSORS,
    sums_of,
    verify_checksums,
    write_checksums,
)
from transom.checkpoints.files.location import read_pointer
from transom.checkpoints.files.safetensors_files import write_tensors

OWN_FILES = (
    *("config.yaml", "run.json", "metrics.jsonl", "report.html", "latest", "best"),
    *("trace.json", "tensorboard"),
)
TEMPORARY = ".tmp-"


class RunFolder:
    """The folder of a run, with its step folders. One process at a time may write to it."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: FolderLock | None = None

    def lock(self) -> None:
        """Keep other processes from writing here until `release`.

        Raises:
            RequestError: If another process is writing here.
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
        """What is left of a run that cannot continue, and what to try."""
        step = self._pointed("latest")
        left = "no checkpoint was written yet"
        if step is not None:
            left = f"the checkpoint {step.name} is untouched"
        return f"{left}; try a lower learning rate"

    @property
    def has_steps(self) -> bool:
        """Whether there is a step to resume from.

        Raises:
            RequestError: If `latest` names a missing step.
        """
        return self.path.is_dir() and read_pointer(self.path, "latest") is not None

    def check(self, *, overwrite: bool, resume: bool) -> None:
        """Refuse a folder with files, unless it has a step to `resume` or a run to `overwrite`.

        Raises:
            RequestError: If the folder is refused, or has a file that no run wrote.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RequestError(f"{self.path}: a file; expected a folder to write the run in")
        begun = (self.path / "run.json").exists()
        if resume and begun and not self.has_steps and self._steps():
            # The run was killed after it had written its first step.
            self.write_file("latest", self._steps()[-1].name)
        if resume and self.has_steps:
            return
        items = self._items()
        if items and not overwrite and not resume:
            expected = "expected --overwrite or --resume, or another folder"
            raise RequestError(f"out: got {str(self.path)!r}, which is not empty; {expected}")
        foreign = [item.name for item in items if not _is_own(item)]
        if foreign:
            what = f"contains {foreign[0]!r}, which no run wrote"
            raise RequestError(f"{self.path}: {what}; expected another folder")

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Remove unfinished checkpoints if a step is resumed, else everything that a run wrote."""
        self.check(overwrite=overwrite, resume=resume)  # again, since files may have been added
        keeps = resume and self.has_steps
        # The files that make it a run are removed first, so that a kill leaves nothing to resume.
        first = ("latest", "best", "run.json")
        for item in sorted(self._items(), key=lambda item: item.name not in first):
            if keeps and TEMPORARY in item.name:
                notice(f"{item}: unfinished, removed")
            if not keeps or TEMPORARY in item.name:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        with explained(f"{self.path}: cannot be made", OSError):
            self.path.mkdir(parents=True, exist_ok=True)

    def write_file(self, name: str, text: str) -> None:
        """Write one file of the run; a kill leaves the old file or the new one."""
        temporary = self.path / f"{name}{TEMPORARY}{os.getpid()}"
        write_text(temporary, text)
        sync(temporary)
        temporary.replace(self.path / name)

    @contextlib.contextmanager
    def new_step(self, step: int, *, best: bool, keep_last: int) -> Iterator[Path | None]:
        """Yield a folder to write, which becomes that of a step; then delete old steps.

        Yield None if the latest step is saved again, at the end or to become the best: it stays.

        Args:
            step: Number of the step.
            best: Whether `best` shall name this step.
            keep_last: Number of steps to keep, besides the best.

        Raises:
            WorkError: If it could not be written. Earlier steps are then unchanged.
        """
        final = self.path / f"step_{step:06d}"
        temporary = self.path / f"{final.name}{TEMPORARY}{os.getpid()}"
        try:
            if final.exists() and final == self._pointed("latest"):
                yield None
            else:
                temporary.mkdir(exist_ok=True)
                yield temporary
                for file in (*temporary.rglob("*"), temporary):
                    sync(file)
                if final.exists():  # somebody has pointed `latest` to an earlier step
                    shutil.rmtree(final)
                temporary.rename(final)
            if best:  # before `latest`: a kill in between must not lose the best score of `state`
                self.write_file("best", final.name)
            self.write_file("latest", final.name)
            sync(self.path)
        except (OSError, WorkError) as error:
            what = "checkpoint not written, earlier ones are untouched"
            raise WorkError(f"{final}: {what} ({error})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        self._prune(keep_last)

    def _pointed(self, name: str) -> Path | None:
        """Return the step that a pointer names, or None if the pointer or the step is missing."""
        try:
            return read_pointer(self.path, name)
        except RequestError:
            return None

    def _items(self) -> list[Path]:
        return list(self.path.iterdir()) if self.path.exists() else []

    def _steps(self) -> list[Path]:
        """Return the finished steps in their order."""
        steps = [item for item in self._items() if _is_step(item) and TEMPORARY not in item.name]
        return sorted(steps, key=lambda step: int(step.name.partition("_")[2]))

    def _prune(self, keep_last: int) -> None:
        kept = {name: self._pointed(name) for name in ("latest", "best")}
        if kept["best"] is None and (self.path / "best").exists():
            what = "the step that `best` names is missing"
            notice(f"{self.path}: {what}; `latest` is used until there is a better one")
            (self.path / "best").unlink()
        for old in self._steps()[:-keep_last]:
            if old not in kept.values():
                shutil.rmtree(old)

    def read_step(self, share: tuple[int, int] = (0, 1)) -> tuple[Path, dict[str, Any]]:
        """Return the folder of the latest step, and the state of the trainer that is plain data.

        Args:
            share: The rank, and the number of ranks that share the check of the files.

        Raises:
            RequestError: If there is no step, or one of its files was altered or cut.
        """
        step = read_pointer(self.path, "latest")
        if step is None:
            raise RequestError(f"{self.path}: no finished step to resume from")
        verify_checksums(step, share=share)
        return step, read_json(step / TRAINER_STATE)

    def cut_metrics(self, step: int, *, unmeasured: bool) -> None:
        """Remove the rows that a resumed run writes again from metrics.jsonl.

        These are all rows after `step` and, if `unmeasured`, the scores and samples of `step`.
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
            repeated = unmeasured and row["step"] == step and not {"loss", "event"} & row.keys()
            if row["step"] <= step and not repeated:
                kept.append(line)
        self.write_file(path.name, "\n".join(kept))

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row to metrics.jsonl.

        Raises:
            WorkError: If it could not be written.
        """
        path = self.path / "metrics.jsonl"
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json_text(row) + "\n")


def write_step(
    folder: Path, write_model: Callable[[Path], None], tensors: Mapping[str, Tensor], state: str
) -> None:
    """Write the files of a step, as one process has them.

    Args:
        folder: The folder to write.
        write_model: Writes the files of the model into it.
        tensors: Tensors of the trainer.
        state: Other state of the trainer, as JSON.
    """
    write_model(folder)
    write_tensors(folder / TRAINER_TENSORS, dict(tensors))
    write_text(folder / TRAINER_STATE, state)
    write_checksums(folder, sums_of(folder, (one for one in folder.rglob("*") if one.is_file())))


def _is_step(path: Path) -> bool:
    return re.fullmatch(rf"step_\d+({TEMPORARY}\d+)?", path.name) is not None and path.is_dir()


def _is_own(path: Path) -> bool:
    name, _, writer = path.name.partition(TEMPORARY)
    return (name in OWN_FILES and (not writer or writer.isdigit())) or _is_step(path)
