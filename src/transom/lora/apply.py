"""New adapters on a built model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from transom.base.errors import RequestError, nearest, notice, require
from transom.lora.adapters import (
    Embedding,
    Leaf,
    LoraWeights,
    Replacement,
    activate_adapters,
    attach,
    leaves,
    lengths,
    train_adapters,
)
from transom.lora.args import ROLES, LoraArgs
from transom.lora.coverage import coverage_lines, role_of
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized


def apply_lora(
    model: LLM, args: LoraArgs, name: str = "default", seed: int = 0, *, quiet: bool = False
) -> LLM:
    """A new adapter that changes nothing yet, active, with every other parameter frozen; in place,
    and returned.

    What trains is float32 or wider whatever the model is in: half precision rounds small steps
    away. Says on stderr what trains, role by role. A target that fits no leaf is a `RequestError`.
    """
    known = leaves(model)
    whole = saved_modules(model, args.modules_to_save)
    chosen = {
        path: leaf for path, leaf in targeted(known, args.targets).items() if path not in whole
    }
    smallest = min((shorter_side(leaf) for leaf in chosen.values()), default=args.rank)
    expected = f"expected at most {smallest}, the shorter side of the smallest matrix it is for"
    require(args.rank <= smallest, "rank", args.rank, expected)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, LoraWeights | Replacement] = {
        path: fresh(leaf, args, generator) for path, leaf in chosen.items()
    }
    for path, module in whole.items():
        if isinstance(module, Quantized):
            raise RequestError(
                f"modules_to_save: {path} is quantized, and codes cannot be trained; expected "
                f"to skip it there"
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


def shorter_side(leaf: Leaf) -> int:
    """The smaller of a matrix's two sizes; a quantized leaf's weight is not made for it."""
    if isinstance(leaf, Quantized):
        rows, columns = leaf.parts["qweight"].shape[-2:]
        return min(rows, 2 * columns)  # two codes to a byte
    return min(leaf.weight.shape[-2:])


def fresh(leaf: Leaf, args: LoraArgs, generator: torch.Generator) -> LoraWeights:
    """A as `nn.Linear` starts and B zero, as mistral-finetune and PEFT do; in float32 or better."""
    weight = leaf.weight.detach()  # once: a quantized leaf makes it at every reading
    dtype = torch.promote_types(weight.dtype, torch.float32)
    if isinstance(leaf, Embedding):
        shape_A: tuple[int, ...] = (args.rank, weight.size(0))
        shape_B: tuple[int, ...] = (weight.size(1), args.rank)
    else:
        *groups, outputs, inputs = weight.shape
        shape_A, shape_B = (*groups, args.rank, inputs), (*groups, outputs, args.rank)
    A = torch.zeros(shape_A, dtype=dtype, device=weight.device)
    B = torch.zeros(shape_B, dtype=dtype, device=weight.device)
    if isinstance(
        leaf, Embedding
    ):  # a row of A is met by one token only, so B is the one that is drawn
        B.copy_(torch.randn(shape_B, generator=generator))
    else:
        bound = shape_A[-1] ** -0.5
        A.copy_((torch.rand(shape_A, generator=generator) * 2 - 1) * bound)
    magnitude = lengths(leaf, weight.to(dtype)) if args.dora else None
    return LoraWeights(A, B, args.alpha, args.scaling, dropout=args.dropout, magnitude=magnitude)


def targeted(known: Mapping[str, Leaf], targets: Iterable[str]) -> dict[str, Leaf]:
    """The leaves that `targets` name: roles, or regular expressions that fit the end of a name."""
    out: dict[str, Leaf] = {}
    for target in targets:
        try:
            found = {path: leaf for path, leaf in known.items() if fits(target, path)}
        except re.error as error:
            raise RequestError(f"targets: {target!r} is no regular expression ({error})") from None
        if not found:
            roles = [role for role in ROLES if any(fits(role, path) for path in known)]
            ends = {path.rpartition(".")[2] for path in known}
            raise RequestError(
                f"targets: {target!r} fits no weight of this model; expected "
                f"{', '.join(roles)}, or a pattern "
                f"for the end of a name such as wq{nearest(target, (*roles, *ends))}"
            )
        out |= found
    return {path: leaf for path, leaf in known.items() if path in out}


def fits(target: str, path: str) -> bool:
    """Whether a role or pattern means this leaf; roles leave embeddings, output and images
    alone.
    """
    if target == "all-linear":
        return role_of(path) in ROLES
    if target == "ffn":  # a shared expert is one that every token visits
        return role_of(path) in ("ffn", "shared_experts")
    if target in ROLES:
        return role_of(path) == target
    return re.fullmatch(rf"(.*\.)?({target})", path) is not None


def saved_modules(model: LLM, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules with parameters of their own that `modules_to_save` names by the ends of their
    names.
    """
    out: dict[str, nn.Module] = {}
    owners = {
        path: module
        for path, module in model.named_modules()
        if any(True for _ in module.parameters(False))
    }
    for name in names:
        found = {
            p: m
            for p, m in owners.items()
            if p == name or p.endswith(f".{name}") or f".{name}." in f".{p}."
        }
        if not found:
            ends = {path.rpartition(".")[2] for path in owners}
            raise RequestError(
                f"modules_to_save: {name!r} is no module of this model{nearest(name, ends)}"
            )
        out |= found
    return out
