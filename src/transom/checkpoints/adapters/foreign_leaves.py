"""Where a foreign model keeps what our leaves hold, for adapters: by the names of
`checkpoints.families`.

A row that says how a foreign weight becomes ours also says how its adapter does: A sees the inputs,
so all of our leaves behind one foreign weight share it, and B makes the outputs, so it is cut and
turned like the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.families.weights import (
    EXPERTS_IN_MEMORY,
    OUR_NAMES,
    ROUTER_IN_MEMORY,
    WeightNames,
)
from transom.config.model_args import ModelArgs
from transom.lora.args import Scaling
from transom.lora.weights import LEAVES, Leaf, LoraWeights
from transom.models.llm import LLM
from transom.names.tables import REFERENCE_NAMES, KeyMapping, expand
from transom.names.transforms import apply_transform, invert_transform, permute_rotary
from transom.quantize.leaves import dense_names

Layout = Literal["interleaved", "halves"]
# transformers rotates interleaved pairs in these (DeepSeek's as its config says): rows are never
# turned.
OWN_LAYOUT = ("llama4_text", "llama4", "deepseek_v3")
# Experts as [E, in, out] in a module that does not say so: PEFT takes rows for outputs, and A and B
# swap roles.
SWAPPED = ("llama4_text", "llama4")
MISTRAL = "mistral-inference"
OWN = "transom"  # our own names and layout, for models that no family of transformers can hold


@dataclass(frozen=True)
class Tensors:
    """A foreign adapter of one module or parameter, as stored; `magnitude` where it is DoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    alpha: float
    scaling: Scaling


@dataclass(frozen=True)
class Table:
    """One way of naming what the model holds: foreign sites to moves, and the layout of rotary rows
    there.
    """

    family: str
    moves: tuple[KeyMapping, ...]  # of leaves, for adapters
    whole: tuple[KeyMapping, ...]  # of all parameters, for those that are saved whole
    layout: Layout
    names: WeightNames

    @functools.cached_property
    def sites(self) -> dict[str, KeyMapping]:
        """Foreign module (or parameter, where it is none's weight) -> the move it is part of."""
        return {site(key): move for move in self.moves for key in move.foreign}


def site(key: str) -> str:
    """The module of a weight's key; a parameter of another name is a site of its own."""
    return key.removesuffix(".weight")


def is_parameter(move: KeyMapping) -> bool:
    """Whether the foreign side is a parameter of a module that holds several, as experts are."""
    return not move.foreign[0].endswith(".weight")


def table_of(family: str, model: LLM) -> Table:
    """The names that `family` has for this model."""
    args = model.args
    parameters = _own_names(model)
    held: list[KeyMapping] = []
    names = OUR_NAMES
    if family in (MISTRAL, OWN):
        same = [KeyMapping((name,), (name,), "copy") for name in parameters]
        whole = (*same, *(expand(REFERENCE_NAMES, args, parameters) if family == MISTRAL else ()))
        layout: Layout = "interleaved" if family == MISTRAL else args.rope_layout
    else:
        names = FAMILIES[family].names
        router = (ROUTER_IN_MEMORY,) if names.fused_experts else ()
        held = expand(EXPERTS_IN_MEMORY, args, parameters) if names.fused_experts else []
        whole = tuple(expand((*router, *names.patterns), args, parameters))
        layout = args.rope_layout if family in OWN_LAYOUT else "halves"
    moves = tuple(move for move in (*held, *whole) if _of_leaves(move, model))
    return Table(family, moves, whole, layout, names)


def _own_names(model: LLM) -> list[str]:
    return [name for name in dense_names(model) if ".lora." not in name]


def _of_leaves(move: KeyMapping, model: LLM) -> bool:
    owners = [name.rpartition(".") for name in move.ours]
    return all(
        last == "weight" and isinstance(model.get_submodule(path), LEAVES)
        for path, _, last in owners
    )


def candidates(model: LLM) -> list[Table]:
    """The tables that name every parameter of the text model, one for each of `FAMILIES`; our own
    names last.
    """
    text = {name for name in _own_names(model) if not name.startswith("vision.")}
    out = []
    for family in FAMILIES:
        table = table_of(family, model)
        if text <= {name for move in table.whole for name in move.ours}:
            out.append(table)
    return [*out, table_of(OWN, model)]


def to_leaves(
    table: Table,
    move: KeyMapping,
    found: Mapping[str, Tensors],
    model: LLM,
    dropout: float,
    where: str,
) -> dict[str, LoraWeights]:
    """Our adapters, by leaf, from the foreign ones of a move."""
    given = [found[site(key)] for key in move.foreign if site(key) in found]
    first = given[0]
    paths = [name.removesuffix(".weight") for name in move.ours]
    owners: list[Leaf] = [_leaf(model, path) for path in paths]
    if len(given) < len(move.foreign):
        raise RequestError(
            f"{where}: adapters on {len(given)} of {len(move.foreign)} experts of {paths[0]}: "
            f"expected all or none of a layer"
        )
    alike = {(t.A.shape, t.alpha, t.scaling, t.magnitude is None) for t in given}
    if len(alike) > 1:
        raise RequestError(
            f"{where}: experts of {paths[0]} differ in rank or scale; expected one for all"
        )
    try:
        if is_parameter(move):
            A, B = _read_experts(table.family, first, owners)
            magnitudes: list[Tensor | None] = [None] * len(paths)
        else:
            A = torch.stack([t.A for t in given]) if move.transform == "stack" else first.A
            B, magnitudes = [t.B for t in given], [None] * len(paths)
            if first.magnitude is not None:
                lengths = [t.magnitude for t in given if t.magnitude is not None]
                magnitudes = [
                    *apply_transform(
                        move.transform, lengths, [owner.weight.shape for owner in owners]
                    )
                ]
        parts = apply_transform(move.transform, B, [owner.weight.shape for owner in owners])
    except (RuntimeError, ValueError, IndexError):
        raise _misfit(where, move, first, owners) from None
    out: dict[str, LoraWeights] = {}
    shared = nn.Parameter(_placed(A, owners[0]))
    for path, owner, part, magnitude in zip(paths, owners, parts, magnitudes, strict=True):
        if not _fit(owner, shared, part, magnitude):
            raise _misfit(where, move, first, owners)
        if magnitude is not None:
            magnitude = _placed(
                turned(path, magnitude, model.args, table.layout, model.args.rope_layout), owner
            )
        out[path] = LoraWeights(
            shared,
            _placed(turned(path, part, model.args, table.layout, model.args.rope_layout), owner),
            first.alpha,
            first.scaling,
            dropout=dropout,
            magnitude=magnitude,
            family=table.family,
        )
    return out


def _leaf(model: nn.Module, path: str) -> Leaf:
    leaf = model.get_submodule(path)
    assert isinstance(leaf, LEAVES), "moves are those of leaves"
    return leaf


def _placed(tensor: Tensor, leaf: Leaf) -> Tensor:
    """A copy of its own on the leaf's device, in float32 or better: small steps are lost in half
    precision.
    """
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(leaf.weight.device, dtype, copy=True).contiguous()


def _fit(leaf: Leaf, A: Tensor, B: Tensor, magnitude: Tensor | None) -> bool:
    *groups, outputs, inputs = (
        leaf.weight.mT.shape if leaf.weight.ndim == 2 and _swaps(leaf) else leaf.weight.shape
    )
    fits = A.shape == (*groups, A.size(-2), inputs) and B.shape == (*groups, outputs, A.size(-2))
    return fits and (magnitude is None or magnitude.shape == (*groups, outputs))


def _swaps(leaf: Leaf) -> bool:
    """An embedding's weight is [in, out]."""
    return isinstance(leaf, nn.Embedding)


def _misfit(where: str, move: KeyMapping, first: Tensors, owners: Iterable[Leaf]) -> RequestError:
    wanted = ", ".join(str(tuple(owner.weight.shape)) for owner in owners)
    return RequestError(
        f"{where}: the adapter of {site(move.foreign[0])} has A {tuple(first.A.shape)} and B "
        f"{tuple(first.B.shape)}, which does not fit weights {wanted}"
    )


def _read_experts(family: str, stored: Tensors, owners: list[Leaf]) -> tuple[Tensor, list[Tensor]]:
    """(A [E, r, in], B as a weight [E, r, out]) from A [E r, in] read as (E, r, in) and B as (out,
    r, E).
    """
    count, _, inputs = owners[0].weight.shape
    outputs = sum(owner.weight.size(1) for owner in owners)
    A_ERI = stored.A.unflatten(0, (count, -1))
    B_ERO = stored.B.unflatten(1, (-1, count)).permute(2, 1, 0)
    if swapped(family, stored.A.size(1), inputs, outputs):
        A_ERI, B_ERO = B_ERO, A_ERI
    if A_ERI.size(2) != inputs or B_ERO.size(2) != outputs:
        raise ValueError("neither way round")
    return A_ERI, [B_ERO]


def swapped(family: str, width: int, inputs: int, outputs: int) -> bool:
    """Whether A of experts, of this width, is for their outputs; where both widths agree, as PEFT
    0.21 does.
    """
    return family in SWAPPED if inputs == outputs else width == outputs


def turned(path: str, tensor: Tensor, args: ModelArgs, source: Layout, target: Layout) -> Tensor:
    """Rows of a leaf's outputs from one rotary layout into the other, where they make queries or
    keys.
    """
    if source == target:
        return tensor
    return permute_rotary(f"{path}.weight", tensor, replace(args, rope_layout=source), target)


def to_site(
    table: Table, move: KeyMapping, parts: Mapping[str, LoraWeights], model: LLM
) -> list[Tensors]:
    """The foreign adapters of a move, one per foreign key, from ours by leaf.

    Leaves that share A stay at their rank. Others stand side by side: A below A, each B in columns
    of its own; a leaf without an adapter gets zeros.
    """
    paths = [name.removesuffix(".weight") for name in move.ours]
    here = [parts[path] for path in paths if path in parts]
    first = here[0]
    same = len(here) == len(paths) and all(
        torch.equal(lora.A, first.A) and lora.scale == first.scale for lora in here
    )
    A = first.A.detach() if same else torch.cat([lora.A.detach() for lora in here], -2)
    columns, start = [], 0
    for path in paths:
        owner, lora = _leaf(model, path), parts.get(path)
        block = A.new_zeros(*owner.weight.shape[:-1], A.size(-2)) if not _swaps(owner) else None
        if lora is not None:
            B = lora.B.detach()
            if same:
                block = B
            else:
                assert block is not None, "an embedding is never part of several"
                # One scale for all: what a part's own differs by goes into its B.
                block[..., start : start + lora.rank] = B * (lora.scale / first.scale)
                start += lora.rank
        assert block is not None, "what stands alone is there"
        columns.append(turned(path, block, model.args, model.args.rope_layout, table.layout))
    alpha = first.alpha
    if not same and first.scaling != "direct":
        growth = A.size(-2) / first.rank
        alpha *= growth if first.scaling == "alpha_over_rank" else growth**0.5
    made = invert_transform(move.transform, columns)
    magnitudes = _magnitudes(table, move, parts, paths, model)
    if is_parameter(move):
        return [_write_experts(table, A, made[0], alpha, first.scaling)]
    inputs = A.unbind(0) if move.transform == "stack" else [A]
    return [
        Tensors(a, b, m, alpha, first.scaling)
        for a, b, m in zip(inputs, made, magnitudes, strict=True)
    ]


def _magnitudes(
    table: Table, move: KeyMapping, parts: Mapping[str, LoraWeights], paths: list[str], model: LLM
) -> list[Tensor | None]:
    own = [
        lora.magnitude.detach()
        for path in paths
        if (lora := parts.get(path)) and lora.magnitude is not None
    ]
    if not own:
        return [None] * len(move.foreign)
    if len(own) < len(paths) or is_parameter(move):
        raise RequestError(
            f"DoRA on {', '.join(p for p in paths if p in parts)}: {site(move.foreign[0])} of "
            f"{table.family} cannot hold it; expected LoRA there, or DoRA on all of its parts"
        )
    args = model.args
    rows = [
        turned(p, m, args, args.rope_layout, table.layout) for p, m in zip(paths, own, strict=True)
    ]
    return [*invert_transform(move.transform, rows)]


def _write_experts(
    table: Table, A_ERI: Tensor, B_ERO: Tensor, alpha: float, scaling: Scaling
) -> Tensors:
    """`_read_experts`, the other way."""
    if table.family in SWAPPED:
        A_ERI, B_ERO = B_ERO, A_ERI
    return Tensors(A_ERI.flatten(0, 1), B_ERO.permute(2, 1, 0).flatten(1), None, alpha, scaling)
