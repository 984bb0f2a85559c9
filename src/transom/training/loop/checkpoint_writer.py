"""Writers of the model in each checkpoint, and how its weights are restored from one."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from transom.checkpoints.files.lazy_tensors import LazyTensors
from transom.checkpoints.fingerprint import write_facts
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.data.labelled import write_labels
from transom.distributed.checkpoint import between_steps
from transom.distributed.parts import copy_full
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer

ADAPTER = "default"  # name of the trained adapter
TRAINED = "trained/"  # prefix of an adapter's weights among the trainer's tensors


@dataclass(frozen=True)
class Companions:
    """The files that belong to a fine-tuned model, so that it is used as it was trained.

    Attributes:
        base: Folder of the base, whose files are copied.
        tokenizer: Tokenizer of the run.
        template: Template of its conversations.
        new_tokens: Whether the tokenizer differs from that of the base.
    """

    base: Path
    tokenizer: Tokenizer
    template: ChatTemplate | None
    new_tokens: bool = False

    def write(self, folder: Path) -> None:
        """Write the tokenizer, the chat template, its fingerprint and generation settings.

        The settings name every token that ends an answer.
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
class ModelWriter:
    """Writes all weights, with the tokenizer or the companions of a base, and names of labels."""

    model: LLM
    tokenizer: Tokenizer
    labels: Sequence[str] | None = None
    companions: Companions | None = None
    format: Format = "native"

    def write(self, folder: Path, weights: LazyTensors | None = None) -> None:
        """Write a model folder: the part of a step folder that other verbs read.

        Args:
            folder: The folder.
            weights: The weights of a model that no rank has all of; None writes those of the model.
        """
        tokenizer = self.tokenizer if self.companions is None else None
        save(self.model, folder, self.format, tokenizer, weights=weights)
        if self.companions is not None:
            self.companions.write(folder)
        if self.labels is not None:
            write_labels(folder, self.labels)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that `write` needs, or this rank's parts of them."""
        return dict(between_steps(self.model).named_parameters())

    def tensors(self) -> dict[str, Tensor]:
        """Return what else a resumed run needs: nothing, since the folder has all weights."""
        return {}

    def restore(self, folder: Path, tensors: MutableMapping[str, Tensor]) -> None:
        """Copy every weight of a step into the model.

        Raises:
            RequestError: If the step is of another model.
        """
        if self.companions is None and read_args(folder) != self.model.args:
            raise RequestError(f"{folder}: belongs to another model than the config describes")
        weights = open_parameters(folder, self.model.args)
        for name, parameter in self.model.named_parameters():
            copy_full(parameter, weights[name].read())


@dataclass(frozen=True)
class AdapterWriter:
    """Writes the adapter of a frozen base as the two files of PEFT.

    Attributes:
        model: The base with the adapter.
        companions: The files that belong to it.
        base: Folder or hub id of the base, which the adapter's config names.
        base_fingerprint: Fingerprint of the base, which must not change.
        dtype: Dtype of the frozen weights.
        quantize: How the frozen weights are quantized.
    """

    model: LLM
    companions: Companions
    base: str
    base_fingerprint: str
    dtype: str
    quantize: dict[str, Any] | None = None

    def write(self, folder: Path, weights: LazyTensors | None = None) -> None:
        """Write an adapter folder, which every verb takes for its base with the adapter."""
        folder.mkdir(exist_ok=True)
        self.companions.write(folder)
        save_adapter(self.model, folder, ADAPTER, base=self.base, weights=weights)
        write_facts(folder, self.base, self.base_fingerprint, self.quantize, self.dtype)

    def weights(self) -> dict[str, Tensor]:
        """Return the weights that `write` needs, or this rank's parts of them."""
        return self._trained(shared=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the trained weights as they are; the adapter's files may transpose them."""
        return {f"{TRAINED}{name}": weight for name, weight in self._trained().items()}

    def restore(self, folder: Path, tensors: MutableMapping[str, Tensor]) -> None:
        """Copy every trained weight of a step into the model, and remove it from `tensors`.

        Raises:
            RequestError: If the step is of another adapter.
        """
        for name, weight in self._trained().items():
            saved = tensors.pop(f"{TRAINED}{name}", None)
            if saved is None or saved.shape != weight.shape:
                what = "belongs to another adapter than the config describes"
                raise RequestError(f"{folder}: {what} ({name})")
            weight.copy_(saved)

    def _trained(self, *, shared: bool = False) -> dict[str, Tensor]:
        """Return the trained weights; one that leaves share counts once unless `shared`."""
        named = between_steps(self.model).named_parameters(remove_duplicate=not shared)
        return {name: weight.detach() for name, weight in named if weight.requires_grad}
