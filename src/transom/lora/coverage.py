"""What trains and what does not, role by role: experts that an adapter leaves out are to be seen
before step 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from transom.layers.moe import MoE
from transom.lora.adapters import Replacement, carriers
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized

# In the order of the report; what is none of these is reported under its own name.
ORDER = (
    "tok_embeddings",
    "attention",
    "ffn",
    "experts",
    "shared_experts",
    "router",
    "norms",
    "output",
    "vision",
)


def role_of(path: str) -> str:
    """What a leaf of the text model is for: one of `lora_args.ROLES`, or its own name outside the
    blocks.
    """
    parts = path.split(".")
    if parts[0] != "layers" or len(parts) < 4:
        return path
    if parts[2] == "feed_forward":
        return (
            "experts"
            if "experts" in parts
            else "shared_experts"
            if "shared_expert" in parts
            else "ffn"
        )
    return "attention"


@dataclass
class Role:
    """Weights of one role: modules that have some, modules of which some train, and what trains of
    how much.
    """

    name: str
    modules: int = 0
    training: int = 0
    new: int = 0  # parameters of adapters
    whole: int = 0  # parameters of the model that train themselves
    parameters: int = 0  # of the model

    @property
    def how(self) -> str:
        """In a word."""
        if self.new:
            return "adapter"
        return "whole" if self.whole else "frozen"


def coverage(model: LLM) -> list[Role]:
    """Every role of the model with what of it trains; a tied weight counts once, where it is the
    embedding.
    """
    roles: dict[str, Role] = {}
    held = {path: adapters for path, _, adapters in carriers(model)}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if ".lora" in path or not own:
            continue
        seen.update(id(parameter) for parameter in own)
        role = roles.setdefault(_role(path, module), Role(_role(path, module)))
        parts = held[path].parameters() if path in held else iter(())
        stand_ins = [
            r for r in (held[path].values() if path in held else ()) if isinstance(r, Replacement)
        ]
        copies = {id(p) for part in stand_ins for p in part.parameters()}
        new = sum(p.numel() for p in parts if p.requires_grad and id(p) not in copies)
        whole = sum(p.numel() for p in own if p.requires_grad)
        role.modules += 1
        role.training += bool(new or whole)
        role.new += new
        role.whole += whole
        role.parameters += _count(module, own)
    return sorted(
        roles.values(),
        key=lambda role: ORDER.index(role.name) if role.name in ORDER else len(ORDER),
    )


def _role(path: str, module: nn.Module) -> str:
    parts = path.split(".")
    if parts[0] == "vision":
        return "vision"
    if path.endswith(".router"):
        return "router"
    if "norm" in parts[-1]:
        return "norms"
    return role_of(path)


def _count(module: nn.Module, own: Iterable[Tensor]) -> int:
    """Numbers of the model, which a quantized leaf holds two of in a byte, its scales aside."""
    if isinstance(module, Quantized):
        return module.count
    return sum(parameter.numel() for parameter in own)


def coverage_lines(model: LLM) -> list[str]:
    """The report: one line per role, and the sum."""
    roles = coverage(model)
    trained = sum(role.new + role.whole for role in roles)
    total = sum(role.parameters for role in roles)
    lines = ["what trains      how      modules        parameters of so many"]
    for role in roles:
        of = f"{role.training} of {role.modules}"
        lines.append(
            f"  {role.name:<14} {role.how:<8} {of:<10} {role.new + role.whole:>14,} "
            f"{role.parameters:>14,}"
        )
    share = trained / total if total else math.nan
    lines.append(
        f"  in all: {trained:,} parameters train beside {total:,} of the model ({share:.2%})"
    )
    if any(isinstance(module, MoE) for module in model.modules()):
        state = next((role.how for role in roles if role.name == "router"), "frozen")
        lines.append(
            f"  routers: {'trained whole' if state == 'whole' else state}; balancing losses act "
            f"on what trains"
        )
    return lines
