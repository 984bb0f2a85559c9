"""Writes model folders completely or not at all, also over another model. No torch."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from transom.base.errors import RequestError, WorkError
from transom.base.locks import FolderLock
from transom.checkpoints.files.companions import TEMPLATE_FILES, TOKENIZER_FILES, TRAINED_WITH
from transom.checkpoints.files.generation_config import GENERATION
from transom.checkpoints.files.layout import CONFIG, PARAMS, TOKENIZERS

# The files that make a folder open as a model. They are removed first and written last.
_CONFIGS = (CONFIG, PARAMS)
# Weights of the old model, which could be taken for those of the new one.
_WEIGHTS = (
    "model*.safetensors",
    "model*.safetensors.index.json",
    "consolidated.*",
    "consolidated-*.safetensors",
)


@contextlib.contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`, or fills it where it exists, unless writing
    it fails.
    """
    with FolderLock(folder):
        yield from _staged(folder.absolute())


def _staged(folder: Path) -> Iterator[Path]:
    there = folder.is_dir()
    if folder.exists() and not there:
        raise RequestError(f"{folder}: a file; expected a folder to write the model in")
    # It lies inside an existing folder, so that after a kill it is removed together with that
    # folder.
    temporary = (
        folder if there else folder.parent
    ) / f".{'' if there else folder.name}.tmp-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise WorkError(f"{folder}: cannot be made ({error.strerror})") from None
    try:
        yield temporary
        if there:
            _replace_files(temporary, folder)
        else:
            temporary.rename(folder)
    except OSError as error:
        raise WorkError(f"{folder}: could not be written ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(new: Path, folder: Path) -> None:
    """Move the files of `new` into `folder`, which holds another model.

    A kill between any two steps leaves a folder that does not open, or one that opens as the old
    model or as the new one. So the configs are removed before all else and the new config is moved
    in after all else. Between them the same is true for the tokenizer: its vocabulary is removed
    before and moved in after the files beside it.
    """
    made = {path.name for path in new.iterdir()}
    stale = [*_CONFIGS]
    if _named(made, TOKENIZERS):
        stale += [*TOKENIZER_FILES, *TEMPLATE_FILES, TRAINED_WITH]
    stale += [GENERATION, *_WEIGHTS]
    for pattern in stale:
        for path in sorted(folder.glob(pattern)):
            _remove(path)
    for path in sorted(new.iterdir(), key=lambda path: (_rank(path.name), path.name)):
        _remove(folder / path.name)
        path.replace(folder / path.name)


def _rank(name: str) -> int:
    """Return when a file is moved in: a vocabulary after the files beside it, and a config after
    both.
    """
    return 2 if name in _CONFIGS else 1 if _named([name], TOKENIZERS) else 0


def _named(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
