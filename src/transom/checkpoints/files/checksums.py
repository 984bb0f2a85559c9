"""Check the files of a step folder against the SHA-256 hashes written with them. No torch."""

from __future__ import annotations

from pathlib import Path

from transom.base.errors import RequestError
from transom.base.files import read_json, sha256_of
from transom.checkpoints.files.layout import files_read

CHECKSUMS = "sha256.json"
# Files of a step folder that only a resumed run reads, beside those of the model or adapter.
TRAINER_FILES = TRAINER_STATE, TRAINER_TENSORS = "trainer.json", "trainer.safetensors"


def verify_checksums(step: Path, *, trainer: bool = True) -> None:
    """Check every file of a step folder against its hash.

    Args:
        step: A folder with `sha256.json`.
        trainer: Also check the trainer's state, which is most of a step and which no model reads.

    Raises:
        RequestError: A file is missing or changed, or a weights file was added that would be read.
    """
    again = f"remove {step.name} and point `latest` and `best` to another step"
    sums = read_json(step / CHECKSUMS)
    for name, expected in sums.items():
        if not trainer and name in TRAINER_FILES:
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
