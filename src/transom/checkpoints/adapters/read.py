"""Adapters from files: PEFT's folders, and `lora.safetensors` of mistral-finetune."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from transom.base.errors import RequestError, notice
from transom.base.files import read_json, refuse_pointer
from transom.checkpoints.adapters.foreign_leaves import (
    MISTRAL,
    Table,
    Tensors,
    candidates,
    is_parameter,
    table_of,
    to_leaves,
    turned,
)
from transom.checkpoints.adapters.peft_config import PeftConfig, read_peft
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.families.weights import OUR_NAMES
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transom.lora.adapters import activate_adapters, attach, train_adapters
from transom.lora.vocabulary import resize_vocabulary
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.transforms import apply_transform

PICKLED = "adapter_model.bin"
MISTRAL_WEIGHTS, MISTRAL_CONFIG = "lora.safetensors", "params.json"
MISTRAL_SCALING = 2.0  # what mistral-inference's `load_lora` multiplies by unless told otherwise
_OUTPUTS, _EMBEDDINGS = (
    ("lm_head.weight", "output.weight"),
    ("embed_tokens.weight", "tok_embeddings.weight"),
)
_PART = re.compile(r"(?P<path>.+)\.lora_(embedding_)?(?P<which>A|B|magnitude_vector)(\.weight)?")


class Spot(NamedTuple):
    """Where part of an adapter stands: its module's path, as the table and as the file have it, and
    how deep in wrappers (`.base_layer`).
    """

    path: str
    named: str
    depth: int


@dataclass
class Source:
    """An adapter's files: low-rank parts by where they stand, whole parameters by key, reasons to
    leave others.
    """

    where: str
    parts: dict[Spot, dict[str, Tensor]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)
    unread: dict[str, int] = field(default_factory=dict)


def load_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    scaling: float | None = None,
) -> LLM:
    """The adapter of a folder on `model`, in place, as the only active one; returns the model.

    Reads PEFT's LoRA folders and Mistral's `lora.safetensors`, whose `scaling` is that of
    `params.json` beside it unless given. A vocabulary grows to that of an adapter with new tokens.
    A key that finds no place, or a feature that is not supported, is a `RequestError`, and the
    model stays as it was. `trainable` freezes all else.
    """
    here = Path(folder)
    if (here / ADAPTER_CONFIG).exists():
        if scaling is not None:
            raise RequestError(
                f"scaling: got {scaling!r}; {here / ADAPTER_CONFIG} says it; expected none"
            )
        parts = _peft_parts(model, here)
    elif (here / MISTRAL_WEIGHTS).exists():
        parts = _mistral_parts(model, here, scaling)
    else:
        raise RequestError(
            f"{here}: no {ADAPTER_CONFIG} and no {MISTRAL_WEIGHTS}; expected an adapter folder"
        )
    attach(model, name, parts)
    activate_adapters(model, (name,))
    if trainable:
        train_adapters(model, (name,))
    else:
        for parameter in _parameters(parts):
            parameter.requires_grad_(False)
    return model


def _parameters(parts: Mapping[str, nn.Module]) -> list[nn.Parameter]:
    return [parameter for part in parts.values() for parameter in part.parameters()]


def _peft_parts(model: LLM, folder: Path) -> dict[str, LoraWeights | Replacement]:
    config = read_peft(read_json(folder / ADAPTER_CONFIG), str(folder / ADAPTER_CONFIG))
    present = [
        name for name in (ADAPTER_WEIGHTS, PICKLED, MISTRAL_WEIGHTS) if (folder / name).exists()
    ]
    path = folder / (PICKLED if present[:1] == [PICKLED] else ADAPTER_WEIGHTS)
    ignored = [name for name in present if name != path.name]
    if ignored:
        notice(f"{folder}: the adapter is read from {path.name}; ignored: {', '.join(ignored)}")
    state = _tensors(path)
    fewest: list[str] = []
    for table in candidates(model):
        source = sort_keys(state, table.family, str(path), model.args.n_layers)
        sites = sites_of(table, source, config)
        lost = [held.path for held in source.parts if held not in sites]
        lost += [key for key in source.whole if not _has_place(table, key, model)]
        if not lost:
            return _of_table(model, table, source, sites, config)
        fewest = lost if not fewest or len(lost) < len(fewest) else fewest
    more = f" ({len(fewest)} such keys)" if len(fewest) > 1 else ""
    raise RequestError(
        f"{path}: {fewest[0]} is nothing in this model that can carry an adapter{more}"
    )


def sort_keys(state: Mapping[str, Tensor], family: str, where: str, layers: int = 0) -> Source:
    """The keys of an adapter file, without what PEFT puts around a module's path."""
    out = Source(where)
    names = WEIGHT_NAMES.get(family, OUR_NAMES)
    for full, tensor in state.items():
        key = names.known_key(full.removeprefix("base_model.model."))
        reason = names.unread_reason(key, layers)
        if reason is not None:
            out.unread[reason] = out.unread.get(reason, 0) + 1
            continue
        if key.endswith(".lora_B.bias"):
            raise RequestError(
                f"{where}: {full}: biases of LoRA (lora_bias) are not supported; expected none"
            )
        match = _PART.fullmatch(key)
        if match is None:
            if ".lora_" in key:
                raise RequestError(
                    f"{where}: {full} is no part of LoRA that is known here; expected A, B "
                    f"and DoRA's"
                )
            out.whole[key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = tensor
            continue
        path, named = (text.replace(".base_layer", "") for text in (match["path"], full))
        named = named.removeprefix("base_model.model.").partition(".lora_")[0]
        spot = Spot(path, named, match["path"].count(".base_layer"))
        out.parts.setdefault(spot, {})[match["which"]] = tensor
    return out


def sites_of(table: Table, source: Source, config: PeftConfig) -> dict[Spot, str]:
    """The site of every low-rank part; of several parameters of one module, the first stands
    innermost.
    """
    known = table.sites
    out: dict[Spot, str] = {}
    for held in source.parts:
        if held.path in known and held.depth == 0:
            out[held] = held.path
            continue
        wrapped = [
            name
            for name, move in known.items()
            if is_parameter(move)
            and name.rpartition(".")[0] == held.path
            and _targets(config, name)
        ]
        if held.depth < len(wrapped):
            out[held] = wrapped[-1 - held.depth]
    return out


def _targets(config: PeftConfig, name: str) -> bool:
    """Whether `target_parameters` means this parameter."""
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters)


def _of_table(
    model: LLM, table: Table, source: Source, sites: Mapping[Spot, str], config: PeftConfig
) -> dict[str, LoraWeights | Replacement]:
    for reason, count in source.unread.items():
        notice(f"{source.where}: {count} tensors left unread: {reason}")
    found: dict[str, Tensors] = {}
    for held, part in source.parts.items():
        found[sites[held]] = _stored(source.where, table, held, sites[held], part, config)
    out: dict[str, LoraWeights | Replacement] = {}
    for move in dict.fromkeys(table.sites[name] for name in found):
        made = to_leaves(table, move, found, model, config.dropout, source.where)
        twice = next((path for path in made if path in out), None)
        if twice is not None:
            raise RequestError(f"{source.where}: {twice} gets two adapters; expected one")
        out.update(made)
    _grow_vocabulary(model, table, source)
    return {**out, **_replacements(model, table, source, config, out)}


def _grow_vocabulary(model: LLM, table: Table, source: Source) -> None:
    """Rows for the tokens that the adapter's embeddings have beyond the model's own."""
    key = next(move.foreign[0] for move in table.whole if move.ours == ("tok_embeddings.weight",))
    rows = source.whole[key].size(0) if key in source.whole else 0
    if rows > model.args.vocab_size:
        notice(
            f"{source.where}: its vocabulary has {rows - model.args.vocab_size} tokens more than "
            f"the base's"
        )
        resize_vocabulary(model, rows)


def _stored(
    where: str, table: Table, spot: Spot, at: str, part: Mapping[str, Tensor], config: PeftConfig
) -> Tensors:
    if not {"A", "B"} <= set(part) or config.dora != ("magnitude_vector" in part):
        raise RequestError(
            f"{where}: {at} has {', '.join(sorted(part))}; expected A and B, and a "
            f"magnitude_vector where use_dora is true"
        )
    move = table.sites[at]
    key = f"{spot.named}.{at.rpartition('.')[2]}" if is_parameter(move) else spot.named
    key += ".weight" if _targets(config, f"{key}.weight") else ""
    rank, rows = config.rank_of(key), part["A"].size(-2)
    groups = part["B"].size(1) // rank if is_parameter(move) and rank > 0 else 1
    if rows != rank * groups:
        raise RequestError(
            f"{where}: {at} has rank {rows // max(groups, 1)}, but its config says {rank}"
        )
    return Tensors(
        part["A"], part["B"], part.get("magnitude_vector"), config.alpha_of(key), config.scaling
    )


def _has_place(table: Table, key: str, model: LLM) -> bool:
    return any(key in move.foreign for move in table.whole) or (
        model.args.tie_embeddings and key.endswith(_OUTPUTS)
    )


def _replacements(
    model: LLM, table: Table, source: Source, config: PeftConfig, parts: Mapping[str, object]
) -> dict[str, Replacement]:
    """`modules_to_save`: whole parameters by module; those equal to the model's own need none."""
    whole = _untied(model, dict(source.whole), config, source.where)
    by_module: dict[str, dict[str, Tensor]] = {}
    for move in table.whole:
        given = [whole.pop(key) for key in move.foreign if key in whole]
        if not given:
            continue
        own = [model.get_parameter(name) for name in move.ours]
        try:
            made = (
                apply_transform(move.transform, given, [parameter.shape for parameter in own])
                if _all(move, given)
                else []
            )
        except (RuntimeError, ValueError, IndexError):
            made = []
        if [tuple(t.shape) for t in made] != [tuple(p.shape) for p in own]:
            shapes = ", ".join(str(tuple(t.shape)) for t in given)
            raise RequestError(
                f"{source.where}: {move.foreign[0]} has shape {shapes}, the model "
                f"{tuple(own[0].shape)}; expected "
                "an adapter of this model, with a vocabulary of the same size"
            )
        for name, tensor, parameter in zip(move.ours, made, own, strict=True):
            path, _, last = name.rpartition(".")
            fitting = turned(path, tensor, model.args, table.layout, model.args.rope_layout)
            value = fitting.to(parameter.device, parameter.dtype, copy=True).contiguous()
            if torch.equal(value, parameter):
                continue  # PEFT stores embeddings that carry an adapter beside it
            if path in parts:
                raise RequestError(
                    f"{source.where}: {path} has an adapter and a {last} of its own; expected one "
                    "of them"
                )
            by_module.setdefault(path, {})[last] = value
    return {path: Replacement(tensors) for path, tensors in by_module.items()}


def _all(move: Any, given: list[Tensor]) -> bool:
    return len(given) == len(move.foreign)


def _untied(
    model: LLM, whole: dict[str, Tensor], config: PeftConfig, where: str
) -> dict[str, Tensor]:
    """Without the output of a model that ties it: both must be the same, or PEFT's model is not
    this one.
    """
    if not model.args.tie_embeddings:
        return whole
    head = next((key for key in whole if key.endswith(_OUTPUTS)), None)
    embeddings = next((key for key in whole if key.endswith(_EMBEDDINGS)), None)
    if head is None and embeddings is None:
        return whole
    if head is not None and embeddings is not None and torch.equal(whole[head], whole[embeddings]):
        del whole[head]
    elif head is not None or not config.ensure_weight_tying:
        own = model.tok_embeddings.weight
        alone = whole[str(head or embeddings)]
        if alone.shape != own.shape or not torch.equal(alone.to(own), own):
            raise RequestError(
                f"{where}: {head or embeddings} is saved apart, but this model's output is its "
                f"embeddings (tie_word_embeddings); expected the same for both"
            )
        if head is not None:
            del whole[head]
    return whole


def _mistral_parts(
    model: LLM, folder: Path, scaling: float | None
) -> dict[str, LoraWeights | Replacement]:
    path = folder / MISTRAL_WEIGHTS
    if scaling is None:
        stored = (
            read_json(folder / MISTRAL_CONFIG).get("lora")
            if (folder / MISTRAL_CONFIG).exists()
            else None
        )
        scaling = stored.get("scaling") if isinstance(stored, dict) else None
        if scaling is None:
            scaling = MISTRAL_SCALING
            notice(
                f"{path}: no {MISTRAL_CONFIG} says the scaling; taken is {scaling}, as "
                f"mistral-inference does"
            )
    if not isinstance(scaling, (int, float)) or isinstance(scaling, bool):
        raise RequestError(
            f"{folder / MISTRAL_CONFIG}: lora.scaling: got {scaling!r}; expected a number"
        )
    source = sort_keys(_tensors(path), "", str(path))
    table = table_of(MISTRAL, model)
    lost = [*(h.path for h in source.parts if h.path not in table.sites or h.depth), *source.whole]
    if lost:
        raise RequestError(
            f"{path}: {lost[0]} is no weight that can carry an adapter in this model"
        )
    found: dict[str, Tensors] = {}
    for held, part in source.parts.items():
        if set(part) != {"A", "B"}:
            raise RequestError(
                f"{path}: {held.path} has {', '.join(sorted(part))}; expected A and B"
            )
        found[held.path] = Tensors(part["A"], part["B"], None, float(scaling), "direct")
    out: dict[str, LoraWeights | Replacement] = {}
    for move in dict.fromkeys(table.sites[name] for name in found):
        out.update(to_leaves(table, move, found, model, 0.0, str(path)))
    return out


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".bin":
            state = torch.load(path, map_location="cpu", weights_only=True)
        else:
            state = load_file(path)
    except FileNotFoundError:
        raise RequestError(f"{path}: no such file") from None
    except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
        refuse_pointer(path)
        raise RequestError(
            f"{path}: not a whole file of tensors ({str(error).splitlines()[0]})"
        ) from None
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RequestError(f"{path}: expected a file of tensors by name, with at least one")
    broken = [key for key, tensor in state.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        notice(f"{path}: {len(broken)} tensors hold numbers that are not finite, {broken[0]} first")
    return dict(state)
