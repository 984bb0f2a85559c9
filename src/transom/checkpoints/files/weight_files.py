"""Chooses the files of a folder that its weights are read from, and names those it ignores. No
torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json

WEIGHTS = "model.safetensors"
INDEX = ".index.json"  # after the name of a file that is cut into shards
EXPLICIT = "transformers_weights"  # the key of a config that names another file or index
# File names of model or adapter weights in any layout.
_ANY = (
    *(
        "model*.safetensors",
        f"model*.safetensors{INDEX}",
        "pytorch_model*.bin",
        f"pytorch_model*.bin{INDEX}",
    ),
    *("consolidated*.safetensors", f"consolidated*.safetensors{INDEX}", "consolidated.*.pth"),
    *("original/consolidated.*", "adapter_model.*", "*.gguf", "tf_model.h5", "flax_model.msgpack"),
)


@dataclass(frozen=True)
class WeightFiles:
    """The files of one set of weights, and the index that names them, if there is one."""

    files: list[str]
    index: str | None = None


def find_weights(folder: Path, name: str, config: Mapping[str, Any] | None = None) -> WeightFiles:
    """Return the safetensors files of a folder: `name`, or else the shards that its index names.

    transformers chooses in the same way. A file or an index that the `config` of Hugging Face's
    layout names comes first.
    """
    explicit = (config or {}).get(EXPLICIT)
    if explicit is not None:
        fits = isinstance(explicit, str) and Path(explicit).name == explicit
        fits = fits and explicit.removesuffix(INDEX).endswith(".safetensors")
        require(
            fits,
            f"{folder / 'config.json'}: {EXPLICIT}",
            explicit,
            "expected a safetensors file or its index",
        )
        name = explicit.removesuffix(INDEX)
    index = folder / f"{name}{INDEX}"
    if explicit == name or ((folder / name).exists() and explicit is None) or not index.exists():
        return WeightFiles([name])
    return WeightFiles(_shards(folder, index), index.name)


def _shards(folder: Path, index: Path) -> list[str]:
    """Return the files that an index names, which must be plain names and in the folder."""
    entries = read_json(index).get("weight_map")
    if not isinstance(entries, dict) or not all(isinstance(file, str) for file in entries.values()):
        raise RequestError(
            f"{index}: weight_map is missing; expected one of tensor names to file names"
        )
    files = sorted(set(entries.values()))
    for file in files:
        if Path(file).name != file or file in (
            "",
            ".",
            "..",
        ):  # an index must not reach beyond its folder
            raise RequestError(f"{index}: weight_map names {file!r}; expected files beside it")
        if not (folder / file).exists():
            tensors = sum(name == file for name in entries.values())
            raise RequestError(
                f"{folder / file}: missing; {index.name} names it for {tensors} tensor(s)"
            )
    return files


def say_ignored(folder: Path, taken: WeightFiles) -> None:
    """Print one line where a folder holds more files of weights than those `taken`."""
    found = {
        path.relative_to(folder).as_posix() for pattern in _ANY for path in folder.glob(pattern)
    }
    ignored = sorted(found - {*taken.files, taken.index})
    if ignored:
        notice(f"{folder}: weights are read from {_few(taken.files)}; ignored: {_few(ignored)}")


def _few(names: Sequence[str], shown: int = 3) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
