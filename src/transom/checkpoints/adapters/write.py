"""Adapters to files that PEFT and mistral-inference read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from transom.base.errors import RequestError, WorkError, notice
from transom.base.files import read_json
from transom.base.locks import FolderLock
from transom.checkpoints.adapters.foreign_leaves import (
    MISTRAL,
    OWN,
    Table,
    candidates,
    is_parameter,
    site,
    table_of,
    to_site,
    turned,
)
from transom.checkpoints.adapters.peft_config import write_peft
from transom.checkpoints.adapters.read import MISTRAL_SCALING, MISTRAL_WEIGHTS
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.files.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from transom.layers.linear import Embedding, GroupedLinear
from transom.lora.adapters import adapted_modules, adapter_names
from transom.lora.weights import LoraWeights, Replacement
from transom.models.llm import LLM
from transom.names.tables import KeyMapping
from transom.names.transforms import invert_transform

# Where experts are held in two parameters, PEFT takes modules of these names for parts of them and
# loses those that are modules still (dense layers, shared experts): their weights are targeted as
# parameters, under the same keys.
RENAMED = (".gate_proj", ".up_proj", ".down_proj")


def save_adapter(
    model: LLM,
    folder: str | Path,
    name: str = "default",
    *,
    format: Literal["peft", "mistral"] = "peft",
    family: str | None = None,
    base: str | None = None,
) -> None:
    """Write one adapter into `folder`, merged or not, active or not.

    `family` is the model_type whose module names PEFT is to find: the one it was read with, else
    the first that holds this model's weights, else `transom`, our own names, which is said. `base`
    is stored as base_model_name_or_path. Mistral's file has no place for a scaling and is written
    for the 2.0 that mistral-inference multiplies by.
    """
    lora, whole = _held(model, name)
    if format == "mistral":
        _write(Path(folder), {MISTRAL_WEIGHTS: _mistral(model, name, lora, whole)}, None)
        return
    if format != "peft":
        raise RequestError(f"format: got {format!r}; expected peft or mistral")
    table = _table_for(model, lora, family or _family_of(base))
    if table.family == OWN:
        notice(
            f"{folder}: {ADAPTER_WEIGHTS} has Transom's own names: transformers has no such model "
            "for "
            f"PEFT to put it on"
        )
    tensors, config = _peft(model, table, lora, whole, base)
    _write(Path(folder), {ADAPTER_WEIGHTS: tensors}, config)


def _held(model: LLM, name: str) -> tuple[dict[str, LoraWeights], dict[str, dict[str, Tensor]]]:
    """The low-rank parts of an adapter by leaf, and its replacements by module."""
    if name not in adapter_names(model):
        raise RequestError(
            f"adapter {name!r}: expected {', '.join(adapter_names(model)) or 'nothing'}"
        )
    lora: dict[str, LoraWeights] = {}
    whole: dict[str, dict[str, Tensor]] = {}
    for path, _, held in adapted_modules(model):
        part = held._modules.get(name)
        if isinstance(part, LoraWeights):
            lora[path] = part
        elif isinstance(part, Replacement):
            whole[path] = {key: parameter.detach() for key, parameter in part.named_parameters()}
    return lora, whole


def _family_of(base: str | None) -> str | None:
    """The model_type of the base, where it is a folder of transformers."""
    path = Path(base or "") / "config.json"
    kind = read_json(path).get("model_type") if base and path.exists() else None
    return kind if kind in FAMILIES else None


def _table_for(model: LLM, lora: Mapping[str, LoraWeights], family: str | None) -> Table:
    """The table of the family asked for, of the one the adapter came from, or the first that
    fits.
    """
    if family is None:
        came = next(
            (part.family for part in lora.values() if part.family not in (None, MISTRAL)), None
        )
        if came is not None:
            return table_of(came, model)
        return candidates(model)[0]
    fitting = {table.family: table for table in candidates(model)}
    if family not in fitting:
        known = fitting if family in FAMILIES else FAMILIES
        raise RequestError(
            f"family: got {family!r}; valid only for this model is {', '.join(known)}"
        )
    return fitting[family]


def _peft(
    model: LLM,
    table: Table,
    lora: dict[str, LoraWeights],
    whole: dict[str, dict[str, Tensor]],
    base: str | None,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config of PEFT's folder."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    parameters: list[str] = []
    done: set[str] = set()
    for move in table.moves:
        paths = [name.removesuffix(".weight") for name in move.ours]
        if not any(path in lora and path not in done for path in paths):
            continue
        embedding = isinstance(model.get_submodule(paths[0]), Embedding)
        for key, stored in zip(move.foreign, to_site(table, move, lora, model), strict=True):
            at = site(key)
            rank = stored.A.size(-2) // (_groups(model, paths[0]) if is_parameter(move) else 1)
            renamed = table.names.fused_experts and at.endswith(RENAMED) and not is_parameter(move)
            target = spoken(table, f"{at}.weight" if renamed else at)
            ranks[target] = rank
            alphas[target] = stored.alpha * rank if stored.scaling == "direct" else stored.alpha
            parameters += [target] if renamed or is_parameter(move) else []
            leaf = _wrapped(at, table, lora) if is_parameter(move) else at
            where = f"base_model.model.{spoken(table, leaf)}"
            inner, last = ("embedding_", "") if embedding else ("", ".weight")
            tensors[f"{where}.lora_{inner}A{last}"] = stored.A
            tensors[f"{where}.lora_{inner}B{last}"] = stored.B
            if stored.magnitude is not None:
                tensors[f"{where}.lora_magnitude_vector"] = stored.magnitude
        done.update(paths)
    lost = sorted(set(lora) - done)
    if lost:
        raise RequestError(
            f"{lost[0]}: {table.family} has no name for this weight; expected another family"
        )
    saved = _whole(model, table, whole)
    targets = {site(target) for target in ranks}
    twice = next((key for key in saved if spoken(table, site(key)) in targets), None)
    if twice is not None:
        raise RequestError(
            f"{site(twice)} of {table.family} gets an adapter and a weight of its own; expected "
            f"one, for all of what it holds"
        )
    modules = sorted({spoken(table, key).rpartition(".")[0] for key in saved})
    tied = model.args.tie_embeddings and "tok_embeddings" in whole
    if tied:
        saved |= _tied_output(table, whole["tok_embeddings"]["weight"])
    tensors |= {f"base_model.model.{spoken(table, key)}": tensor for key, tensor in saved.items()}
    # Of a model with further towers, endings could mean modules there.
    known = () if table.names.aliases else table.sites
    rslora, dora = _kind(lora, parameters)
    dropout = max((part.dropout for part in lora.values()), default=0.0)
    if parameters and dropout > 0:
        notice(
            f"dropout {dropout:g} is not written: PEFT has none on parameters such as "
            f"{parameters[0]}"
        )
        dropout = 0.0
    config = write_peft(
        ranks,
        alphas,
        known,
        parameters,
        rslora=rslora,
        dora=dora,
        dropout=dropout,
        modules_to_save=modules,
        base=base,
        task_type=None
        if table.family == OWN
        else "CAUSAL_LM",  # which asks the model for methods of transformers
    )
    return tensors, {**config, "ensure_weight_tying": True} if tied else config


def _tied_output(table: Table, weight: Tensor) -> dict[str, Tensor]:
    """The output beside embeddings that are it too, under its foreign key, as PEFT writes what it
    keeps tied.
    """
    return {row.foreign: weight for row in table.names.patterns if row.ours == ("output.weight",)}


def _kind(lora: Mapping[str, LoraWeights], parameters: list[str]) -> tuple[bool, bool]:
    """(rslora, DoRA) of all leaves; PEFT has one for the whole adapter."""
    kinds = {(part.scaling == "rslora", part.magnitude is not None) for part in lora.values()}
    if len(kinds) > 1:
        raise RequestError(
            "this adapter mixes rslora or DoRA with plain leaves, which PEFT cannot say; "
            "expected one kind"
        )
    rslora, dora = next(iter(kinds), (False, False))
    if dora and parameters:
        raise RequestError(
            f"DoRA on {parameters[0]}: PEFT has none on parameters; expected LoRA there"
        )
    return rslora, dora


def spoken(table: Table, path: str) -> str:
    """The path as transformers 5 has it in memory, where that begins otherwise than the table's."""
    old, new = next((pair for pair in table.names.aliases if path.startswith(pair[1])), ("", ""))
    return old + path[len(new) :]


def _groups(model: LLM, path: str) -> int:
    experts = model.get_submodule(path)
    assert isinstance(experts, GroupedLinear), (
        "parameters of a module that holds several are experts"
    )
    return experts.weight.size(0)


def _wrapped(at: str, table: Table, lora: Mapping[str, LoraWeights]) -> str:
    """The path of a parameter's adapter: PEFT wraps the module once per parameter, the first
    innermost.
    """
    module = at.rpartition(".")[0]
    siblings = [
        name
        for name, move in table.sites.items()
        if is_parameter(move)
        and name.rpartition(".")[0] == module
        and any(own.removesuffix(".weight") in lora for own in move.ours)
    ]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(at))


def _whole(
    model: LLM, table: Table, whole: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, Tensor]:
    """Return replaced parameters under foreign keys, with all others of their modules, since PEFT
    keeps modules.
    """
    own = {
        f"{path}.{last}": tensor
        for path, tensors in whole.items()
        for last, tensor in tensors.items()
    }
    unwritten = set(own)
    out: dict[str, Tensor] = {}
    for move in table.whole:
        if unwritten.intersection(move.ours):
            unwritten.difference_update(move.ours)
            out |= _foreign(model, table, move, own)
    if unwritten:
        raise RequestError(
            f"{min(unwritten)}: {table.family} has no name for this parameter; expected another"
        )
    modules = {key.rpartition(".")[0] for key in out}
    for move in table.whole:
        rest = [key for key in move.foreign if key not in out and key.rpartition(".")[0] in modules]
        if rest:
            tensors = _foreign(model, table, move, own)
            out |= {key: tensors[key] for key in rest}
    return out


def _foreign(
    model: LLM, table: Table, move: KeyMapping, own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of one row of the table under their foreign keys: those of `own`, else the
    model's.
    """
    tensors = [
        own[name] if name in own else model.get_parameter(name).detach() for name in move.ours
    ]
    args = model.args
    rows = [
        turned(name.rpartition(".")[0], tensor, args, args.rope_layout, table.layout)
        for name, tensor in zip(move.ours, tensors, strict=True)
    ]
    return dict(zip(move.foreign, invert_transform(move.transform, rows), strict=True))


def _mistral(
    model: LLM, name: str, lora: Mapping[str, LoraWeights], whole: Mapping[str, object]
) -> dict[str, Tensor]:
    """`X.lora_A.weight` and `X.lora_B.weight`, rows of queries and keys interleaved."""
    if whole or any(part.magnitude is not None for part in lora.values()):
        raise RequestError(
            f"adapter {name!r}: has DoRA or whole modules, which lora.safetensors cannot hold; "
            f"expected peft"
        )
    table, out, done = table_of(MISTRAL, model), {}, set()
    # Mistral's own names come behind ours in the table, and win.
    for move in reversed(table.moves):
        paths = [own.removesuffix(".weight") for own in move.ours]
        if len(paths) > 1 or is_parameter(move) or paths[0] not in lora or paths[0] in done:
            continue
        for key, stored in zip(move.foreign, to_site(table, move, lora, model), strict=True):
            out[f"{site(key)}.lora_A.weight"] = stored.A
            out[f"{site(key)}.lora_B.weight"] = stored.B * (lora[paths[0]].scale / MISTRAL_SCALING)
        done.update(paths)
    notice(f"{MISTRAL_WEIGHTS}: written for a scaling of {MISTRAL_SCALING}")
    return out


def _write(
    folder: Path, files: Mapping[str, dict[str, Tensor]], config: dict[str, Any] | None
) -> None:
    """Whole files or none: each is written beside its name and moved there, the config last."""
    with FolderLock(folder):
        _write_locked(folder, files, config)


def _write_locked(
    folder: Path, files: Mapping[str, dict[str, Tensor]], config: dict[str, Any] | None
) -> None:
    partial: list[tuple[Path, Path]] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file, tensors in files.items():
            plain = {
                key: t.detach().to("cpu", copy=True).contiguous() for key, t in tensors.items()
            }
            partial.append((folder / f"{file}.partial", folder / file))
            save_file(plain, partial[-1][0], metadata={"format": "pt"})
        if config is not None:
            partial.append((folder / f"{ADAPTER_CONFIG}.partial", folder / ADAPTER_CONFIG))
            partial[-1][0].write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (
            config is not None
        ):  # a kill must not leave new weights under the config of the adapter before
            (folder / ADAPTER_CONFIG).unlink(missing_ok=True)
        for written, name in partial:
            written.replace(name)
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{folder}: could not be written ({error})") from None
    finally:  # also after an interruption
        for written, _ in partial:
            written.unlink(missing_ok=True)
