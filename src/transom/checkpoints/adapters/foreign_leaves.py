"""The names and layouts that other codes have for the adapters of our leaves, in both directions.

The mapping of a foreign weight to ours is that of its adapter, too. A multiplies the inputs, so all
of our leaves that one foreign weight contains share it. B makes the outputs, so it is cut and
reordered as the weight is. A site is a foreign module, or a parameter of a module that holds
several (fused experts).

`mapping.to_ours` and `mapping.to_foreign` read and write adapters by the rows of `Naming.rows`, as
they do weights. In these rows, the parts of an adapter have the keys `SITE.lora_A`, `SITE.lora_B`
and `SITE.lora_magnitude_vector` in files, and `LEAF.A`, `LEAF.B` and `LEAF.magnitude` here.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace

from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.checkpoints.families.registry import FAMILIES, WEIGHT_NAMES
from transom.checkpoints.families.weights import EXPERTS_IN_MEMORY, ROUTER_IN_MEMORY
from transom.checkpoints.files.layout import MODEL_TYPE
from transom.config.layer_args import RopeLayout
from transom.lora.adapters import leaves
from transom.models.llm import LLM
from transom.names.tables import KeyMapping, Transform, expand
from transom.names.transforms import Shape, permute_rotary
from transom.quantize.leaves import dense_names

# In these families of transformers, rotary rows have the layout of the files. In all others the
# rows of queries and keys are halves.
OWN_LAYOUT = ("llama4_text", "llama4", "deepseek_v3")
# These hold experts as [E, in, out]. PEFT takes the rows for outputs, so A and B swap their roles.
SWAPPED = ("llama4_text", "llama4")
MISTRAL = "params_mistral"
OWN = MODEL_TYPE  # our own names, for models that no family of transformers can express
PREFIX = "base_model.model."  # before every key of a PEFT file
_PART = re.compile(r"\.lora_(?:embedding_)?(A|B|magnitude_vector)(?:\.weight)?$")


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

    Args:
        family: A model_type of transformers, `MISTRAL` or `OWN`.
        model: The model.

    Attributes:
        mappings: Those of all parameters.
        written: Those to write, the first of each parameter.
        leaves: The leaves of the model by path.
        sites: The mapping of every site.
        names: How keys of files are spelled.
        layout: The layout of rotary rows.
    """

    def __init__(self, family: str, model: LLM) -> None:
        args, parameters = model.args, own_names(model)
        self.family, self.model, self.leaves = family, model, leaves(model)
        self.names = WEIGHT_NAMES[family]
        in_memory = (ROUTER_IN_MEMORY, *EXPERTS_IN_MEMORY) if self.names.fused_experts else ()
        found = expand((*in_memory, *self.names.patterns), args, parameters)
        if family in FAMILIES:
            self.layout: RopeLayout = args.rope_layout if family in OWN_LAYOUT else "halves"
        else:
            self.layout = "interleaved" if family == MISTRAL else args.rope_layout
            found += [KeyMapping((name,), (name,), "copy") for name in parameters]
        self.mappings = list(dict.fromkeys(found))
        first = {name: one for one in reversed(self.mappings) for name in one.ours}
        self.written = [
            one for one in self.mappings if all(first[name] == one for name in one.ours)
        ]
        of_leaves = (one for one in self.mappings if self.leaves.keys() >= {*leaf_paths(one)})
        self.sites = {site_of(key): one for one in of_leaves for key in one.foreign}

    def to_write(self, parameters: Collection[str]) -> list[KeyMapping]:
        """Return the mappings to write parameters with.

        Raises:
            RequestError: The family has no name for one of them.
        """
        unnamed = set(parameters) - {name for mapping in self.written for name in mapping.ours}
        if unnamed:
            found = f"{min(unnamed)}: {self.family} has no name for this parameter"
            raise RequestError(f"{found}; expected another family")
        return [one for one in self.written if not set(parameters).isdisjoint(one.ours)]

    def known_key(self, key: str) -> str:
        """Return the key in `rows` or `mappings` for one of a file of PEFT."""
        key = self.names.known_key(key.removeprefix(PREFIX))
        if _PART.search(key):
            return _PART.sub(r".lora_\1", key)
        return key.replace(".base_layer.", ".").replace(".modules_to_save.", ".")

    def spellings(self, site: str) -> tuple[str, str]:
        """Return the names that a config of PEFT may have for a site: in files and in memory."""
        return site, self.names.in_memory(site)

    def paths(self, adapted: Collection[str]) -> dict[str, str]:
        """Return the path of the adapter of every site that can have one.

        PEFT wraps a module once for each of its parameters that is in `adapted`, the first one
        innermost.
        """
        out: dict[str, str] = {}
        wrappers: Counter[str] = Counter()
        for site, mapping in reversed(self.sites.items()):
            if not is_parameter(mapping):
                out[site] = site
            elif site in adapted:
                module = site.rpartition(".")[0]
                out[site] = module + ".base_layer" * wrappers[module]
                wrappers[module] += 1
        return out

    def rows(self, mapping: KeyMapping, paths: Mapping[str, str], dora: bool) -> list[KeyMapping]:
        """Return the keys of the adapter of one weight and our names: A, B, and DoRA's lengths."""
        sites, ours = [paths.get(site_of(key), "") for key in mapping.foreign], leaf_paths(mapping)
        each: Transform = "stack" if mapping.transform == "stack" else "copy"
        out = [KeyMapping(tuple(f"{site}.lora_A" for site in sites), (f"{ours[0]}.A",), each)]
        for theirs, own in (("B", "B"), ("magnitude_vector", "magnitude"))[: 2 if dora else 1]:
            foreign = tuple(f"{site}.lora_{theirs}" for site in sites)
            names = tuple(f"{path}.{own}" for path in ours)
            out.append(KeyMapping(foreign, names, mapping.transform))
        return out

    def shapes(self, mapping: KeyMapping, rank: int) -> dict[str, Shape]:
        """Return the shapes of the parts of an adapter by our names."""
        out: dict[str, Shape] = {}
        for path in leaf_paths(mapping):
            leaf = self.leaves[path]
            weight = leaf.weight.mT if isinstance(leaf, nn.Embedding) else leaf.weight
            *groups, outputs, inputs = weight.shape
            out[f"{path}.A"] = (*groups, rank, inputs)
            out[f"{path}.B"] = (*groups, outputs, rank)
            out[f"{path}.magnitude"] = (*groups, outputs)
        return out

    def reordered(self, name: str, tensor: Tensor, *, to_ours: bool) -> Tensor:
        """Return rows of outputs in our rotary layout, or in that of the family."""
        own = self.model.args
        if self.layout == own.rope_layout or name.endswith(".A"):
            return tensor
        if to_ours:
            return permute_rotary(
                name, tensor, replace(own, rope_layout=self.layout), own.rope_layout
            )
        return permute_rotary(name, tensor, own, self.layout)


def own_names(model: LLM) -> list[str]:
    """Return the names of a model's parameters, without those of adapters."""
    return [name for name in dense_names(model) if ".lora." not in name]


def namings(model: LLM) -> list[Naming]:
    """Return the names of every family that can express the text model; our own names come last."""
    text = {name for name in own_names(model) if not name.startswith("vision.")}
    all_families = [Naming(family, model) for family in FAMILIES]
    fitting = [one for one in all_families if text <= {n for m in one.mappings for n in m.ours}]
    return [*fitting, Naming(OWN, model)]


def experts_from_peft(naming: Naming, site: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A [E, r, in] and B of fused experts, laid out as their weight in transformers.

    B is [E, out, r] in families with `fused_experts`, whose weight is [E, out, in]. In the others
    the weight is [E, in, out] and B is [E, r, out].

    PEFT stores A as [E r, in] in the order (E, r), and B as [out, r E] in the order (r, E). Tensors
    that do not fit are returned as they are.
    """
    here = [naming.leaves[path].weight for path in leaf_paths(naming.sites[site])]
    (count, _, inputs), outputs = here[0].shape, sum(weight.size(1) for weight in here)
    if A.ndim != 2 or B.ndim != 2 or len(A) % count or B.size(1) % count:
        return A, B
    A_ERI, B_ERO = A.unflatten(0, (count, -1)), B.unflatten(1, (-1, count)).permute(2, 1, 0)
    # If inputs and outputs have one width, the roles are those of PEFT 0.21.
    swapped = naming.family in SWAPPED if inputs == outputs else A.size(1) == outputs
    A, B = (B_ERO, A_ERI) if swapped else (A_ERI, B_ERO)
    return A, B.mT if naming.names.fused_experts else B


def experts_to_peft(naming: Naming, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of fused experts as PEFT stores them; see `experts_from_peft`."""
    B = B.mT if naming.names.fused_experts else B
    A, B = (B, A) if naming.family in SWAPPED else (A, B)
    return A.flatten(0, 1), B.permute(2, 1, 0).flatten(1)
