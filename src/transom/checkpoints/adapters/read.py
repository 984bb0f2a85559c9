"""Read adapters: folders of PEFT, and `lora.safetensors` of mistral-finetune."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json
from transom.checkpoints.adapters.foreign_leaves import (
    MISFITS,
    MISTRAL,
    ForeignLora,
    Naming,
    is_parameter,
    namings,
    to_leaves,
)
from transom.checkpoints.adapters.peft_config import PeftConfig, read_peft
from transom.checkpoints.families.weights import OUR_NAMES, WeightNames
from transom.checkpoints.files.consolidated import read_pickled
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, PARAMS, first_names
from transom.checkpoints.files.safetensors_files import read_safetensors
from transom.lora.adapters import activate_adapters, attach, train_adapters
from transom.lora.vocabulary import resize_vocabulary
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.transforms import apply_transform

PICKLED = "adapter_model.bin"
MISTRAL_WEIGHTS = "lora.safetensors"
MISTRAL_SCALING = 2.0  # the default of mistral-inference's `load_lora`
PREFIX = "base_model.model."  # before every key of a PEFT file
_OUTPUTS = ("lm_head.weight", "output.weight")
_EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight")
_PART = re.compile(r"(?P<path>.+)\.lora_(embedding_)?(?P<which>A|B|magnitude_vector)(\.weight)?")


class ModulePath(NamedTuple):
    """The module of a low-rank part: its path in our spelling and in the file's.

    `depth` is the number of PEFT's wrappers around it (`.base_layer`).
    """

    path: str
    named: str
    depth: int


@dataclass
class AdapterTensors:
    """The tensors of an adapter file.

    Attributes:
        parts: A, B and magnitude by module.
        whole: Parameters that are saved whole, by key.
        unread: The number of keys that are not read, by reason.
    """

    parts: dict[ModulePath, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    unread: Counter[str] = field(default_factory=Counter)


def load_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    scaling: float | None = None,
) -> LLM:
    """Put an adapter on a model, in place, as the only active one; return the model.

    The vocabulary grows to that of an adapter with new tokens.

    Args:
        model: The base of the adapter.
        folder: A folder of PEFT (LoRA, rsLoRA, DoRA), or one with Mistral's `lora.safetensors`.
        name: The name of the adapter on the model.
        trainable: Train the adapter and freeze everything else. Otherwise it is frozen.
        scaling: The factor before Mistral's adapter; None takes that of `params.json`.

    Raises:
        RequestError: The folder is no adapter or is damaged, it has a feature that is not
            supported, or one of its keys has no place in the model. The model is unchanged.
    """
    here = Path(folder)
    if (here / ADAPTER_CONFIG).exists():
        require(scaling is None, "scaling", scaling, f"valid only without {ADAPTER_CONFIG}")
        parts = _peft_parts(model, here)
    elif (here / MISTRAL_WEIGHTS).exists():
        parts = _mistral_parts(model, here, scaling)
    else:
        raise RequestError(
            f"{here}: no {ADAPTER_CONFIG} and no {MISTRAL_WEIGHTS}; expected an adapter folder"
        )
    attach(model, name, parts)
    activate_adapters(model, (name,))
    for part in parts.values():
        part.requires_grad_(False)
    if trainable:
        train_adapters(model, (name,))
    return model


def _peft_parts(model: LLM, folder: Path) -> dict[str, LoraWeights | Replacement]:
    config = read_peft(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
    names = (ADAPTER_WEIGHTS, PICKLED, MISTRAL_WEIGHTS)
    present = [name for name in names if (folder / name).exists()]
    path = folder / (PICKLED if present[:1] == [PICKLED] else ADAPTER_WEIGHTS)
    ignored = ", ".join(name for name in present if name != path.name)
    if ignored:
        notice(f"{folder}: the adapter is read from {path.name}; ignored: {ignored}")
    state = _read_tensors(path)
    unplaced: list[str] = []
    for naming in namings(model):
        source = sort_keys(state, naming.names, model.args.n_layers, str(path))
        sites = _sites(naming, source, config)
        lost = [module.path for module in source.parts if module not in sites]
        lost += [key for key in source.whole if not _has_place(naming, key)]
        if not lost:
            return _of_naming(naming, source, sites, config, str(path))
        unplaced = unplaced or lost
    raise RequestError(
        f"{path}: got tensors of {first_names(unplaced)}; expected modules of this model"
    )


def sort_keys(
    state: Mapping[str, Tensor], names: WeightNames, n_layers: int, where: str
) -> AdapterTensors:
    """Return the tensors of an adapter file by module, without PEFT's prefixes and wrappers.

    Raises:
        RequestError: A tensor is part of a LoRA feature that is not supported.
    """
    out = AdapterTensors()
    for full, tensor in state.items():
        key = names.known_key(full.removeprefix(PREFIX))
        reason = names.unread_reason(key, n_layers)
        match = _PART.fullmatch(key)
        if reason is not None:
            out.unread[reason] += 1
        elif match is not None:
            named = full.removeprefix(PREFIX).replace(".base_layer", "").partition(".lora_")[0]
            path, depth = (
                match["path"].replace(".base_layer", ""),
                match["path"].count(".base_layer"),
            )
            out.parts.setdefault(ModulePath(path, named, depth), {})[match["which"]] = tensor
        else:
            require(".lora_" not in key, where, full, "expected A, B or a magnitude vector of LoRA")
            out.whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
    return out


def _sites(naming: Naming, source: AdapterTensors, config: PeftConfig) -> dict[ModulePath, str]:
    """Return the site of every low-rank part that has one."""
    out: dict[ModulePath, str] = {}
    for module in source.parts:
        wrapped = list(filter(config.is_target_parameter, naming.parameters_of(module.path)))
        if module.path in naming.sites and module.depth == 0:
            out[module] = module.path
        elif module.depth < len(wrapped):
            out[module] = wrapped[-1 - module.depth]
    return out


def _of_naming(
    naming: Naming,
    source: AdapterTensors,
    sites: Mapping[ModulePath, str],
    config: PeftConfig,
    where: str,
) -> dict[str, LoraWeights | Replacement]:
    for reason, count in source.unread.items():
        notice(f"{where}: {count} tensors left unread: {reason}")
    found = {
        sites[module]: _foreign_lora(naming, module, sites[module], part, config, where)
        for module, part in source.parts.items()
    }
    parts = _all_leaves(naming, found, config.dropout, where)
    _grow_vocabulary(naming, source.whole, where)
    return {**parts, **_replacements(naming, source.whole, config, parts, where)}


def _all_leaves(
    naming: Naming, found: Mapping[str, ForeignLora], dropout: float, where: str
) -> dict[str, LoraWeights | Replacement]:
    out: dict[str, LoraWeights | Replacement] = {}
    for mapping in dict.fromkeys(naming.sites[name] for name in found):
        made = to_leaves(naming, mapping, found, dropout, where)
        if made.keys() & out:
            raise RequestError(f"{where}: two adapters on {min(made.keys() & out)}; expected one")
        out.update(made)
    return out


def _has_place(naming: Naming, key: str) -> bool:
    tied = naming.model.args.tie_embeddings and key.endswith(_OUTPUTS)
    return tied or any(key in mapping.foreign for mapping in naming.mappings)


def _foreign_lora(
    naming: Naming,
    module: ModulePath,
    site: str,
    part: Mapping[str, Tensor],
    config: PeftConfig,
    where: str,
) -> ForeignLora:
    complete = {"A", "B"} <= set(part) and config.dora == ("magnitude_vector" in part)
    expected = "expected A and B, and a magnitude_vector if use_dora is true"
    require(complete, f"{where}: {site}", ", ".join(sorted(part)), expected)
    parameter = is_parameter(naming.sites[site])
    key = f"{module.named}.{site.rpartition('.')[2]}" if parameter else module.named
    key += ".weight" if config.is_target_parameter(f"{key}.weight") else ""
    rank, rows = config.rank_of(key), part["A"].size(-2)
    groups = part["B"].size(1) // rank if parameter and rank > 0 else 1
    field = f"{where}: {site}: rank"
    require(
        rows == rank * groups, field, rows // max(groups, 1), f"expected {rank}, as in the config"
    )
    magnitude, alpha = part.get("magnitude_vector"), config.alpha_of(key)
    return ForeignLora(part["A"], part["B"], magnitude, alpha, config.scaling)


def _grow_vocabulary(naming: Naming, whole: Mapping[str, Tensor], where: str) -> None:
    key = next(m.foreign[0] for m in naming.mappings if m.ours == ("tok_embeddings.weight",))
    rows = whole[key].size(0) if key in whole else 0
    more = rows - naming.model.args.vocab_size
    if more > 0:
        notice(f"{where}: its vocabulary has {more} tokens more than the base's")
        resize_vocabulary(naming.model, rows)


def _replacements(
    naming: Naming,
    whole: Mapping[str, Tensor],
    config: PeftConfig,
    parts: Mapping[str, object],
    where: str,
) -> dict[str, Replacement]:
    """Return the parameters that are saved whole (`modules_to_save`), by module.

    PEFT saves embeddings beside their adapter; parameters equal to the model's own are left out.
    """
    model, out = naming.model, dict[str, dict[str, Tensor]]()
    left = _without_tied_output(model, whole, config, where)
    for mapping in naming.mappings:
        given = [left.pop(key) for key in mapping.foreign if key in left]
        if not given:
            continue
        own = [model.get_parameter(name) for name in mapping.ours]
        shapes = [tuple(parameter.shape) for parameter in own]
        try:
            made = apply_transform(mapping.transform, given, shapes)
        except MISFITS:
            made = []
        fits = len(given) == len(mapping.foreign) and [tuple(t.shape) for t in made] == shapes
        found = ", ".join(str(tuple(tensor.shape)) for tensor in given)
        expected = f"expected {shapes[0]}, as in the model, with a vocabulary of the same size"
        require(fits, f"{where}: {mapping.foreign[0]}: shape", found, expected)
        for name, tensor, parameter in zip(mapping.ours, made, own, strict=True):
            path, _, last = name.rpartition(".")
            rows = naming.reordered(path, tensor, to_ours=True)
            value = rows.to(parameter.device, parameter.dtype, copy=True).contiguous()
            if torch.equal(value, parameter):
                continue
            if path in parts:
                raise RequestError(
                    f"{where}: an adapter on {path} and a {last} of its own; expected one of them"
                )
            out.setdefault(path, {})[last] = value
    return {path: Replacement(tensors) for path, tensors in out.items()}


def _without_tied_output(
    model: LLM, whole: Mapping[str, Tensor], config: PeftConfig, where: str
) -> dict[str, Tensor]:
    """Return the tensors without the output of a model that ties it to its embeddings.

    Raises:
        RequestError: The adapter has an output that differs from its embeddings.
    """
    head = next((key for key in whole if key.endswith(_OUTPUTS)), None)
    embeddings = next((key for key in whole if key.endswith(_EMBEDDINGS)), None)
    given = [key for key in (head, embeddings) if key is not None]
    if not model.args.tie_embeddings or not given:
        return dict(whole)
    alone, own = whole[given[0]], model.tok_embeddings.weight
    tied = len(given) == 2 and torch.equal(alone, whole[given[1]])
    if not tied and (head is not None or not config.ensure_weight_tying):
        same = alone.shape == own.shape and torch.equal(alone.to(own), own)
        if not same:
            raise RequestError(
                f"{where}: {given[0]} has values of its own; expected those of the embeddings, "
                "since tie_word_embeddings is true"
            )
    return {key: tensor for key, tensor in whole.items() if key != head}


def _mistral_parts(
    model: LLM, folder: Path, scaling: float | None
) -> dict[str, LoraWeights | Replacement]:
    path, params = folder / MISTRAL_WEIGHTS, folder / PARAMS
    stated = read_json(params).get("lora") if scaling is None and params.exists() else None
    if isinstance(stated, dict):
        scaling = stated.get("scaling")
    if scaling is None:
        scaling = MISTRAL_SCALING
        notice(
            f"{path}: no {PARAMS} states the scaling; {scaling} is used, as in mistral-inference"
        )
    number = isinstance(scaling, int | float) and not isinstance(scaling, bool)
    require(number, f"{params}: lora.scaling", scaling, "expected a number")
    source, naming = sort_keys(_read_tensors(path), OUR_NAMES, 0, str(path)), Naming(MISTRAL, model)
    lost = [
        module.path for module in source.parts if module.path not in naming.sites or module.depth
    ]
    lost += source.whole
    if lost:
        raise RequestError(
            f"{path}: got tensors of {first_names(lost)}; expected modules of this model"
        )
    found: dict[str, ForeignLora] = {}
    for module, part in source.parts.items():
        complete = set(part) == {"A", "B"}
        require(complete, f"{path}: {module.path}", ", ".join(sorted(part)), "expected A and B")
        found[module.path] = ForeignLora(part["A"], part["B"], None, float(scaling), "direct")
    return _all_leaves(naming, found, 0.0, str(path))


def _read_tensors(path: Path) -> dict[str, Tensor]:
    state = read_pickled(path) if path.suffix == ".bin" else read_safetensors(path)
    if not state:
        raise RequestError(f"{path}: no tensors; expected at least one")
    broken = [key for key, tensor in state.items() if not bool(tensor.float().isfinite().all())]
    if broken:
        notice(f"{path}: {len(broken)} tensors hold NaN or infinite numbers, first {broken[0]}")
    return state
