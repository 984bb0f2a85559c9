"""File names and formats of model folders, and the choice of the files that hold the weights.

A model folder has one of four formats: `native` is Transom's own, `hf` that of Hugging Face
transformers, `meta` that of Meta's llama-models and `mistral` that of mistral-inference. This
module does not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import RequestError, expect
from transom.base.files import gguf_pointer, read_json

Format = Literal["native", "hf", "meta", "mistral"]
FileFormat = Literal["native", "hf", "meta", "mistral", "gguf"]  # what `save` and `convert` write

MODEL_TYPE = "transom"  # the model_type in the config.json of a native folder
CONFIG, PARAMS = "config.json", "params.json"
EXPORT = "export.json"  # of programs of torch.export
WEIGHTS = "model.safetensors"
CONSOLIDATED, PICKLED = "consolidated.safetensors", "consolidated.{rank:02d}.pth"
GENERATION = "generation_config.json"
INDEX = ".index.json"  # appended to the name of a weights file that is split into shards
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TOKENIZERS = ("tokenizer.json", "tekken*.json", "*.model.v*", "tokenizer.model")
EXPLICIT = "transformers_weights"  # the key of a config.json that names another file or index
# Weights of a complete model. An adapter folder that has them is one that has been merged.
_MODEL_WEIGHTS = ("model*.safetensors*", "consolidated*")
# File names of model or adapter weights in any layout.
_ALL_WEIGHTS = (
    *("model*.safetensors", f"model*.safetensors{INDEX}"),
    *("consolidated*.safetensors", f"consolidated*.safetensors{INDEX}", "consolidated.*.pth"),
    *("pytorch_model*.bin", f"pytorch_model*.bin{INDEX}", "original/consolidated.*"),
    *("adapter_model.*", "*.gguf", "tf_model.h5", "flax_model.msgpack"),
)


def gguf_files(folder: Path) -> list[Path]:
    """Return the GGUF files that a folder of the cache stands for; none for other folders."""
    return [Path(file) for file in gguf_pointer(folder).get("files", ())]


def names_table(folder: Path) -> str:
    """Return the name of the table of weight names for the files of a model folder."""
    pointer = gguf_pointer(folder)
    if pointer:
        return f"gguf_{pointer['architecture']}"
    kind = folder_format(folder)
    own = kind in ("native", "hf")
    return str(read_json(folder / CONFIG)["model_type"]) if own else f"params_{kind}"


def is_adapter(folder: str | Path) -> bool:
    """Return whether a folder holds a PEFT adapter and no model; its base's config may be there."""
    here = Path(folder)
    return (here / ADAPTER_CONFIG).exists() and not any(
        any(here.glob(pattern)) for pattern in _MODEL_WEIGHTS
    )


def is_model(folder: Path) -> bool:
    """Return whether a folder has the config of a model or of an adapter."""
    return any((folder / name).exists() for name in (CONFIG, PARAMS, ADAPTER_CONFIG))


def holds_tokenizer(folder: Path) -> bool:
    """Return whether a folder has the file of a tokenizer."""
    return any(any(folder.glob(name)) for name in TOKENIZERS)


def folder_format(folder: Path) -> Format:
    """Return the format of a model folder, judged by its files.

    A folder with both `config.json` and `params.json` has the format whose weights are there.

    Raises:
        RequestError: There is neither `config.json` nor `params.json`.
    """
    config, params = (folder / CONFIG).exists(), (folder / PARAMS).exists()
    if not config and not params:
        raise RequestError(f"{folder}: no config.json and no params.json; expected a model folder")
    if config and params and consolidated_files(folder):
        config = any(folder.glob("model*.safetensors"))
    if config:
        return "native" if read_json(folder / CONFIG).get("model_type") == MODEL_TYPE else "hf"
    # mistral-inference requires hidden_dim; Meta's code derives it from other fields.
    return "mistral" if "hidden_dim" in read_params(folder) else "meta"


def read_params(folder: Path) -> dict[str, Any]:
    """Return the content of `params.json`, which some files nest under the key `model`."""
    params = read_json(folder / PARAMS)
    inner = params.get("model")
    return inner if isinstance(inner, dict) else params


def consolidated_files(folder: Path) -> list[Path]:
    """Return the weights files in the layouts of Meta and Mistral.

    These are `consolidated.safetensors` and its index if there are any, otherwise one `.pth` file
    per rank, in the order of the ranks.
    """
    safe = [folder / CONSOLIDATED, folder / f"{CONSOLIDATED}{INDEX}"]
    ranks = (p for p in folder.glob("consolidated.*.pth") if p.name.split(".")[1].isdigit())
    return [path for path in safe if path.exists()] or sorted(ranks)


@dataclass(frozen=True)
class WeightFiles:
    """The names of the files of one set of weights, and of the index that lists them, if any."""

    files: list[str]
    index: str | None = None


def weight_files(folder: Path) -> WeightFiles:
    """Return the files that the weights of a model folder are read from.

    Raises:
        RequestError: An index names files that are missing or outside of the folder.
    """
    if gguf_files(folder):
        return WeightFiles([str(file) for file in gguf_files(folder)])
    kind = folder_format(folder)
    if kind in ("native", "hf"):
        return find_weights(folder, WEIGHTS, read_json(folder / CONFIG) if kind == "hf" else {})
    found = consolidated_files(folder)
    if any(CONSOLIDATED in path.name for path in found):
        return find_weights(folder, CONSOLIDATED)
    return WeightFiles([path.name for path in found])


def find_weights(folder: Path, name: str, config: Mapping[str, Any] | None = None) -> WeightFiles:
    """Return the safetensors files of a folder: the file `name`, or the shards of its index.

    The order is that of transformers: a file or an index named by `config`, the content of a
    `config.json` of transformers, comes first, and a single file comes before an index.
    """
    explicit = (config or {}).get(EXPLICIT)
    if explicit is not None:
        fits = isinstance(explicit, str) and Path(explicit).name == explicit
        fits = fits and explicit.removesuffix(INDEX).endswith(".safetensors")
        expect(fits, f"{folder / CONFIG}: {EXPLICIT}", explicit, "a safetensors file or its index")
        name = explicit.removesuffix(INDEX)
    index = folder / f"{name}{INDEX}"
    if explicit == name or ((folder / name).exists() and explicit is None) or not index.exists():
        return WeightFiles([name])
    return WeightFiles(_shards(folder, index), index.name)


def _shards(folder: Path, index: Path) -> list[str]:
    found = read_json(index).get("weight_map")
    entries: dict[str, Any] = found if isinstance(found, dict) else {"": None}
    named = all(isinstance(file, str) for file in entries.values())
    expect(named, f"{index}: weight_map", found, "file names by tensor names")
    files: list[str] = sorted(set(entries.values()))
    for file in files:
        beside = Path(file).name == file and file not in ("", ".", "..")
        expect(beside, f"{index}: weight_map", file, "a file in the folder of the index")
        if not (folder / file).exists():
            tensors = sum(name == file for name in entries.values())
            raise RequestError(
                f"{folder / file}: missing; {index.name} names it for {tensors} tensor(s)"
            )
    return files


def files_read(folder: Path) -> list[Path]:
    """Return the config and the files of weights that loading a model or an adapter reads."""
    if is_adapter(folder):
        return [folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS]
    config = CONFIG if folder_format(folder) in ("native", "hf") else PARAMS
    taken = weight_files(folder)
    return [folder / name for name in (config, taken.index, *taken.files) if name is not None]


def other_weights(folder: Path, taken: WeightFiles) -> list[str]:
    """Return the names of files of weights in a folder, of any format, that are not read."""
    found = {p.relative_to(folder).as_posix() for one in _ALL_WEIGHTS for p in folder.glob(one)}
    return sorted(found - {*taken.files, taken.index})


def first_names(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names separated by commas, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more
