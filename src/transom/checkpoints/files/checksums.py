"""Check the files of a step folder against the SHA-256 hashes written with them. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from transom.base.errors import RequestError
from transom.base.files import read_json, sha256_of, write_text
from transom.checkpoints.files.layout import files_read

CHECKSUMS = "sha256.json"
# Files of a step folder that only a resumed run reads, beside those of the model or adapter.
TRAINER_FILES = TRAINER_STATE, TRAINER_TENSORS = "trainer.json", "trainer.safetensors"
TRAINER_PARTS = "trainer"  # a folder instead of `trainer.safetensors`, with a file of each rank


def sums_of(folder: Path, files: Iterable[Path]) -> dict[str, str]:
    """Return the hashes of files of a folder by their paths in it."""
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(files)}


def write_checksums(folder: Path, sums: dict[str, str]) -> None:
    """Write the hashes of the files of a step folder."""
    write_text(folder / CHECKSUMS, json.dumps(sums, indent=2))


def verify_checksums(step: Path, *, trainer: bool = True, share: tuple[int, int] = (0, 1)) -> None:
    """Check every file of a step folder against its hash.

    Args:
        step: A folder with `sha256.json`.
        trainer: Also check the trainer's state, which is most of a step and which no model reads.
        share: The rank, and the number of ranks that share the files.

    Raises:
        RequestError: A file is missing or changed, or a weights file was added that would be read.
    """
    again = f"remove {step.name} and point `latest` and `best` to another step"
    sums = read_json(step / CHECKSUMS)
    for name, expected in list(sums.items())[share[0] :: share[1]]:
        state = name in TRAINER_FILES or name.startswith(f"{TRAINER_PARTS}/")
        if state and not trainer:
            continue
        if not (step / name).exists():
            raise RequestError(f"{step / name}: missing; {again}")
        if sha256_of(step / name) != expected:
            raise RequestError(
                f"{step / name}: altered or cut since it was written (sha256 differs); {again}"
            )
    for path in files_read(step)[1:]:  # weights that would be read instead of the step's own
        if path.name not in sums:
            raise RequestError(f"{path}: added since the step was written; {again}")


def verify_step(folder: Path) -> None:
    """Check the files that a model is made of if `folder` is a step folder of a run."""
    if (folder / CHECKSUMS).exists():
        verify_checksums(folder, trainer=False)
