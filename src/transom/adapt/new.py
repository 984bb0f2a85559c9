"""New adapters on a built model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from transom.adapt.lora import (
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
from transom.adapt.lora_args import ROLES, LoraArgs
from transom.errors import RequestError, nearest, notice
from transom.model import LLM


def apply_lora(model: LLM, args: LoraArgs, name: str = "default", seed: int = 0) -> LLM:
    """A new adapter that changes nothing yet, active, with every other parameter frozen; in place, and returned.

    Says on stderr which share of which kind of leaf it covers. A target that fits no leaf is a `RequestError`.
    """
    known = leaves(model)
    chosen = targeted(known, args.targets)
    whole = saved_modules(model, args.modules_to_save)
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, LoraWeights | Replacement] = {
        path: fresh(leaf, args, generator) for path, leaf in chosen.items() if path not in whole
    }
    for path, module in whole.items():
        copies = {key: own.detach().clone() for key, own in module.named_parameters(recurse=False)}
        parts[path] = Replacement(copies)
    attach(model, name, parts)
    activate_adapters(model, (name,))
    train_adapters(model, (name,))
    notice(coverage(model, known, parts, args))
    return model


def fresh(leaf: Leaf, args: LoraArgs, generator: torch.Generator) -> LoraWeights:
    """A as `nn.Linear` starts and B zero, as mistral-finetune and PEFT do; in float32 or better."""
    dtype = torch.promote_types(leaf.weight.dtype, torch.float32)
    if isinstance(leaf, Embedding):
        shape_A: tuple[int, ...] = (args.rank, leaf.weight.size(0))
        shape_B: tuple[int, ...] = (leaf.weight.size(1), args.rank)
    else:
        *groups, outputs, inputs = leaf.weight.shape
        shape_A, shape_B = (*groups, args.rank, inputs), (*groups, outputs, args.rank)
    A = torch.zeros(shape_A, dtype=dtype, device=leaf.weight.device)
    B = torch.zeros(shape_B, dtype=dtype, device=leaf.weight.device)
    if isinstance(leaf, Embedding):  # a row of A is met by one token only, so B is the one that is drawn
        B.copy_(torch.randn(shape_B, generator=generator))
    else:
        bound = shape_A[-1] ** -0.5
        A.copy_((torch.rand(shape_A, generator=generator) * 2 - 1) * bound)
    magnitude = lengths(leaf, leaf.weight.detach().to(dtype)) if args.dora else None
    return LoraWeights(A, B, args.alpha, args.scaling, dropout=args.dropout, magnitude=magnitude)


def role_of(path: str) -> str:
    """What a leaf of the text model is for: attention, ffn, experts, or its own name outside the blocks."""
    parts = path.split(".")
    if parts[0] != "layers" or len(parts) < 4:
        return path
    if parts[2] == "feed_forward":
        return "experts" if "experts" in parts else "ffn"
    return "attention"


def targeted(known: Mapping[str, Leaf], targets: Iterable[str]) -> dict[str, Leaf]:
    """The leaves that `targets` name: roles, or regular expressions that fit the end of a name."""
    out: dict[str, Leaf] = {}
    for target in targets:
        try:
            found = {path: leaf for path, leaf in known.items() if fits(target, path)}
        except re.error as error:
            raise RequestError(f"targets: {target!r} is no regular expression ({error})") from None
        if not found:
            ends = {path.rpartition(".")[2] for path in known}
            raise RequestError(
                f"targets: {target!r} fits no weight of this model; accepted is {', '.join(ROLES)}, or a pattern "
                f"for the end of a name such as wq{nearest(target, (*ROLES, *ends))}"
            )
        out |= found
    return {path: leaf for path, leaf in known.items() if path in out}


def fits(target: str, path: str) -> bool:
    """Whether a role or pattern means this leaf; roles leave embeddings, output and images alone."""
    if target == "all-linear":
        return role_of(path) in ROLES
    if target in ROLES:
        return role_of(path) == target
    return re.fullmatch(rf"(.*\.)?({target})", path) is not None


def saved_modules(model: LLM, names: Iterable[str]) -> dict[str, nn.Module]:
    """The modules with parameters of their own that `modules_to_save` names by the ends of their names."""
    out: dict[str, nn.Module] = {}
    owners = {path: module for path, module in model.named_modules() if any(True for _ in module.parameters(False))}
    for name in names:
        found = {p: m for p, m in owners.items() if p == name or p.endswith(f".{name}") or f".{name}." in f".{p}."}
        if not found:
            ends = {path.rpartition(".")[2] for path in owners}
            raise RequestError(f"modules_to_save: {name!r} is no module of this model{nearest(name, ends)}")
        out |= found
    return out


def coverage(
    model: nn.Module, known: Mapping[str, Leaf], parts: Mapping[str, LoraWeights | Replacement], args: LoraArgs
) -> str:
    """One line: how many leaves of each kind train, so that experts left out are seen."""
    counts: dict[str, list[int]] = {}
    for path in known:
        entry = counts.setdefault(role_of(path) if not path.startswith("vision.") else "vision", [0, 0])
        entry[0] += path in parts
        entry[1] += 1
    shares = ", ".join(f"{role} {done} of {total}" for role, (done, total) in counts.items())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    kind = "DoRA" if args.dora else "LoRA"
    return f"{kind} of rank {args.rank} on leaves of {shares}; {trained:,} of {total:,} parameters train"
