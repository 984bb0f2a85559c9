"""Adapters and their base as folders: which belong together, and the models that can be made of
them.

An adapter was trained beside a base in some form: in another dtype, or in four bits. The merged
weights can be made of that form, or of the base's own numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transom.base.errors import RequestError, require
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
from transom.quantize.leaves import dequantize_model, quantize_model


@dataclass(frozen=True)
class Part:
    """One adapter to merge: its name on the model, its folder, and the factor in front of what it
    adds.
    """

    name: str
    folder: Path
    weight: float


@dataclass(frozen=True)
class Form:
    """What the base's weights were in training: their dtype (None: the files' own), and how they
    were quantized.
    """

    dtype: str | None = None
    quantize: QuantizeArgs | None = None

    def __str__(self) -> str:
        words = (self.dtype, None if self.quantize is None else self.quantize.kind)
        return ", ".join(filter(None, words)) or "the files' own numbers"


@dataclass(frozen=True)
class Merge:
    """What is to be merged; `wide` is the dtype of sums and of measuring, `dtype` the one that is
    cast to, once.
    """

    base: Path
    base_fingerprint: str
    parts: tuple[Part, ...]
    args: CombineArgs
    trained: Form
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
        """Find the folders and check that they belong together; without a `base`, the one that
        adapters name.
        """
        require(dtype is None or dtype in DTYPES, "dtype", dtype, f"expected {', '.join(DTYPES)}")
        weights = args.weights_of(len(adapters))
        where, folders = named_folders(base, adapters)
        first, *others = folders
        base_fingerprint = check_base(first, where)
        for folder in others:
            check_base(folder, where, base_fingerprint)
        weighed = zip(folders, weights, strict=True)
        parts = tuple(
            Part(f"part{index}", folder, weight) for index, (folder, weight) in enumerate(weighed)
        )
        own = main_dtype(open_parameters(where))
        own_dtype = str(own).removeprefix("torch.")
        form = form_of(folders, own)
        return cls(
            where, base_fingerprint, parts, args, form, own_dtype, dtype or own_dtype, device
        )

    @property
    def wide(self) -> str:
        """Float32, or float64 where the files have it."""
        return "float64" if self.own_dtype == "float64" else "float32"

    @property
    def found(self) -> ModelLocation:
        """The base, with the adapter whose tokenizer, template and settings go along."""
        return ModelLocation(self.base, self.parts[0].folder)

    @property
    def run(self) -> Path | None:
        """The run of which the first adapter is a step."""
        run = self.parts[0].folder.parent
        return run if (run / "latest").exists() else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the adapters."""
        return tuple(part.name for part in self.parts)

    def unmerged(self, form: Form) -> LLM:
        """The base in a form, in wide numbers, with all adapters active beside it, weighed if they
        add up.
        """
        model = load(
            ModelLocation(self.base), self.device, self.wide if form == Form() else form.dtype
        )
        if form.quantize is not None:
            dequantize_model(quantize_model(model, form.quantize))
        model = model.to(DTYPES[self.wide])
        for part in self.parts:
            load_adapter(model, part.folder, part.name)
        activate_adapters(model, self.names)
        if self.args.method == "linear":
            scale_adapters(model, {part.name: part.weight for part in self.parts})
        return model

    def merged(self, model: LLM) -> LLM:
        """`unmerged` with the adapters in its weights, not rounded yet; in place."""
        if self.args.method == "linear":
            return fold_adapters(model)
        return fold_adapters(model, self.args, {part.name: part.weight for part in self.parts})

    @torch.no_grad()
    def rounded(self, model: LLM) -> LLM:
        """Every weight as the output dtype has it, still in wide numbers; in place."""
        weights = plain_weights(model)
        kinds = dtypes_of(
            {name: LazyTensor.of(weight) for name, weight in weights.items()}, DTYPES[self.dtype]
        )
        for name, weight in weights.items():
            weight.copy_(narrowed(name, weight, kinds[name]))
        return model

    @property
    def forms(self) -> tuple[Form, ...]:
        """Of the base to merge on: the one that the adapters saw, and the files' own numbers."""
        return tuple(dict.fromkeys((self.trained, Form())))

    def name_of(self, form: Form) -> str:
        """A form in words."""
        return "full-precision base" if form == Form() else f"base as in training: {form}"


def named_folders(
    base: str | Path | None, adapters: Sequence[str | Path]
) -> tuple[Path, list[Path]]:
    """The folders of the base and of the adapters; a run stands for its best step.

    Without a `base` it is the one that all adapters name.
    """
    if base is not None:
        whole = find_model(base)
        require(
            whole.adapter is None,
            "base",
            str(base),
            "expected a whole model, and this is an adapter",
        )
        return whole.model, [_adapter_folder(name) for name in adapters]
    bases: dict[Path, Path] = {}
    folders = []
    for name in adapters:
        found = find_model(name)
        if found.adapter is None:
            raise _no_adapter(name)
        folders.append(found.adapter)
        bases.setdefault(found.model.resolve(), found.model)
    if len(bases) > 1:
        first, second, *_ = bases
        raise RequestError(f"adapters of {first} and of {second}: expected adapters of one base")
    return next(iter(bases.values())), folders


def _adapter_folder(name: str | Path) -> Path:
    """The folder of an adapter whose own base is not asked for."""
    if (Path(name) / MISTRAL_WEIGHTS).exists():
        return Path(name)
    folder = named_folder(name)
    if not is_adapter(folder):
        raise _no_adapter(name)
    return folder


def _no_adapter(name: str | Path) -> RequestError:
    return RequestError(
        f"adapter: got {str(name)!r}; a whole model; expected an adapter, or a run of one"
    )


def form_of(adapters: Sequence[Path], own: torch.dtype) -> Form:
    """In what form the adapters saw their base; `own` is the dtype of its files. Two forms are a
    `RequestError`.
    """
    forms = []
    for facts in filter(None, map(read_facts, adapters)):
        known = facts.dtype is None or facts.dtype in DTYPES
        require(known, "dtype", facts.dtype, f"expected {', '.join(DTYPES)}")
        same = (
            facts.dtype is None
            or torch.promote_types(own, DTYPES[facts.dtype]) == DTYPES[facts.dtype]
        )
        # A wider dtype holds the same numbers, but scales of quantized ones are rounded to it.
        quantize = None if facts.quantize is None else QuantizeArgs.from_dict(facts.quantize)
        forms.append(Form(None if same and quantize is None else facts.dtype, quantize))
    if any(form != forms[0] for form in forms):
        raise RequestError(
            f"adapters trained on a base in {forms[0]} and in "
            f"{next(form for form in forms if form != forms[0])}: "
            "expected adapters that saw the same base"
        )
    return forms[0] if forms else Form()
