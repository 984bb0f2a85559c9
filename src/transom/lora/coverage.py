"""The coverage report: which weights train and which do not, role by role, before the first
step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from transom.lora.adapters import Adapters, adapted_modules
from transom.lora.weights import Replacement
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized

# In the order of the report; other parameters are reported under their own names, last.
ORDER = (
    *(
        "tok_embeddings",
        "attention",
        "ffn",
        "experts",
        "shared_experts",
        "router",
        "norms",
        "output",
    ),
    "vision",
)


def role_of(path: str) -> str:
    """Return the role of a module (see `ORDER`), or its name if it has none of them."""
    parts = path.split(".")
    if parts[0] == "vision":
        return "vision"
    if parts[-1] == "router":
        return "router"
    if "norm" in parts[-1]:
        return "norms"
    if parts[0] != "layers" or len(parts) < 4:
        return path
    if parts[2] != "feed_forward":
        return "attention"
    if "experts" in parts:
        return "experts"
    return "shared_experts" if "shared_expert" in parts else "ffn"


@dataclass
class Role:
    """The weights of one role.

    Attributes:
        name: the role.
        modules: modules with parameters of their own.
        training: modules of which something trains.
        new: numbers in adapters that train.
        whole: numbers of the model that train themselves.
        parameters: numbers of the model.
    """

    name: str
    modules: int = 0
    training: int = 0
    new: int = 0
    whole: int = 0
    parameters: int = 0

    @property
    def how(self) -> str:
        """`adapter`, `whole` or `frozen`."""
        return "adapter" if self.new else "whole" if self.whole else "frozen"


def coverage(model: LLM) -> list[Role]:
    """Return every role of the model. A tied weight counts once, as the embedding."""
    roles: dict[str, Role] = {}
    by_path = {path: adapters for path, _, adapters in adapted_modules(model)}
    seen: set[int] = set()
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if id(p) not in seen]
        if ".lora" in path or not own:
            continue
        seen.update(id(parameter) for parameter in own)
        name = role_of(path)
        role = roles.setdefault(name, Role(name))
        new = _training(_new_parameters(by_path.get(path)))
        whole = _training(own)
        role.modules += 1
        role.training += bool(new or whole)
        role.new += new
        role.whole += whole
        # The codes of a quantized leaf count, and its scales do not.
        role.parameters += (
            module.count if isinstance(module, Quantized) else sum(p.numel() for p in own)
        )
    places = {name: place for place, name in enumerate(ORDER)}
    return sorted(roles.values(), key=lambda role: places.get(role.name, len(ORDER)))


def _new_parameters(adapters: Adapters | None) -> Iterable[nn.Parameter]:
    """Return the parameters of adapters that are not copies of the model's own."""
    parts = () if adapters is None else adapters.values()
    return [p for part in parts if not isinstance(part, Replacement) for p in part.parameters()]


def _training(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad)


def coverage_lines(model: LLM) -> list[str]:
    """Return the report as lines: one per role, then the sum."""
    roles = coverage(model)
    trained = sum(role.new + role.whole for role in roles)
    total = sum(role.parameters for role in roles)
    lines = ["what trains      how      modules            trained     parameters"]
    for role in roles:
        share = f"{role.training} of {role.modules}"
        lines.append(
            f"  {role.name:<14} {role.how:<8} {share:<10} "
            f"{role.new + role.whole:>14,} {role.parameters:>14,}"
        )
    share = f"{trained / total if total else math.nan:.2%}"
    lines.append(f"  total: {trained:,} of {total:,} parameters train ({share})")
    return lines
