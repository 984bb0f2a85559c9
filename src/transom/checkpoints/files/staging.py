"""Write folders of models and adapters completely or not at all, also over an existing one."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from transom.base.errors import RequestError, WorkError
from transom.base.locks import FolderLock
from transom.checkpoints.files.companions import TEMPLATE_FILES, TOKENIZER_FILES, TRAINED_WITH
from transom.checkpoints.files.layout import CONFIG, EXPORT, GENERATION, INDEX, PARAMS, TOKENIZERS

# Files of an old model that could be taken for those of the new one.
_STALE = (
    *(GENERATION, "model*.safetensors", f"model*.safetensors{INDEX}"),
    *("consolidated.*", "consolidated-*.safetensors"),
)


@contextlib.contextmanager
def staged(
    folder: Path,
    configs: Sequence[str] = (CONFIG, PARAMS, EXPORT),
    stale: Sequence[str] = _STALE,
    file: str = "",
) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder`, or fills it if it exists.

    If the block raises, `folder` is unchanged.

    Args:
        folder: The folder to write.
        configs: The files that make the folder open as a model or adapter.
        stale: Patterns of other files to remove from an existing folder.
        file: The name of a file in the temporary folder. If it is given, this file becomes
            `folder`, and the others are removed.

    Raises:
        RequestError: Another process writes the folder, or it is a file, or the other way.
        WorkError: It could not be written.
    """
    folder = folder.absolute()
    with FolderLock(folder):
        there = folder.is_dir()
        if folder.exists() and there == bool(file):
            wrong = "a folder; expected a file" if there else "a file; expected a folder"
            raise RequestError(f"{folder}: {wrong} to write to")
        # After a kill, a temporary folder inside an existing one is removed together with it.
        parent, name = (folder, "") if there else (folder.parent, folder.name)
        temporary = parent / f".{name}.tmp-{os.getpid()}"
        try:
            shutil.rmtree(temporary, ignore_errors=True)  # of a killed process with the same id
            temporary.mkdir(parents=True)
            yield temporary
            if there:
                _replace_files(temporary, folder, configs, stale)
            else:
                (temporary / file).replace(folder)
        except OSError as error:
            raise WorkError(f"{folder}: could not be written ({error})") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _replace_files(new: Path, folder: Path, configs: Sequence[str], stale: Sequence[str]) -> None:
    """Move the files of `new` into `folder`, which may hold another model.

    A kill between any two steps leaves a folder that does not open, or one that opens as the old
    model or as the new one: the configs are removed first, and the new config is moved in last.
    Between them the same holds for the tokenizer, whose vocabulary is removed before and moved in
    after the files beside it.
    """
    made = {path.name for path in new.iterdir()}
    patterns = [*configs]
    if _matches(made, TOKENIZERS):
        patterns += [*TOKENIZER_FILES, *TEMPLATE_FILES, TRAINED_WITH]
    for pattern in (*patterns, *stale):
        for path in sorted(folder.glob(pattern)):
            _remove(path)
    order = {name: (name in configs, _matches([name], TOKENIZERS), name) for name in made}
    for name in sorted(made, key=order.__getitem__):
        _remove(folder / name)
        (new / name).replace(folder / name)


def _matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for name in names for pattern in patterns)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
