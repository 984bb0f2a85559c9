"""The modules of other codes that hold the weights of our leaves, for reading and writing adapters.

The mapping of a foreign weight to ours is that of its adapter, too. A multiplies the inputs, so all
of our leaves that one foreign weight contains share it. B makes the outputs, so it is cut and
reordered as the weight is. A site is a foreign module, or a parameter of a module that holds
several (fused experts).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, require
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.families.weights import EXPERTS_IN_MEMORY, OUR_NAMES, ROUTER_IN_MEMORY
from transom.config.layer_args import RopeLayout
from transom.lora.args import Scaling
from transom.lora.weights import LEAVES, Leaf, LoraWeights
from transom.models.llm import LLM
from transom.names.tables import REFERENCE_NAMES, KeyMapping, expand
from transom.names.transforms import apply_transform, invert_transform, permute_rotary
from transom.quantize.leaves import dense_names

# In these families of transformers, rotary rows have the layout of the files. In all others the
# rows of queries and keys are halves.
OWN_LAYOUT = ("llama4_text", "llama4", "deepseek_v3")
# These hold experts as [E, in, out]. PEFT takes the rows for outputs, so A and B swap their roles.
SWAPPED = ("llama4_text", "llama4")
MISTRAL = "mistral-inference"
OWN = "transom"  # our own names, for models that no family of transformers can express
# What torch raises if tensors cannot be cut or joined as a mapping asks for.
MISFITS = (RuntimeError, ValueError, IndexError)


@dataclass(frozen=True)
class ForeignLora:
    """The low-rank adapter of one site, as stored in a file; `magnitude` is that of DoRA."""

    A: Tensor
    B: Tensor
    magnitude: Tensor | None
    alpha: float
    scaling: Scaling


def site_of(key: str) -> str:
    """Return the module of a weight's key, or the key of a parameter that is no `weight`."""
    return key.removesuffix(".weight")


def is_parameter(mapping: KeyMapping) -> bool:
    """Return whether the foreign side is a parameter of a module that holds several."""
    return not mapping.foreign[0].endswith(".weight")


def leaf_paths(mapping: KeyMapping) -> list[str]:
    """Return the paths of our leaves whose weights a mapping makes."""
    return [name.removesuffix(".weight") for name in mapping.ours]


class Naming:
    """The names that one family has for a model's weights.

    Attributes:
        mappings: Those of all parameters, for parameters that are saved whole.
        leaf_mappings: Those of the weights of leaves, for low-rank adapters.
        sites: The leaf mapping of every site.
        names: How keys of files are spelled.
        layout: The layout of rotary rows.
    """

    def __init__(self, family: str, model: LLM) -> None:
        """`family` is a model_type of transformers, `MISTRAL` or `OWN`."""
        args, parameters = model.args, own_names(model)
        self.family, self.model, self.names = family, model, OUR_NAMES
        self.layout: RopeLayout = args.rope_layout
        fused: list[KeyMapping] = []
        if family in (MISTRAL, OWN):
            self.mappings = [KeyMapping((name,), (name,), "copy") for name in parameters]
        else:
            self.names = FAMILIES[family].names
            router = (ROUTER_IN_MEMORY,) if self.names.fused_experts else ()
            fused = expand(EXPERTS_IN_MEMORY, args, parameters) if self.names.fused_experts else []
            self.mappings = expand((*router, *self.names.patterns), args, parameters)
            self.layout = args.rope_layout if family in OWN_LAYOUT else "halves"
        if family == MISTRAL:
            self.mappings += expand(REFERENCE_NAMES, args, parameters)
            self.layout = "interleaved"
        every = dict.fromkeys((*fused, *self.mappings))
        self.leaf_mappings = [one for one in every if self._is_of_leaves(one)]
        self.sites = {site_of(key): one for one in self.leaf_mappings for key in one.foreign}

    def _is_of_leaves(self, mapping: KeyMapping) -> bool:
        owners = [name.rpartition(".") for name in mapping.ours]
        return all(
            last == "weight" and isinstance(self.model.get_submodule(path), LEAVES)
            for path, _, last in owners
        )

    def parameters_of(self, module: str) -> list[str]:
        """Return the sites that are parameters of a foreign module.

        PEFT wraps the module once for each of them, the first one innermost.
        """
        parameters = (name for name, mapping in self.sites.items() if is_parameter(mapping))
        return [name for name in parameters if name.rpartition(".")[0] == module]

    def reordered(self, path: str, tensor: Tensor, *, to_ours: bool) -> Tensor:
        """Return the rows of a leaf's outputs in our rotary layout, or in that of the family."""
        args = self.model.args
        source, target = self.layout, args.rope_layout
        if not to_ours:
            source, target = target, source
        if source == target:
            return tensor
        return permute_rotary(f"{path}.weight", tensor, replace(args, rope_layout=source), target)


def own_names(model: LLM) -> list[str]:
    """Return the names of a model's parameters, without those of adapters."""
    return [name for name in dense_names(model) if ".lora." not in name]


def namings(model: LLM) -> list[Naming]:
    """Return the names of every family that can express the text model; our own names come last."""
    text = {name for name in own_names(model) if not name.startswith("vision.")}
    all_families = [Naming(family, model) for family in FAMILIES]
    fitting = [one for one in all_families if text <= {n for m in one.mappings for n in m.ours}]
    return [*fitting, Naming(OWN, model)]


def to_leaves(
    naming: Naming,
    mapping: KeyMapping,
    found: Mapping[str, ForeignLora],
    dropout: float,
    where: str,
) -> dict[str, LoraWeights]:
    """Return our adapters by leaf from the foreign ones of a mapping.

    Raises:
        RequestError: A tensor does not fit the weight, or the experts of a layer are not all there
            or differ in rank or scale.
    """
    given = [found[site_of(key)] for key in mapping.foreign if site_of(key) in found]
    first, paths = given[0], leaf_paths(mapping)
    leaves, count = [leaf_at(naming.model, path) for path in paths], len(mapping.foreign)
    experts = f"{where}: experts of {paths[0]} with an adapter"
    require(len(given) == count, experts, len(given), f"expected all {count} of the layer, or none")
    alike = {(one.A.shape, one.alpha, one.scaling, one.magnitude is None) for one in given}
    require(len(alike) == 1, f"{experts}, ranks and scales", len(alike), "expected one for all")
    try:
        A, parts, magnitudes = _read(naming, mapping, given, leaves)
    except MISFITS:
        a, b = tuple(first.A.shape), tuple(first.B.shape)
        wanted = ", ".join(str(tuple(leaf.weight.shape)) for leaf in leaves)
        raise RequestError(
            f"{where}: {site_of(mapping.foreign[0])}: got A {a} and B {b}; expected shapes that "
            f"fit weights {wanted}"
        ) from None
    shared = nn.Parameter(_copied(A, leaves[0]))
    out: dict[str, LoraWeights] = {}
    for path, leaf, *rows in zip(paths, leaves, parts, magnitudes, strict=True):
        B, magnitude = (
            None if one is None else _copied(naming.reordered(path, one, to_ours=True), leaf)
            for one in rows
        )
        assert B is not None
        out[path] = LoraWeights(
            shared,
            B,
            first.alpha,
            first.scaling,
            dropout=dropout,
            magnitude=magnitude,
            family=naming.family,
        )
    return out


def _read(
    naming: Naming, mapping: KeyMapping, given: list[ForeignLora], leaves: list[Leaf]
) -> tuple[Tensor, list[Tensor], list[Tensor | None]]:
    """Return A, and B and magnitude per leaf; one of `MISFITS` is raised if they do not fit."""
    A, B = given[0].A, [one.B for one in given]
    shapes = [leaf.weight.shape for leaf in leaves]
    if is_parameter(mapping):
        A, *B = _read_experts(naming.family, given[0], leaves)
    elif mapping.transform == "stack":
        A = torch.stack([one.A for one in given])
    parts = apply_transform(mapping.transform, B, shapes)
    lengths = [one.magnitude for one in given if one.magnitude is not None]
    magnitudes: list[Tensor | None] = [None] * len(leaves)
    if lengths:
        magnitudes = [*apply_transform(mapping.transform, lengths, shapes)]
    for leaf, part, magnitude in zip(leaves, parts, magnitudes, strict=True):
        weight = leaf.weight.mT if isinstance(leaf, nn.Embedding) else leaf.weight
        *groups, outputs, inputs = weight.shape
        rank = A.size(-2)
        fits = A.shape == (*groups, rank, inputs) and part.shape == (*groups, outputs, rank)
        if not fits or (magnitude is not None and magnitude.shape != (*groups, outputs)):
            raise ValueError("shapes that do not fit")
    return A, [*parts], magnitudes


def leaf_at(model: nn.Module, path: str) -> Leaf:
    """Return the leaf of a model at a path."""
    leaf = model.get_submodule(path)
    assert isinstance(leaf, LEAVES), "sites are those of leaves"
    return leaf


def _copied(tensor: Tensor, leaf: Leaf) -> Tensor:
    # In float32 or better: half precision loses the small steps of training.
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(leaf.weight.device, dtype, copy=True).contiguous()


def _read_experts(family: str, stored: ForeignLora, leaves: list[Leaf]) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and B [E, r, out], laid out as the weight, of fused experts.

    PEFT stores A as [E r, in] in the order (E, r), and B as [out, r E] in the order (r, E).
    """
    count, _, inputs = leaves[0].weight.shape
    outputs = sum(leaf.weight.size(1) for leaf in leaves)
    A_ERI = stored.A.unflatten(0, (count, -1))
    B_ERO = stored.B.unflatten(1, (-1, count)).permute(2, 1, 0)
    # If inputs and outputs have one width, the roles are those of PEFT 0.21.
    if family in SWAPPED if inputs == outputs else stored.A.size(1) == outputs:
        A_ERI, B_ERO = B_ERO, A_ERI
    if A_ERI.size(2) != inputs or B_ERO.size(2) != outputs:
        raise ValueError("shapes that do not fit")
    return A_ERI, B_ERO


def to_site(
    naming: Naming, mapping: KeyMapping, parts: Mapping[str, LoraWeights]
) -> list[ForeignLora]:
    """Return the foreign adapters of a mapping, one per foreign key, from ours by leaf.

    Leaves that share A keep their rank. Otherwise the rank is the sum of theirs: the A are stacked,
    each B has columns of its own, and a leaf without an adapter has zeros.

    Raises:
        RequestError: DoRA is on a part of a fused weight, or on a parameter.
    """
    paths = leaf_paths(mapping)
    here = {path: parts[path] for path in paths if path in parts}
    first = next(iter(here.values()))
    same = len(here) == len(paths) and all(
        torch.equal(one.A, first.A) and one.scale == first.scale for one in here.values()
    )
    A, alpha = first.A.detach(), first.alpha
    columns = [one.B.detach() for one in here.values()]
    if not same:
        A = torch.cat([one.A.detach() for one in here.values()], -2)
        columns = _side_by_side(naming.model, paths, here, A)
        growth = A.size(-2) / first.rank
        alpha *= {"alpha_over_rank": growth, "rslora": growth**0.5, "direct": 1}[first.scaling]
    rows = [naming.reordered(p, b, to_ours=False) for p, b in zip(paths, columns, strict=True)]
    made = invert_transform(mapping.transform, rows)
    magnitudes = _magnitudes(naming, mapping, here)
    if is_parameter(mapping):
        B_ERO = made[0]
        if naming.family in SWAPPED:
            A, B_ERO = B_ERO, A
        B = B_ERO.permute(2, 1, 0).flatten(1)
        return [ForeignLora(A.flatten(0, 1), B, None, alpha, first.scaling)]
    inputs = A.unbind(0) if mapping.transform == "stack" else [A]
    found = zip(inputs, made, magnitudes, strict=True)
    return [ForeignLora(a, b, m, alpha, first.scaling) for a, b, m in found]


def _side_by_side(
    model: LLM, paths: list[str], here: Mapping[str, LoraWeights], A: Tensor
) -> list[Tensor]:
    """Return one B per leaf for the stacked `A`, all at the scale of the first adapter."""
    first, start, out = next(iter(here.values())), 0, []
    for path in paths:
        block = A.new_zeros(*leaf_at(model, path).weight.shape[:-1], A.size(-2))
        if path in here:
            lora = here[path]
            block[..., start : start + lora.rank] = lora.B.detach() * (lora.scale / first.scale)
            start += lora.rank
        out.append(block)
    return out


def _magnitudes(
    naming: Naming, mapping: KeyMapping, here: Mapping[str, LoraWeights]
) -> list[Tensor | None]:
    own = {path: one.magnitude for path, one in here.items() if one.magnitude is not None}
    if not own:
        return [None] * len(mapping.foreign)
    if len(own) < len(mapping.ours) or is_parameter(mapping):
        raise RequestError(
            f"DoRA on {', '.join(here)}: {site_of(mapping.foreign[0])} of {naming.family} cannot "
            "hold it; expected LoRA there, or DoRA on all of its parts"
        )
    rows = [naming.reordered(path, m.detach(), to_ours=False) for path, m in own.items()]
    return [*invert_transform(mapping.transform, rows)]
