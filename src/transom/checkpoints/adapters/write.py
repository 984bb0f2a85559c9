"""Write adapters in the formats of PEFT and mistral-inference."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect, notice, require
from transom.base.files import read_json, write_text
from transom.checkpoints.adapters.foreign_leaves import (
    MISTRAL,
    OWN,
    PREFIX,
    Naming,
    experts_to_peft,
    is_parameter,
    leaf_paths,
    namings,
    site_of,
)
from transom.checkpoints.adapters.peft_config import PeftTarget, write_peft
from transom.checkpoints.adapters.read import MISTRAL_SCALING, MISTRAL_WEIGHTS
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from transom.checkpoints.files.lazy_tensors import LazyTensor, LazyTensors
from transom.checkpoints.files.safetensors_files import write_tensors
from transom.checkpoints.files.staging import staged
from transom.checkpoints.mapping import to_foreign
from transom.layers.linear import Embedding
from transom.lora.adapters import adapted_modules, adapter_names
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.tables import KeyMapping

# In families with fused experts, PEFT takes modules of these names for parts of the experts and
# loses those that are modules still (dense layers, shared experts). Their weights are targeted as
# parameters, under the same keys.
RENAMED = (".gate_proj", ".up_proj", ".down_proj")

Lora = Mapping[str, LoraWeights]
Tensors = dict[str, Tensor]


def save_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    format: Literal["peft", "mistral"] = "peft",
    family: str | None = None,
    base: str | None = None,
    weights: LazyTensors | None = None,
) -> None:
    """Write one adapter of a model, merged or not, active or not.

    Args:
        model: The model that has the adapter.
        folder: The folder to write, which may exist.
        name: The name of the adapter on the model.
        format: `peft`, or `mistral` for `lora.safetensors`. That file has no place for a scaling
            and is written for 2.0, the default of mistral-inference.
        family: The model_type whose module names PEFT finds. None takes the family that the adapter
            was read with, or that of `base`, or the first one that can express the model. If none
            can, the file has Transom's own names, with a notice.
        base: The base's folder or hub id, stored as `base_model_name_or_path`.
        weights: The weights of the adapter by their names in the model; None takes those there.

    Raises:
        RequestError: There is no such adapter, or the format cannot hold it.
        WorkError: The files could not be written.
    """
    expect(format in ("peft", "mistral"), "format", format, "peft or mistral")
    names, here = adapter_names(model), Path(folder)
    expect(name in names, "adapter", name, ", ".join(names) or "a model with one")
    lora: dict[str, LoraWeights] = {}
    whole: Tensors = {}
    for path, _, adapters in adapted_modules(model):
        part = adapters._modules.get(name)
        if weights is not None and part is not None:
            # The parameters of an active replacement have the names of those that they replace.
            place = path if isinstance(part, Replacement) else f"{path}.lora.{name}"
            part = _with_weights(part, place, weights)
        if isinstance(part, LoraWeights):
            lora[path] = part
        elif isinstance(part, Replacement):
            whole |= {f"{path}.{last}": one.detach() for last, one in part.named_parameters()}
    if format == "mistral":
        plain = not whole and all(part.magnitude is None for part in lora.values())
        require(plain, "adapter", name, "it has DoRA or `modules_to_save`; expected format peft")
        tensors = _mistral(Naming(MISTRAL, model), lora)
        with staged(here, (ADAPTER_CONFIG,), ()) as out:
            write_tensors(out / MISTRAL_WEIGHTS, tensors)
        return
    naming = _naming(model, lora, family or _family_of(base))
    if naming.family == OWN:
        notice(
            f"{folder}: {ADAPTER_WEIGHTS} has Transom's own names, since PEFT finds no model of "
            "transformers for it"
        )
    tensors, config = _peft(naming, lora, whole, base)
    with staged(here, (ADAPTER_CONFIG,), ()) as out:
        write_tensors(out / ADAPTER_WEIGHTS, tensors)
        write_text(out / ADAPTER_CONFIG, json.dumps(config, indent=2))


def _with_weights(part: nn.Module, path: str, weights: LazyTensors) -> nn.Module:
    """Return a copy of a module without children that has the weights below `path`."""
    made = copy.copy(part)
    for key in part._parameters:  # what tensor ranks show while the module runs
        vars(made).pop(key, None)
    made._parameters = {
        key: None if own is None else nn.Parameter(weights[f"{path}.{key}"].read())
        for key, own in part._parameters.items()
    }
    return made


def _family_of(base: str | None) -> str | None:
    path = Path(base or "") / CONFIG
    kind = read_json(path).get("model_type") if base and path.exists() else None
    return kind if kind in FAMILIES else None


def _naming(model: LLM, lora: Lora, family: str | None) -> Naming:
    fitting = {naming.family: naming for naming in namings(model)}
    read_with = (part.family for part in lora.values() if part.family not in (None, MISTRAL))
    family = family or next(read_with, None) or next(iter(fitting))
    known = fitting if family in FAMILIES else FAMILIES
    expect(family in fitting, "family", family, f"for this model: {', '.join(known)}")
    return fitting[family]


def _peft(
    naming: Naming, lora: Lora, whole: Mapping[str, Tensor], base: str | None
) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the config of PEFT's folder."""
    kinds = {(part.scaling == "rslora", part.magnitude is not None) for part in lora.values()}
    if len(kinds) > 1:
        raise RequestError("adapter: got plain LoRA mixed with rsLoRA or DoRA; expected one kind")
    rslora, dora = next(iter(kinds), (False, False))
    tensors, targets = _low_rank(naming, lora, dora)
    parameters = [target.path for target in targets if target.is_parameter]
    if dora and parameters:
        raise RequestError(f"DoRA on {parameters[0]}: PEFT has none on parameters; expected LoRA")
    saved, in_memory = _whole(naming, whole), naming.names.in_memory
    sites = {site_of(target.path) for target in targets}
    twice = next((key for key in saved if in_memory(site_of(key)) in sites), None)
    if twice is not None:
        raise RequestError(
            f"{site_of(twice)} of {naming.family}: got an adapter and a weight of its own; "
            "expected one for everything in it"
        )
    modules = {in_memory(key).rpartition(".")[0] for key in saved}
    fields: dict[str, Any] = {}
    if naming.model.args.tie_embeddings and "tok_embeddings.weight" in whole:
        # PEFT writes the tied output, too.
        saved[naming.names.key_of("output.weight")] = whole["tok_embeddings.weight"]
        fields["ensure_weight_tying"] = True
    tensors |= {f"{PREFIX}{in_memory(key)}": tensor for key, tensor in saved.items()}
    dropout = max((part.dropout for part in lora.values()), default=0.0)
    if parameters and dropout > 0:
        notice(f"dropout {dropout:g} is not written: PEFT has none on parameters ({parameters[0]})")
        dropout = 0.0
    config = write_peft(
        targets,
        # In a model with further towers, the name of a module could mean one there.
        () if naming.names.aliases else naming.sites,
        base_model_name_or_path=base,
        use_rslora=rslora,
        use_dora=dora,
        lora_dropout=dropout,
        modules_to_save=sorted(modules) or None,
        # A task type makes PEFT ask the model for methods of transformers.
        task_type=None if naming.family == OWN else "CAUSAL_LM",
        **fields,
    )
    return tensors, config


def _low_rank(naming: Naming, lora: Lora, dora: bool) -> tuple[Tensors, list[PeftTarget]]:
    """Return the low-rank tensors of a PEFT file, and the modules and parameters they are on."""
    adapted = [s for s, weight in naming.sites.items() if lora.keys() & set(leaf_paths(weight))]
    paths, in_memory = naming.paths(adapted), naming.names.in_memory
    tensors: Tensors = {}
    targets: list[PeftTarget] = []
    for weight in naming.to_write([f"{path}.weight" for path in lora]):
        ours, rank, alpha = joined(naming, weight, lora)
        made, parameter = (
            _foreign(naming, naming.rows(weight, paths, dora), ours),
            is_parameter(weight),
        )
        if parameter:
            made = dict(zip(made, experts_to_peft(naming, *made.values()), strict=False))
        embedding = isinstance(naming.leaves[leaf_paths(weight)[0]], Embedding)
        inner, last = ("embedding_", "") if embedding else ("", ".weight")
        for key, tensor in made.items():
            site, _, part = in_memory(key).rpartition(".lora_")
            name = part if part == "magnitude_vector" else f"{inner}{part}{last}"
            tensors[f"{PREFIX}{site}.lora_{name}"] = tensor
        for key in weight.foreign:
            site = site_of(key)
            renamed = naming.names.fused_experts and site.endswith(RENAMED) and not parameter
            path = in_memory(key if renamed else site)
            targets.append(PeftTarget(path, rank, alpha, renamed or parameter))
    return tensors, targets


def joined(naming: Naming, weight: KeyMapping, lora: Lora) -> tuple[Tensors, int, float]:
    """Return the adapters of the leaves of one foreign weight as one, its rank and PEFT's alpha.

    Leaves that share A keep their rank. Otherwise the rank is the sum of theirs: the A are stacked,
    each B has columns of its own, and a leaf without an adapter has zeros.

    Raises:
        RequestError: DoRA is on a part of a fused weight.
    """
    paths = leaf_paths(weight)
    here = {path: lora[path] for path in paths if path in lora}
    first = next(iter(here.values()))
    shared = len(here) == len(paths) and all(
        torch.equal(one.A, first.A) and one.scale == first.scale for one in here.values()
    )
    out = {f"{paths[0]}.A": first.A if shared else torch.cat([one.A for one in here.values()], -2)}
    for path in paths:
        rows = naming.leaves[path].weight.shape[:-1]
        columns = [
            part.B * (part.scale / first.scale)
            if own == path
            else part.B.new_zeros(*rows, part.rank)
            for own, part in here.items()
        ]
        out[f"{path}.B"] = lora[path].B if shared else torch.cat(columns, -1)
    lengths = {path: part.magnitude for path, part in here.items() if part.magnitude is not None}
    if lengths and len(lengths) < len(paths):
        raise RequestError(
            f"DoRA on {', '.join(here)}: {site_of(weight.foreign[0])} of {naming.family} cannot "
            "hold it; expected LoRA there, or DoRA on all of its parts"
        )
    out |= {f"{path}.magnitude": length for path, length in lengths.items()}
    rank = out[f"{paths[0]}.A"].size(-2)
    growth = rank / first.rank
    factors = {"alpha_over_rank": growth, "rslora": growth**0.5, "direct": rank}
    return (
        {name: one.detach() for name, one in out.items()},
        rank,
        first.alpha * factors[first.scaling],
    )


def _foreign(naming: Naming, rows: list[KeyMapping], ours: Mapping[str, Tensor]) -> Tensors:
    """Return tensors under the keys of files, in the layout of the family."""
    lazy = {
        name: LazyTensor.of(naming.reordered(name, tensor, to_ours=False))
        for name, tensor in ours.items()
    }
    groups = to_foreign(rows, lazy, naming.family)
    return {key: one for group in groups for key, one in zip(group.keys, group.read(), strict=True)}


def _whole(naming: Naming, whole: Mapping[str, Tensor]) -> Tensors:
    """Return replaced parameters under foreign keys, with all others of their modules.

    PEFT saves whole modules.
    """
    replaced = naming.to_write(whole)
    modules = {key.rpartition(".")[0] for mapping in replaced for key in mapping.foreign}
    out: Tensors = {}
    for mapping in naming.written:
        if any(key.rpartition(".")[0] in modules for key in mapping.foreign):
            own = {name: naming.model.get_parameter(name).detach() for name in mapping.ours}
            stored = {name: whole.get(name, tensor) for name, tensor in own.items()}
            out |= _foreign(naming, [mapping], stored)
    return {key: tensor for key, tensor in out.items() if key.rpartition(".")[0] in modules}


def _mistral(naming: Naming, lora: Lora) -> Tensors:
    """Return the tensors of `lora.safetensors`, with rotary rows interleaved."""
    out: Tensors = {}
    for weight in naming.to_write([f"{path}.weight" for path in lora]):
        ours, _, _ = joined(naming, weight, lora)
        path, paths = leaf_paths(weight)[0], {site_of(key): site_of(key) for key in weight.foreign}
        ours[f"{path}.B"] = ours[f"{path}.B"] * (lora[path].scale / MISTRAL_SCALING)
        made = _foreign(naming, naming.rows(weight, paths, dora=False), ours)
        out |= {f"{key}.weight": tensor for key, tensor in made.items()}
    notice(f"{MISTRAL_WEIGHTS}: written for a scaling of {MISTRAL_SCALING}")
    return out
