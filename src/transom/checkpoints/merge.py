"""Plan the merging of adapters into their base, and make the merged models.

Adapters are trained on a base in some form: in another dtype, or in four bits. They can be merged
into the weights of that form, or into the numbers of the base's files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transom.base.errors import RequestError, expect
from transom.base.runtime import DTYPES
from transom.checkpoints.adapters.read import MISTRAL_WEIGHTS, load_adapter
from transom.checkpoints.files.layout import is_adapter
from transom.checkpoints.files.lazy_tensors import LazyTensor, dtypes_of, main_dtype, narrowed
from transom.checkpoints.files.location import ModelLocation, find_model, named_folder
from transom.checkpoints.fingerprint import check_base, read_facts
from transom.checkpoints.load import load
from transom.checkpoints.state import open_parameters
from transom.lora.adapters import activate_adapters, plain_weights
from transom.lora.args import CombineArgs
from transom.lora.combine import scale_adapters
from transom.lora.merge import fold_adapters
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model
from transom.quantize.methods import quantize_model


@dataclass(frozen=True)
class MergePart:
    """One adapter to merge: its name on the model, its folder, and the factor before its update."""

    name: str
    folder: Path
    weight: float


@dataclass(frozen=True)
class BaseForm:
    """The form of the base in training: its dtype (None is that of the files) and quantization."""

    dtype: str | None = None
    quantize: QuantizeArgs | None = None

    def __str__(self) -> str:
        words = (self.dtype, None if self.quantize is None else self.quantize.kind)
        form = ", ".join(filter(None, words))
        return f"base as in training ({form})" if form else "full-precision base"


@dataclass(frozen=True)
class Merge:
    """A base, its adapters, and the steps that merge them.

    Attributes:
        base: The folder of the base.
        base_fingerprint: The fingerprint of its weights.
        parts: The adapters.
        args: How several adapters are combined.
        trained: The form of the base that the adapters were trained on.
        own_dtype: The dtype of the base's files.
        dtype: The dtype of the result.
        device: The device to merge on.
    """

    base: Path
    base_fingerprint: str
    parts: tuple[MergePart, ...]
    args: CombineArgs
    trained: BaseForm
    own_dtype: str
    dtype: str
    device: str

    @classmethod
    def plan(
        cls,
        base: str | Path | None,
        adapters: Sequence[str | Path],
        args: CombineArgs,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> Merge:
        """Find the folders and check that they belong together.

        Args:
            base: The base; None is the one that all adapters name.
            adapters: Adapter folders, runs for their best steps, or hub ids.
            args: How several adapters are combined.
            dtype: The dtype of the result; None is that of the base's files.
            device: The device to merge on.

        Raises:
            RequestError: A folder is missing, or adapters were trained on different bases.
        """
        expect(dtype is None or dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
        weights = args.weights_of(len(adapters))
        where, folders = named_folders(base, adapters)
        base_fingerprint = check_base(folders[0], where)
        for folder in folders[1:]:
            check_base(folder, where, base_fingerprint)
        weighted = enumerate(zip(folders, weights, strict=True))
        parts = tuple(MergePart(f"part{i}", folder, weight) for i, (folder, weight) in weighted)
        own = main_dtype(open_parameters(where))
        own_dtype = str(own).removeprefix("torch.")
        form = trained_form(folders, own)
        out_dtype = dtype or own_dtype
        return cls(where, base_fingerprint, parts, args, form, own_dtype, out_dtype, device)

    @property
    def wide(self) -> str:
        """The dtype of sums and of measuring: float32, or float64 if the files have it."""
        return "float64" if self.own_dtype == "float64" else "float32"

    @property
    def location(self) -> ModelLocation:
        """The base, with the adapter whose tokenizer, template and settings are copied."""
        return ModelLocation(self.base, self.parts[0].folder)

    @property
    def run(self) -> Path | None:
        """Return the run folder that contains the first adapter, if it is a step of a run."""
        run = self.parts[0].folder.parent
        return run if (run / "latest").exists() else None

    @property
    def weights(self) -> dict[str, float]:
        """The factors of the adapters by name."""
        return {part.name: part.weight for part in self.parts}

    @property
    def forms(self) -> tuple[BaseForm, ...]:
        """The forms of the base to merge on: that of training, and the numbers of the files."""
        return tuple(dict.fromkeys((self.trained, BaseForm())))

    def unmerged(self, form: BaseForm) -> LLM:
        """Return the base in a form, in wide numbers, with all adapters active.

        Adapters that add up have their weights.
        """
        dtype = self.wide if form == BaseForm() else form.dtype
        model = load(ModelLocation(self.base), self.device, dtype, keep_quantized=False)
        if form.quantize is not None:
            dequantize_model(quantize_model(model, form.quantize))
        model = model.to(DTYPES[self.wide])
        for part in self.parts:
            load_adapter(model, part.folder, part.name)
        activate_adapters(model, self.weights)
        if self.args.method == "linear":
            scale_adapters(model, self.weights)
        return model

    def merged(self, model: LLM) -> LLM:
        """Merge the adapters of `unmerged` into its weights, in place, without rounding."""
        if self.args.method == "linear":
            return fold_adapters(model)
        return fold_adapters(model, self.args, self.weights)

    @torch.no_grad()
    def rounded(self, model: LLM) -> LLM:
        """Round every weight to the dtype of the result, in place; it stays in wide numbers."""
        weights = plain_weights(model)
        lazy = {name: LazyTensor.of(weight) for name, weight in weights.items()}
        kinds = dtypes_of(lazy, DTYPES[self.dtype])
        for name, weight in weights.items():
            weight.copy_(narrowed(name, weight, kinds[name]))
        return model


def named_folders(
    base: str | Path | None, adapters: Sequence[str | Path]
) -> tuple[Path, list[Path]]:
    """Return the folders of a base and of adapters; a run stands for its best step.

    Args:
        base: The base; None is the one that all adapters name.
        adapters: The adapters.

    Raises:
        RequestError: A folder is missing, the base is an adapter, an adapter is a model, or
            adapters name different bases.
    """
    folders = [_adapter_folder(name) for name in adapters]
    if base is not None:
        found = find_model(base)
        expect(found.adapter is None, "base", str(base), "a complete model, not an adapter")
        return found.model, folders
    models = [find_model(folder).model for folder in folders]
    bases = dict.fromkeys(str(model.resolve()) for model in models)
    if len(bases) > 1:
        raise RequestError(f"adapters of {' and of '.join(bases)}; expected those of one base")
    return models[0], folders


def _adapter_folder(name: str | Path) -> Path:
    of_mistral = (Path(name) / MISTRAL_WEIGHTS).exists()
    folder = Path(name) if of_mistral else named_folder(name)
    expected = "an adapter or its run, not a complete model"
    expect(of_mistral or is_adapter(folder), "adapter", str(name), expected)
    return folder


def trained_form(adapters: Sequence[Path], own: torch.dtype) -> BaseForm:
    """Return the form of the base that adapters were trained on; `own` is the dtype of its files.

    Raises:
        RequestError: They were trained on different forms.
    """
    forms: list[BaseForm] = []
    for facts in filter(None, map(read_facts, adapters)):
        kind = own if facts.dtype is None else DTYPES[facts.dtype]
        # A wider dtype has the same numbers, but the scales of quantized ones are rounded to it.
        same = torch.promote_types(own, kind) == kind and facts.quantize is None
        forms.append(BaseForm(None if same else facts.dtype, facts.quantize))
    different = dict.fromkeys(map(str, forms))
    if len(different) > 1:
        raise RequestError(f"adapters of {' and of '.join(different)}; expected those of one form")
    return forms[0] if forms else BaseForm()
