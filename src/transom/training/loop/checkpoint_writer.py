"""What of a run becomes a model folder with every checkpoint, and how it comes back when the run
goes on.
"""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from transom.base.errors import RequestError
from transom.chat.fingerprint import write_fingerprint
from transom.chat.template import ChatTemplate
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.companions import copy_companions
from transom.checkpoints.files.generation_config import (
    stated_settings,
    stop_tokens_of,
    write_settings,
)
from transom.checkpoints.files.layout import Format
from transom.checkpoints.fingerprint import write_facts
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.data.labelled import write_labels
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer

ADAPTER = "default"
TRAINED = "trained/"  # before the names of an adapter's weights among the tensors of a trainer


class StepModel(Protocol):
    """The part of a step folder that other verbs read."""

    def write(self, folder: Path) -> None:
        """The model's files."""

    def tensors(self) -> dict[str, Tensor]:
        """What else a resumed run needs, for the trainer's own file."""

    def restore(self, folder: Path, tensors: MutableMapping[str, Tensor]) -> None:
        """The weights of a step back into the model; takes what `tensors` gave out of the
        trainer's.
        """


@dataclass(frozen=True)
class Companions:
    """What goes along with the weights of a fine-tuned model, so that it is talked to as it was
    trained.
    """

    base: Path  # the folder whose files go along
    tokenizer: Tokenizer
    template: ChatTemplate | None
    new_tokens: bool = False  # whether the tokenizer is no longer that of the base

    def write(self, folder: Path) -> None:
        """Tokenizer, chat template, generation settings with every token that ends an answer,
        fingerprint.
        """
        copy_companions(self.base, folder)
        if self.new_tokens:
            self.tokenizer.save(folder)
        if self.template is not None:
            self.template.save(folder)
        settings = stated_settings((self.base,))
        ends = stop_tokens_of(self.base, self.tokenizer, self.template)
        if ends:
            settings["eos_token_id"] = ends[0] if len(ends) == 1 else list(ends)
        write_settings(folder, settings)
        write_fingerprint(folder, self.tokenizer, self.template)


@dataclass(frozen=True)
class WholeModel:
    """All weights with the tokenizer, or what goes along with a base, and the names of labels if
    there are some.
    """

    model: LLM
    tokenizer: Tokenizer
    labels: Sequence[str] | None = None
    companions: Companions | None = None
    format: Format = "native"

    def write(self, folder: Path) -> None:
        """A model folder."""
        save(self.model, folder, self.format, self.tokenizer if self.companions is None else None)
        if self.companions is not None:
            self.companions.write(folder)
        if self.labels is not None:
            write_labels(folder, self.labels)

    def tensors(self) -> dict[str, Tensor]:
        """Nothing: the folder holds all."""
        return {}

    def restore(self, folder: Path, tensors: MutableMapping[str, Tensor]) -> None:
        """Every weight, copied into the memory that is there."""
        if self.companions is None and read_args(folder) != self.model.args:
            raise RequestError(f"{folder}: belongs to another model than the config describes")
        weights = open_parameters(folder, self.model.args)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(weights[name].read())


@dataclass(frozen=True)
class AdapterOnly:
    """What trains beside a frozen base, as PEFT's two files; `base` is named there and must not
    change.
    """

    model: LLM
    companions: Companions
    base: str
    base_fingerprint: str
    dtype: str
    quantize: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        """An adapter folder, which every verb takes for its base with the adapter on it."""
        folder.mkdir(exist_ok=True)
        self.companions.write(folder)
        save_adapter(self.model, folder, ADAPTER, base=self.base)
        write_facts(folder, self.base, self.base_fingerprint, self.quantize, self.dtype)

    def tensors(self) -> dict[str, Tensor]:
        """The weights that train as they are: the adapter's files may hold them turned, or in other
        pieces.
        """
        named = self.model.named_parameters()
        return {
            f"{TRAINED}{name}": weight.detach() for name, weight in named if weight.requires_grad
        }

    def restore(self, folder: Path, tensors: MutableMapping[str, Tensor]) -> None:
        """Every trained weight, copied into the memory that is there."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if not weight.requires_grad:
                    continue
                saved = tensors.pop(f"{TRAINED}{name}", None)
                if saved is None or saved.shape != weight.shape:
                    raise RequestError(
                        f"{folder}: belongs to another adapter than the config describes ({name})"
                    )
                weight.copy_(saved)
