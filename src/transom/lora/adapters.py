"""Low-rank adapters as children of the leaves: `wq.lora.NAME.A`, `wq.lora.NAME.B`.

A forward hook of the leaf adds what its active adapters say, so no wrapper enters a key and no
model code knows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transom.base.errors import RequestError
from transom.layers.latent_attention import LatentAttention
from transom.layers.linear import Embedding, GroupedLinear, Linear, grouped_product, per_row
from transom.lora.args import Scaling, scale_of
from transom.quantize.leaves import quantized_leaves

Leaf = Linear | GroupedLinear | Embedding
LEAVES = (Linear, GroupedLinear, Embedding)


class LoraWeights(nn.Module):
    """One adapter on one leaf: A [r, in] and B [out, r], with a leading E for experts; `magnitude`
    makes it DoRA.

    For an embedding in is V and out is D. `family` is the foreign table it was read with, kept for
    writing. A parameter given as A is shared: leaves that a foreign model keeps fused have one A
    between them.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        alpha: float,
        scaling: Scaling = "alpha_over_rank",
        *,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        family: str | None = None,
    ) -> None:
        super().__init__()
        self.A = A if isinstance(A, nn.Parameter) else nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.scaling, self.dropout, self.family = alpha, scaling, dropout, family

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.size(-2)

    @property
    def scale(self) -> float:
        """The factor in front of B(A x)."""
        return scale_of(self.scaling, self.alpha, self.rank)

    def drop(self, x: Tensor) -> Tensor:
        """`x` with dropout, in training."""
        return F.dropout(x, self.dropout, self.training and self.dropout > 0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class Replacement(nn.Module):
    """Parameters of one adapter that stand in for a module's own while it is active, under the same
    names.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


class Adapters(nn.ModuleDict):
    """What one module carries, by adapter name: `LoraWeights` on a leaf, or a `Replacement` on any
    module.

    `active` are the names in use. While adapters are merged, `base` is the weight from before;
    while a replacement is active, `replaced` holds the module's own parameters. Neither is in the
    state dict. `hooks` are what the module computes with them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self.base: Tensor | None = None
        self.replaced: dict[str, nn.Parameter] = {}
        self.hooks: list[RemovableHandle] = []

    def lora(self, name: str) -> LoraWeights | None:
        """The low-rank part of adapter `name` here."""
        held = self._modules.get(name)
        return held if isinstance(held, LoraWeights) else None

    def active_lora(self) -> list[LoraWeights]:
        """The low-rank parts in use."""
        parts = [self.lora(name) for name in self.active]
        return [part for part in parts if part is not None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapters:
        """Moves and casts what is replaced along with the model."""
        for key, own in self.replaced.items():
            self.replaced[key] = nn.Parameter(fn(own.detach()), own.requires_grad)
        super()._apply(fn, recurse)
        return self


def carriers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """(name, module, its adapters) for every module that carries any."""
    for name, module in model.named_modules():
        held = module._modules.get("lora")
        if isinstance(held, Adapters):
            yield name, module, held


def leaves(model: nn.Module) -> dict[str, Leaf]:
    """The leaves that can carry an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LEAVES)}


def adapters_of(module: nn.Module) -> Adapters:
    """The container of a module's adapters, made on first use; on a leaf it brings the hook that
    adds them.
    """
    held = module._modules.get("lora")
    if isinstance(held, Adapters):
        return held
    made = Adapters()
    if isinstance(module, LEAVES):
        made.hooks.append(module.register_forward_hook(_add_adapters))
    module.add_module("lora", made)
    return made


def check_name(name: str) -> None:
    """Refuse what cannot be part of a parameter's name."""
    if not name or "." in name or name in dir(Adapters()):
        raise RequestError(
            f"adapter name {name!r}: expected a word without dots that torch does not use itself"
        )


def update(leaf: Leaf, lora: LoraWeights) -> Tensor:
    """B A in the shape of the leaf's weight, in float32 or better, not scaled."""
    # The first of its own parameters: a quantized leaf would make its weight to tell the dtype.
    own = next(leaf.parameters(recurse=False)).dtype
    wide = torch.promote_types(torch.promote_types(lora.A.dtype, own), torch.float32)
    product = lora.B.to(wide) @ lora.A.to(wide)
    return product.mT if isinstance(leaf, Embedding) else product


def lengths(leaf: Leaf, weight: Tensor) -> Tensor:
    """The norm of what makes each output: rows of a matrix, [out] or [E, out]; columns of an
    embedding, [D].
    """
    return torch.linalg.vector_norm(weight, dim=0 if isinstance(leaf, Embedding) else -1)


def direction_factor(leaf: Leaf, lora: LoraWeights) -> Tensor:
    """DoRA's magnitude / norm of W + scale B A, shaped like `lengths`; the norm counts as a
    constant.
    """
    assert lora.magnitude is not None, "asked for DoRA only"
    with torch.no_grad():  # section 4.3 of arXiv 2402.09353
        whole = leaf.weight + lora.scale * update(leaf, lora)
        norm = lengths(leaf, whole)
    return lora.magnitude / norm


def _add_adapters(leaf: Leaf, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """The forward hook: what the leaf computed, plus its active adapters."""
    held = leaf._modules["lora"]
    assert isinstance(held, Adapters), "the hook came with them"
    if held.merged:
        return output
    out = output
    for lora in held.active_lora():
        out = _adapted(leaf, lora, inputs, out)
    return out.to(output.dtype)


def _adapted(leaf: Leaf, lora: LoraWeights, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """`output` with one adapter; products run in the wider dtype of input and adapter."""
    x = inputs[0]
    if isinstance(leaf, Embedding):
        added = F.linear(lora.scale * F.embedding(x, lora.A.mT), lora.B)
        if lora.magnitude is None:
            return output + added
        return direction_factor(leaf, lora) * (output + added)
    wide = torch.promote_types(x.dtype, lora.A.dtype)
    dropped = lora.drop(x)
    # Scaled between the factors, where rows are short: forward and backward each save a pass over
    # the outputs.
    inner = lora.scale * _product(leaf, dropped.to(wide), lora.A.to(wide), inputs)
    added = _product(leaf, inner, lora.B.to(wide), inputs)
    if lora.magnitude is None:
        return output + added
    factor = direction_factor(leaf, lora)
    bias: Tensor | None = leaf.bias
    if isinstance(leaf, GroupedLinear):
        factor = per_row(factor, inputs[1], len(x), fill=1.0)
        bias = None if bias is None else per_row(bias, inputs[1], len(x), fill=0.0)
    # The length is that of the whole, so both parts see one mask.
    own = leaf.forward(dropped, *inputs[1:]) if lora.training and lora.dropout > 0 else output
    plain = own if bias is None else own - bias
    return output + (factor - 1) * plain + factor * added


def _widen(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """The forward pre-hook of a `Linear` with a replacement: its input in the replacement's
    dtype.
    """
    held, x = module._modules["lora"], inputs[0]
    assert isinstance(held, Adapters), "the hook came with them"
    if "weight" not in held.replaced or torch.is_autocast_enabled(x.device.type):
        return None
    weight = module._parameters["weight"]
    assert weight is not None, "it replaces the module's own"
    return (x.to(torch.promote_types(x.dtype, weight.dtype)), *inputs[1:])


def _narrow(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """The forward hook of a module with a replacement: one that is wider than the module's own
    widens no output.
    """
    held = module._modules["lora"]
    assert isinstance(held, Adapters), "the hook came with them"
    for key, own in held.replaced.items():
        current = module._parameters[key]
        if isinstance(output, Tensor) and current is not None and current.dtype != own.dtype:
            return output.to(own.dtype)
    return output


def _product(leaf: Leaf, x: Tensor, weight: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """x times a matrix, transposed; for experts the groups of rows times their own."""
    return (
        grouped_product(x, weight, inputs[1])
        if isinstance(leaf, GroupedLinear)
        else F.linear(x, weight)
    )


def attach(model: nn.Module, name: str, parts: dict[str, LoraWeights | Replacement]) -> None:
    """Give the modules of these names their part of adapter `name`, not active yet; a taken name is
    an error.
    """
    check_name(name)
    if name in adapter_names(model):
        raise RequestError(
            f"adapter {name!r}: there is one of this name; expected another, or remove it first"
        )
    refuse_merged(model, f"adapter {name!r} cannot be added")
    for path, part in parts.items():
        module = model.get_submodule(path)
        held = adapters_of(module)
        if isinstance(part, Replacement) and not any(
            isinstance(other, Replacement) for other in held.values()
        ):
            held.hooks.append(module.register_forward_hook(_narrow))
            if isinstance(module, Linear):  # all others cast their parameters to what they need
                held.hooks.append(module.register_forward_pre_hook(_widen))
        held.add_module(name, part.train(module.training))
        owner = model.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, LatentAttention) and path.endswith(".wkv_b"):
            # The absorbed form multiplies by this weight itself, past the leaf; the expanded one
            # asks the leaf.
            vars(owner)["absorbed"] = owner.expanded


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """All adapters of the model, in the order they came."""
    return tuple(dict.fromkeys(name for _, _, held in carriers(model) for name in held))


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Those in use."""
    return tuple(dict.fromkeys(name for _, _, held in carriers(model) for name in held.active))


def refuse_merged(model: nn.Module, what: str) -> None:
    """A `RequestError` while adapters are merged."""
    if any(held.merged for _, _, held in carriers(model)):
        raise RequestError(f"{what}: adapters are merged into the weights; unmerge them first")


def activate_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Use exactly these adapters from now on, added up in this order; none switches all off."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            raise RequestError(
                f"adapter {name!r}: expected {', '.join(known) or 'nothing, there is none'}"
            )
    refuse_merged(model, f"adapters {list(names)} cannot be chosen")
    for path, _, held in carriers(model):
        chosen = [name for name in names if name in held]
        _refuse_mixtures(path, chosen, held)
    for _, module, held in carriers(model):
        held.active = tuple(dict.fromkeys(name for name in names if name in held))
        _replace(module, held)


def _refuse_mixtures(path: str, chosen: list[str], held: Adapters) -> None:
    """Whatever is no sum cannot be used beside another on one module."""
    whole = [
        name for name in chosen if (lora := held.lora(name)) is None or lora.magnitude is not None
    ]
    if whole and len(chosen) > 1:
        raise RequestError(
            f"adapters {chosen}: {whole[0]!r} replaces {path} or its length (DoRA), which does "
            f"not add up with another; expected one at a time"
        )


def _replace(module: nn.Module, held: Adapters) -> None:
    """Put the module's own parameters back, then those of the active replacement in their place."""
    module._parameters.update(held.replaced)
    held.replaced = {}
    for name in held.active:
        part = held[name]
        for key, parameter in part.named_parameters() if isinstance(part, Replacement) else ():
            own_parameter = module._parameters[key]
            assert own_parameter is not None, "only what the module has is replaced"
            held.replaced[key] = own_parameter
            module._parameters[key] = parameter


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter off; the model is then as if it had never been there."""
    activate_adapters(model, [other for other in active_adapters(model) if other != name])
    if name not in adapter_names(model):
        raise RequestError(
            f"adapter {name!r}: expected {', '.join(adapter_names(model)) or 'nothing'}"
        )
    for path, module, held in list(carriers(model)):
        if name in held:
            del held[name]
        if not held:
            for hook in held.hooks:
                hook.remove()
            del module._modules["lora"]
            if path.endswith(".wkv_b"):
                vars(model.get_submodule(path.rpartition(".")[0])).pop("absorbed", None)


def train_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly the parameters of these adapters train, and no other of the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for _, _, held in carriers(model):
        for own in held.replaced.values():
            own.requires_grad_(False)
        for name in names:
            if name in held:
                held[name].requires_grad_(True)


def plain_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of the model without its adapters, as they are multiplied now; for saving the
    model.

    Active replacements come in the dtype of what they replace. Adapters that are active and not
    merged would be lost, and weights in four bits have no place in a folder, which is a
    `RequestError`.
    """
    for path in quantized_leaves(model):
        raise RequestError(
            f"{path} is quantized; expected to make the model dense first (dequantize_model), "
            f"or to save its adapter alone"
        )
    for path, _, held in carriers(model):
        if not held.merged and held.active_lora():
            raise RequestError(
                f"{path}: adapter {held.active[0]!r} is active; expected to merge it first "
                f"(merge_adapter), or to save it alone (save_adapter)"
            )
    inside = tuple(f"{path}.lora." for path, _, _ in carriers(model))
    # A tied or replaced parameter has two names; the first is that of the module it stands in for.
    named = model.named_parameters(remove_duplicate=False)
    out = {name: parameter for name, parameter in named if not name.startswith(inside)}
    for path, _, held in carriers(model):
        for key, own in held.replaced.items():
            name = f"{path}.{key}"
            if out[name].dtype != own.dtype:
                out[name] = nn.Parameter(out[name].detach().to(own.dtype), requires_grad=False)
    return out
