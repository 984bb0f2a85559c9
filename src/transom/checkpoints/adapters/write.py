"""Write adapters in the formats of PEFT and mistral-inference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.files import read_json, write_text
from transom.checkpoints.adapters.foreign_leaves import (
    MISTRAL,
    OWN,
    Naming,
    is_parameter,
    leaf_at,
    leaf_paths,
    namings,
    site_of,
    to_site,
)
from transom.checkpoints.adapters.peft_config import PeftTarget, write_peft
from transom.checkpoints.adapters.read import MISTRAL_SCALING, MISTRAL_WEIGHTS, PREFIX
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from transom.checkpoints.files.safetensors_files import write_tensors
from transom.checkpoints.files.staging import staged
from transom.layers.linear import Embedding
from transom.lora.adapters import adapted_modules, adapter_names
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.tables import KeyMapping
from transom.names.transforms import invert_transform

# In families with fused experts, PEFT takes modules of these names for parts of the experts and
# loses those that are modules still (dense layers, shared experts). Their weights are targeted as
# parameters, under the same keys.
RENAMED = (".gate_proj", ".up_proj", ".down_proj")

Lora = Mapping[str, LoraWeights]


def save_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    format: Literal["peft", "mistral"] = "peft",
    family: str | None = None,
    base: str | None = None,
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

    Raises:
        RequestError: There is no such adapter, or the format cannot hold it.
        WorkError: The files could not be written.
    """
    require(format in ("peft", "mistral"), "format", format, "expected peft or mistral")
    names, here = adapter_names(model), Path(folder)
    require(name in names, "adapter", name, f"expected {', '.join(names) or 'a model with one'}")
    lora: dict[str, LoraWeights] = {}
    whole: dict[str, Tensor] = {}
    for path, _, adapters in adapted_modules(model):
        part = adapters._modules.get(name)
        if isinstance(part, LoraWeights):
            lora[path] = part
        elif isinstance(part, Replacement):
            whole |= {f"{path}.{last}": one.detach() for last, one in part.named_parameters()}
    if format == "mistral":
        tensors = _mistral(Naming(MISTRAL, model), name, lora, whole)
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


def _family_of(base: str | None) -> str | None:
    path = Path(base or "") / CONFIG
    kind = read_json(path).get("model_type") if base and path.exists() else None
    return kind if kind in FAMILIES else None


def _naming(model: LLM, lora: Lora, family: str | None) -> Naming:
    fitting = {naming.family: naming for naming in namings(model)}
    read_with = (part.family for part in lora.values() if part.family not in (None, MISTRAL))
    family = family or next(read_with, None) or next(iter(fitting))
    known = fitting if family in FAMILIES else FAMILIES
    require(family in fitting, "family", family, f"expected for this model: {', '.join(known)}")
    return fitting[family]


def _peft(
    naming: Naming, lora: Lora, whole: Mapping[str, Tensor], base: str | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the config of PEFT's folder."""
    tensors: dict[str, Tensor] = {}
    targets: list[PeftTarget] = []
    left = set(lora)
    for mapping in naming.leaf_mappings:
        paths = set(leaf_paths(mapping))
        if left & paths:
            left -= paths
            targets += _low_rank(naming, mapping, lora, tensors)
    if left:
        raise RequestError(
            f"{min(left)}: {naming.family} has no name for this weight; expected another family"
        )
    saved = _whole(naming, whole)
    sites = {site_of(target.path) for target in targets}
    twice = next((key for key in saved if in_memory(naming, site_of(key)) in sites), None)
    if twice is not None:
        raise RequestError(
            f"{site_of(twice)} of {naming.family}: got an adapter and a weight of its own; "
            "expected one for everything in it"
        )
    modules = {in_memory(naming, key).rpartition(".")[0] for key in saved}
    fields: dict[str, Any] = {}
    if naming.model.args.tie_embeddings and "tok_embeddings.weight" in whole:
        # PEFT writes the tied output, too.
        rows = naming.names.patterns
        output = [row.foreign for row in rows if row.ours == ("output.weight",)]
        saved |= dict.fromkeys(output, whole["tok_embeddings.weight"])
        fields["ensure_weight_tying"] = True
    tensors |= {f"{PREFIX}{in_memory(naming, key)}": tensor for key, tensor in saved.items()}
    parameters = [target.path for target in targets if target.is_parameter]
    dropout = max((part.dropout for part in lora.values()), default=0.0)
    if parameters and dropout > 0:
        notice(f"dropout {dropout:g} is not written: PEFT has none on parameters ({parameters[0]})")
        dropout = 0.0
    # In a model with further towers, the name of a module could mean one there.
    known = () if naming.names.aliases else naming.sites
    rslora, dora = _kind(lora, parameters)
    config = write_peft(
        targets,
        known,
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


def _low_rank(
    naming: Naming, mapping: KeyMapping, lora: Lora, tensors: dict[str, Tensor]
) -> list[PeftTarget]:
    """Add the tensors of one mapping to `tensors`; return its modules or parameters."""
    leaf = leaf_at(naming.model, leaf_paths(mapping)[0])
    parameter, targets = is_parameter(mapping), []
    inner, last = ("embedding_", "") if isinstance(leaf, Embedding) else ("", ".weight")
    for key, stored in zip(mapping.foreign, to_site(naming, mapping, lora), strict=True):
        site = site_of(key)
        rank = stored.A.size(-2) // (leaf.weight.size(0) if parameter else 1)
        alpha = stored.alpha * rank if stored.scaling == "direct" else stored.alpha
        renamed = naming.names.fused_experts and site.endswith(RENAMED) and not parameter
        path = in_memory(naming, f"{site}.weight" if renamed else site)
        targets.append(PeftTarget(path, rank, alpha, renamed or parameter))
        where = f"{PREFIX}{in_memory(naming, _wrapped(site, naming, lora) if parameter else site)}"
        tensors[f"{where}.lora_{inner}A{last}"] = stored.A
        tensors[f"{where}.lora_{inner}B{last}"] = stored.B
        if stored.magnitude is not None:
            tensors[f"{where}.lora_magnitude_vector"] = stored.magnitude
    return targets


def _kind(lora: Lora, parameters: list[str]) -> tuple[bool, bool]:
    """Return whether the adapter is rsLoRA and whether it is DoRA; PEFT has one kind for all."""
    kinds = {(part.scaling == "rslora", part.magnitude is not None) for part in lora.values()}
    if len(kinds) > 1:
        raise RequestError("adapter: got plain LoRA mixed with rsLoRA or DoRA; expected one kind")
    rslora, dora = next(iter(kinds), (False, False))
    if dora and parameters:
        raise RequestError(f"DoRA on {parameters[0]}: PEFT has none on parameters; expected LoRA")
    return rslora, dora


def in_memory(naming: Naming, path: str) -> str:
    """Return a path as transformers 5 has it in memory, where some families have another prefix."""
    aliases = naming.names.aliases
    alias, prefix = next((pair for pair in aliases if path.startswith(pair[1])), ("", ""))
    return alias + path[len(prefix) :]


def _wrapped(site: str, naming: Naming, lora: Lora) -> str:
    """Return the path of a parameter's adapter, one of the wrappers of its module."""
    module = site.rpartition(".")[0]
    siblings = [
        name
        for name in naming.parameters_of(module)
        if any(path in lora for path in leaf_paths(naming.sites[name]))
    ]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(site))


def _whole(naming: Naming, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return replaced parameters under foreign keys, with all others of their modules.

    PEFT saves whole modules.
    """
    named = {name for mapping in naming.mappings for name in mapping.ours}
    lost = sorted(whole.keys() - named)
    if lost:
        raise RequestError(
            f"{lost[0]}: {naming.family} has no name for this parameter; expected another family"
        )
    out: dict[str, Tensor] = {}
    left = set(whole)
    for mapping in naming.mappings:
        if left & set(mapping.ours):
            left -= set(mapping.ours)
            out |= _foreign(naming, mapping, whole)
    modules = {key.rpartition(".")[0] for key in out}
    for mapping in naming.mappings:
        if any(key not in out and key.rpartition(".")[0] in modules for key in mapping.foreign):
            made = _foreign(naming, mapping, whole).items()
            out |= {k: t for k, t in made if k not in out and k.rpartition(".")[0] in modules}
    return out


def _foreign(naming: Naming, mapping: KeyMapping, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a mapping under foreign keys: those of `whole`, or else the model's."""
    rows = []
    for name in mapping.ours:
        tensor = whole[name] if name in whole else naming.model.get_parameter(name).detach()
        rows.append(naming.reordered(name.rpartition(".")[0], tensor, to_ours=False))
    return dict(zip(mapping.foreign, invert_transform(mapping.transform, rows), strict=True))


def _mistral(
    naming: Naming, name: str, lora: Lora, whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of `lora.safetensors`, with rotary rows interleaved."""
    plain = not whole and all(part.magnitude is None for part in lora.values())
    require(plain, "adapter", name, "it has DoRA or whole modules; expected format peft")
    out: dict[str, Tensor] = {}
    done: set[str] = set()
    # The names of mistral-inference come after ours, and are preferred.
    for mapping in reversed(naming.leaf_mappings):
        path = leaf_paths(mapping)[0]
        if len(mapping.ours) > 1 or is_parameter(mapping) or path not in lora or path in done:
            continue
        done.add(path)
        for key, stored in zip(mapping.foreign, to_site(naming, mapping, lora), strict=True):
            out[f"{site_of(key)}.lora_A.weight"] = stored.A
            out[f"{site_of(key)}.lora_B.weight"] = stored.B * (lora[path].scale / MISTRAL_SCALING)
    notice(f"{MISTRAL_WEIGHTS}: written for a scaling of {MISTRAL_SCALING}")
    return out
