"""A GGUF file as a model folder: its metadata is translated once, its weights stay in the file.

The folder is in the cache. It has the files that a Hugging Face folder has beside its weights, and
`gguf.json`, which says where the tensors are. No torch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import tempfile
from pathlib import Path

from transom.base.errors import collected_notices, explained, located, notice
from transom.base.files import GGUF, cache_dir, gguf_pointer, sync, write_text
from transom.checkpoints.files.layout import CONFIG
from transom.checkpoints.gguf.config import architecture, config_of
from transom.checkpoints.gguf.reader import GgufModel, StoredTensor, read_gguf, split_files

_VERSION = 2  # of the translation
_HASHED = 1 << 16  # bytes of each file that the name of the folder depends on, beside its times


def gguf_folder(path: Path) -> Path:
    """Return the folder of a GGUF file, which is made unless it is in the cache.

    Any part of a split model stands for all of it. The notices of the translation are printed each
    time.

    Raises:
        RequestError: The file does not open.
    """
    # Names of files are kept: those of the hub's cache are links to files with other names.
    files = [file.parent.resolve() / file.name for file in split_files(path)]
    try:
        return _translated(files, cache_dir())
    except OSError as error:
        why = f"the cache folder {cache_dir()} can't be written ({error.strerror})"
        notice(f"{why}; {files[0].name} is translated for this process alone")
        return _translated(files, Path(_scratch().name))


@functools.cache
def _scratch() -> tempfile.TemporaryDirectory[str]:
    """Return a folder that is removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="transom-")


def _translated(files: list[Path], cache: Path) -> Path:
    """Return the folder of GGUF files in a cache, after writing it if it isn't there."""
    folder = cache / "gguf" / _key(files) / files[0].name
    if folder.exists():
        for message in gguf_pointer(folder)["notices"]:
            notice(message)
        return folder
    model = read_gguf(files[0])
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=folder.parent) as scratch:
        made = Path(scratch) / folder.name
        made.mkdir()
        _translate(model, made)
        with contextlib.suppress(OSError):  # another process has been faster
            made.rename(folder)
    return folder


def _key(files: list[Path]) -> str:
    """Return a hash that changes with the files and with the rules of the translation."""
    states: list[object] = [_VERSION]
    for file in files:
        with explained(f"{file}: cannot be read", OSError), file.open("rb") as content:
            state, start = file.stat(), hashlib.sha256(content.read(_HASHED)).hexdigest()
        states.append([str(file), state.st_size, state.st_mtime_ns, state.st_ctime_ns, start])
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()[:32]


def _translate(model: GgufModel, folder: Path) -> None:
    """Write the files of the folder, all flushed to disk."""
    with collected_notices() as notices:
        config = config_of(model)
        if "tokenizer.ggml.model" in model.metadata:
            _write_tokenizer(model, folder)
    pointer = {
        "files": [str(file) for file in model.files],
        "architecture": model.metadata["general.architecture"],
        "rope_layout": "interleaved" if architecture(model).interleaved else "halves",
        "notices": notices,
        "tensors": model.tensors,
    }
    write_text(folder / CONFIG, json.dumps(config, indent=2))
    write_text(folder / GGUF, json.dumps(pointer))
    for path in (*folder.iterdir(), folder):
        sync(path)


def _write_tokenizer(model: GgufModel, folder: Path) -> None:
    from transom.checkpoints.gguf.tokenizer import write_tokenizer_files  # loads a large library

    with located(str(model.files[0])):
        write_tokenizer_files(model.metadata, folder)


def open_folder(folder: Path) -> tuple[GgufModel, str]:
    """Return where the tensors of a translated folder are, and the name of their architecture."""
    pointer = gguf_pointer(folder)
    files = [Path(file) for file in pointer["files"]]
    tensors = {
        name: StoredTensor(part, kind, tuple(shape), *place)
        for name, (part, kind, shape, *place) in pointer["tensors"].items()
    }
    return GgufModel(files, {}, tensors), pointer["architecture"]
