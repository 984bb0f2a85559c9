"""Find the folder that a name stands for: a model, an adapter on its base, or the step of a run.

No format is guessed from the name of a folder. This module does not import torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transom.base.errors import RequestError, notice, require
from transom.base.files import shown_name
from transom.checkpoints.adapters.peft_config import base_of, base_revision
from transom.checkpoints.files.hub import download, is_hub_id
from transom.checkpoints.files.layout import (
    ADAPTER_CONFIG,
    CONFIG,
    PARAMS,
    Format,
    first_names,
    folder_format,
    holds_tokenizer,
    is_adapter,
    is_model,
)
from transom.checkpoints.files.packaged import packaged_model
from transom.checkpoints.gguf.folder import gguf_folder
from transom.checkpoints.gguf.reader import is_gguf


@dataclass(frozen=True)
class ModelLocation:
    """The folders that a name stands for.

    Attributes:
        model: The folder of the model, or of the base if there is an adapter. If only a tokenizer
            was asked for, it may hold no model.
        adapter: The folder of the adapter to apply to the model, if there is one.
        tokenizer_file: The file of the tokenizer, if the name was that of a file.
    """

    model: Path
    adapter: Path | None = None
    tokenizer_file: Path | None = None

    @property
    def folders(self) -> tuple[Path, ...]:
        """The folders to search for files beside the weights, the adapter's first."""
        return (self.model,) if self.adapter is None else (self.adapter, self.model)

    @property
    def tokenizer(self) -> Path:
        """The folder or file of the tokenizer."""
        return self.tokenizer_file or next(filter(holds_tokenizer, self.folders), self.model)

    @property
    def format(self) -> Format:
        """The format of the model folder."""
        return folder_format(self.model)

    def __str__(self) -> str:
        model = shown_name(self.model)
        return model if self.adapter is None else f"{model} + adapter {self.adapter}"


def find_model(
    name: str | Path, revision: str | None = None, *, settings_only: bool = False
) -> ModelLocation:
    """Return the folders that a name stands for.

    Args:
        name: A model or adapter folder, a run folder for its best step, a GGUF file, the name of a
            model that a package carries (`smollm2`), or a hub id (`owner/model`). If the parent
            directory exists locally, the name is treated as a path and never sent to the hub.
        revision: Branch, tag or commit of a hub id.
        settings_only: Download config, tokenizer and chat template of a hub id, but no weights.
            A folder with a tokenizer and no model, and the file of a tokenizer, are accepted too.

    Raises:
        RequestError: There is no such folder, or the base of an adapter is missing or is an
            adapter itself.
    """
    if settings_only and revision is None and Path(name).is_file() and not is_gguf(Path(name)):
        return ModelLocation(Path(name).parent, tokenizer_file=Path(name))
    folder = named_folder(name, revision, settings_only)
    if not is_adapter(folder):
        return ModelLocation(folder)
    base, where = base_of(folder), f"{folder / ADAPTER_CONFIG}: base_model_name_or_path"
    try:
        of_base = None if Path(base).exists() else base_revision(folder)
        model = named_folder(base, of_base, settings_only)
    except RequestError as error:
        raise RequestError(f"{where}: {str(error).removeprefix('model: ')}") from None
    if is_adapter(model):
        raise RequestError(f"{where}: got {base!r}, which is an adapter; expected a complete model")
    return ModelLocation(model, folder)


def named_folder(
    name: str | Path, revision: str | None = None, settings_only: bool = False
) -> Path:
    """Return the model or adapter folder of a name; the arguments are those of `find_model`.

    A notice names the step that is used of a run folder.
    """
    folder = Path(name)
    if not folder.exists() and not folder.parent.exists() and is_hub_id(str(name)):
        fetched = download(str(name), revision, settings_only=settings_only)
        return named_folder(fetched, None, settings_only)
    of_hub = f"valid only with a hub id, and {name} is not one"
    require(revision is None, "revision", revision, of_hub)
    file = folder if folder.exists() else packaged_model(str(name)) or folder
    if is_gguf(file):
        return gguf_folder(file)
    if not folder.is_dir():
        found = "a file" if folder.exists() else "no such folder"
        expected = "expected a model, adapter or run folder, a GGUF file, or a hub id"
        raise RequestError(f"model: got {str(name)!r}, {found}; {expected}")
    if is_model(folder):
        return folder
    for pointer in ("best", "latest"):
        step = read_pointer(folder, pointer)
        if step is not None:
            notice(f"{folder}: using {pointer} step {step.name}")
            return step
    if settings_only and holds_tokenizer(folder):
        return folder
    also = ", or one with tokenizer.json, tekken.json or tokenizer.model" if settings_only else ""
    files = sorted(path.name for path in folder.glob("*.gguf"))
    also += f"; to open a GGUF file, name it: {first_names(files)}" if files else ""
    raise RequestError(
        f"model: got {str(name)!r}, with no {CONFIG}, no {PARAMS}, no "
        f"{ADAPTER_CONFIG} and no finished step; expected a model, adapter or run folder{also}"
    )


def read_pointer(run: Path, name: str) -> Path | None:
    """Return the step folder that a run's file `latest` or `best` names, or None without the file.

    A step is a model folder, or an adapter folder if only an adapter was trained.

    Raises:
        RequestError: The file names a folder that is not there.
    """
    pointer = run / name
    if not pointer.exists():
        return None
    step = run / pointer.read_text(encoding="utf-8").strip()
    if not is_model(step):
        raise RequestError(
            f"{pointer}: names {step.name!r}, which is not a model or adapter folder; delete "
            f"{pointer.name!r} or restore the folder"
        )
    return step
