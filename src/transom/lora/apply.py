"""New adapters on a built model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect, explained, nearest, notice
from transom.layers.linear import Embedding
from transom.lora.adapters import activate_adapters, attach, leaves, train_adapters
from transom.lora.args import ROLES, LoraArgs
from transom.lora.coverage import coverage_lines, role_of
from transom.lora.weights import Leaf, LoraWeights, Replacement, output_norms
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized


def apply_lora(
    model: LLM, args: LoraArgs, name: str = "default", seed: int = 0, *, quiet: bool = False
) -> LLM:
    """Add a new adapter that changes nothing yet, activate it, and freeze all other parameters.

    Parameters that train are float32 or wider whatever the dtype of the model is, because half
    precision rounds small steps away. Without `quiet`, the coverage report is printed on stderr.

    Args:
        model: the model, changed in place.
        args: rank, scale and targets.
        name: the name of the adapter.
        seed: the seed of the initial weights.
        quiet: print no coverage report.

    Returns:
        The model.

    Raises:
        RequestError: a target or module is not in the model, the rank is too large, or the name is
            taken.
    """
    known = leaves(model)
    whole = saved_modules(model, args.modules_to_save)
    chosen = {
        path: leaf for path, leaf in target_leaves(known, args.targets).items() if path not in whole
    }
    smallest = min((_shorter_side(leaf) for leaf in chosen.values()), default=args.rank)
    expected = f"at most {smallest}, the shorter side of the smallest target matrix"
    expect(args.rank <= smallest, "rank", args.rank, expected)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, LoraWeights | Replacement] = {}
    for path, leaf in chosen.items():
        parts[path] = initial_weights(leaf, args, generator)
    for path, module in whole.items():
        if isinstance(module, Quantized):
            raise RequestError(
                f"modules_to_save: got {path}, which is quantized and cannot train; "
                f"expected another"
            )
        copies = {
            key: own.detach().to(torch.promote_types(own.dtype, torch.float32), copy=True)
            for key, own in module.named_parameters(recurse=False)
        }
        parts[path] = Replacement(copies)
    attach(model, name, parts)
    activate_adapters(model, (name,))
    train_adapters(model, (name,))
    for line in [] if quiet else coverage_lines(model):
        notice(line)
    return model


def _shorter_side(leaf: Leaf) -> int:
    """Return the smaller of a matrix's two sizes, without computing the weight of a quantized
    leaf.
    """
    shape = leaf.shape if isinstance(leaf, Quantized) else leaf.weight.shape
    return min(shape[-2:])


def initial_weights(
    leaf: Leaf, args: LoraArgs, generator: torch.Generator, weight: Tensor | None = None
) -> LoraWeights:
    """Return A as `nn.Linear` initialises it and B as zeros, in float32 or wider, as
    mistral-finetune and PEFT do.

    On an embedding A is zero and B is normal: a row of A sees only one token. `weight` is the
    weight of the leaf, if the leaf has only a part of it. For one on the meta device, numbers are
    drawn and not used.
    """
    if weight is None:
        weight = leaf.weight.detach()  # once: a quantized leaf computes it at every reading
    dtype = torch.promote_types(weight.dtype, torch.float32)
    embedding = isinstance(leaf, Embedding)
    *groups, outputs, inputs = weight.mT.shape if embedding else weight.shape
    A = torch.zeros((*groups, args.rank, inputs), dtype=dtype, device=weight.device)
    B = torch.zeros((*groups, outputs, args.rank), dtype=dtype, device=weight.device)
    if embedding:
        B.copy_(torch.randn(B.shape, generator=generator))
    else:
        A.copy_((torch.rand(A.shape, generator=generator) * 2 - 1) * inputs**-0.5)
    magnitude = output_norms(leaf, weight.to(dtype)) if args.dora else None
    return LoraWeights(A, B, args.alpha, args.scaling, dropout=args.dropout, magnitude=magnitude)


def target_leaves(known: Mapping[str, Leaf], targets: Iterable[str]) -> dict[str, Leaf]:
    """Return the leaves that `targets` name, in the order of `known`; a target that fits none
    is a `RequestError`.
    """
    chosen: set[str] = set()
    for target in targets:
        with explained(f"targets: got {target!r}, which is no regular expression", re.error):
            found = {path for path in known if _fits(target, path)}
        if not found:
            roles = [role for role in ROLES if any(_fits(role, path) for path in known)]
            ends = {path.rpartition(".")[2] for path in known}
            raise RequestError(
                f"targets: got {target!r}, which fits no weight of this model; expected "
                f"{', '.join(roles)}, or a pattern for the end of a name such as wq"
                f"{nearest(target, (*roles, *ends))}"
            )
        chosen |= found
    return {path: leaf for path, leaf in known.items() if path in chosen}


def _fits(target: str, path: str) -> bool:
    """Return whether a role or pattern means this leaf; no role means embeddings, output or
    images.
    """
    if target == "all-linear":
        return role_of(path) in ROLES
    if target == "ffn":  # a shared expert is a feed-forward that every token visits
        return role_of(path) in ("ffn", "shared_experts")
    if target in ROLES:
        return role_of(path) == target
    return re.fullmatch(rf"(.*\.)?({target})", path) is not None


def saved_modules(model: LLM, names: Iterable[str]) -> dict[str, nn.Module]:
    """Return the modules with own parameters that `modules_to_save` names by the ends of their
    names, or whose parents it names.
    """
    out: dict[str, nn.Module] = {}
    owners = {path: one for path, one in model.named_modules() if [*one.parameters(False)]}
    for name in names:
        found = {path: owners[path] for path in owners if f".{name}." in f".{path}."}
        if not found:
            ends = {path.rpartition(".")[2] for path in owners}
            raise RequestError(
                f"modules_to_save: got {name!r}, which is no module of this "
                f"model{nearest(name, ends)}"
            )
        out |= found
    return out
