"""Low-rank adapters as children of the leaves: `wq.lora.NAME.A`, `wq.lora.NAME.B`.

A forward hook of the leaf adds the output of its active adapters, so the keys of the model's own
weights stay the same and no code of the model knows of adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transom.base.errors import RequestError, expect
from transom.layers.latent_attention import LatentAttention
from transom.layers.linear import Linear
from transom.lora.weights import LEAVES, Leaf, LoraWeights, Replacement, adapted_output
from transom.quantize.leaves import quantized_leaves


class Adapters(nn.ModuleDict):
    """The adapters of one module by name: `LoraWeights` on a leaf, or a `Replacement` on any
    module.

    Attributes:
        active: names of the adapters in use.
        merged: whether the active adapters are merged into the weight.
        base: the weight before merging, in host memory; None while nothing is merged.
        replaced: the module's own parameters while a replacement is active.
        hooks: the hooks of the module that compute with its adapters.

    `base` and `replaced` are not in the state dict.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.merged = False
        self.base: Tensor | None = None
        self.replaced: dict[str, nn.Parameter] = {}
        self.hooks: list[RemovableHandle] = []

    def lora(self, name: str) -> LoraWeights | None:
        """Return the low-rank part of adapter `name`, or None."""
        part = self._modules.get(name)
        return part if isinstance(part, LoraWeights) else None

    def active_lora(self) -> list[LoraWeights]:
        """Return the low-rank parts in use."""
        parts = [self.lora(name) for name in self.active]
        return [part for part in parts if part is not None]

    def drop_replaced(self) -> None:
        """Keep only the dtypes of replaced parameters: the active replacement stays."""
        self.replaced = {
            key: nn.Parameter(own.new_empty(0), False) for key, own in self.replaced.items()
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapters:
        """Move and cast replaced parameters along with the model."""
        for key, own in self.replaced.items():
            self.replaced[key] = nn.Parameter(fn(own.detach()), own.requires_grad)
        super()._apply(fn, recurse)
        return self


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, Adapters]]:
    """Yield (name, module, its adapters) for every module that has adapters."""
    for name, module in model.named_modules():
        adapters = module._modules.get("lora")
        if isinstance(adapters, Adapters):
            yield name, module, adapters


def leaves(model: nn.Module) -> dict[str, Leaf]:
    """Return the leaves that can have an adapter, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LEAVES)}


def adapters_of(module: nn.Module) -> Adapters:
    """Return the adapters of a module; the first call adds the empty container, and the hook of
    a leaf.
    """
    adapters = module._modules.get("lora")
    if isinstance(adapters, Adapters):
        return adapters
    made = Adapters()
    if isinstance(module, LEAVES):
        made.hooks.append(module.register_forward_hook(_add_adapters))
    module.add_module("lora", made)
    return made


def _present(module: nn.Module) -> Adapters:
    """Return the adapters of a module that has some, in code that torch.compile can trace."""
    adapters = module._modules["lora"]
    assert isinstance(adapters, Adapters), "hooks come with adapters"
    return adapters


def _add_adapters(leaf: Leaf, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    """Forward hook of a leaf: add the active adapters to its output."""
    adapters = _present(leaf)
    if adapters.merged:
        return output
    out = output
    for lora in adapters.active_lora():
        out = adapted_output(leaf, lora, inputs, out)
    return out.to(output.dtype)


def _widen_input(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward pre-hook of a `Linear` with a replacement: cast the input to the dtype of a wider
    replacement.
    """
    x = inputs[0]
    if "weight" not in _present(module).replaced or torch.is_autocast_enabled(x.device.type):
        return None
    weight = module._parameters["weight"]
    assert weight is not None, "it replaces the module's own"
    return (x.to(torch.promote_types(x.dtype, weight.dtype)), *inputs[1:])


def _narrow_output(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    """Forward hook of a module with a replacement: cast the output back to the dtype of the
    module's own weights.
    """
    for key, own in _present(module).replaced.items():
        current = module._parameters[key]
        if isinstance(output, Tensor) and current is not None and current.dtype != own.dtype:
            return output.to(own.dtype)
    return output


def attach(model: nn.Module, name: str, parts: dict[str, LoraWeights | Replacement]) -> None:
    """Add adapter `name` to a model, not active yet.

    Args:
        model: the model, changed in place.
        name: a word without dots.
        parts: the parts of the adapter, by name of module.

    Raises:
        RequestError: the name is taken or cannot be part of a key, or adapters are merged.
    """
    if not name or "." in name or name in dir(Adapters()):
        raise RequestError(
            f"adapter name: got {name!r}; expected a word without dots that torch "
            f"does not use itself"
        )
    if name in adapter_names(model):
        raise RequestError(
            f"adapter: got {name!r}, which exists; expected another name, or to remove it first"
        )
    refuse_merged(model, f"adapter {name!r} cannot be added")
    for path, part in parts.items():
        module = model.get_submodule(path)
        adapters = adapters_of(module)
        if isinstance(part, Replacement) and not any(
            isinstance(one, Replacement) for one in adapters.values()
        ):
            adapters.hooks.append(module.register_forward_hook(_narrow_output))
            if isinstance(module, Linear):  # all others cast their parameters to what they need
                adapters.hooks.append(module.register_forward_pre_hook(_widen_input))
        adapters.add_module(name, part.train(module.training))
        owner = model.get_submodule(path.rpartition(".")[0])
        if isinstance(owner, LatentAttention) and path.endswith(".wkv_b"):
            # The absorbed form multiplies by the weight of wkv_b without calling the leaf; the
            # expanded form calls it.
            vars(owner)["absorbed"] = owner.expanded


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """Return the names of all adapters of a model, in the order in which they were added."""
    return tuple(
        dict.fromkeys(name for _, _, adapters in adapted_modules(model) for name in adapters)
    )


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters in use."""
    return tuple(
        dict.fromkeys(name for _, _, adapters in adapted_modules(model) for name in adapters.active)
    )


def refuse_merged(model: nn.Module, what: str) -> None:
    """Raise `RequestError` while adapters are merged; `what` is what cannot be done."""
    if any(adapters.merged for _, _, adapters in adapted_modules(model)):
        raise RequestError(f"{what}: adapters are merged into the weights; unmerge them first")


def _check_known(model: nn.Module, name: str) -> None:
    known = adapter_names(model)
    expect(name in known, "adapter", name, ", ".join(known) or "none, as there is none")


def activate_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Use exactly these adapters from now on, summed in this order; no name turns all off.

    Raises:
        RequestError: a name is unknown, adapters are merged, one of several replaces parameters of
            a module that another one changes too, or replaced parameters were dropped.
    """
    for name in names:
        _check_known(model, name)
    refuse_merged(model, f"adapters {list(names)} cannot be chosen")
    for path, _, adapters in adapted_modules(model):
        _check_sum(path, [name for name in names if name in adapters], adapters)
        complete = all(own.numel() for own in adapters.replaced.values())
        expected = (
            "the adapter to stay active, since ranks do not keep the weights that it replaces"
        )
        expect(complete, "modules_to_save", path, expected)
    for _, module, adapters in adapted_modules(model):
        adapters.active = tuple(dict.fromkeys(name for name in names if name in adapters))
        _replace(module, adapters)


def _check_sum(path: str, chosen: list[str], adapters: Adapters) -> None:
    whole = [
        name
        for name in chosen
        if (lora := adapters.lora(name)) is None or lora.magnitude is not None
    ]
    if whole and len(chosen) > 1:
        raise RequestError(
            f"adapters: got {chosen}; expected one at a time, as {whole[0]!r} "
            f"replaces {path} or its length (DoRA)"
        )


def _replace(module: nn.Module, adapters: Adapters) -> None:
    """Put the module's own parameters back, then those of the active replacement in their place."""
    module._parameters.update(adapters.replaced)
    adapters.replaced = {}
    for name in adapters.active:
        part = adapters[name]
        for key, parameter in part.named_parameters() if isinstance(part, Replacement) else ():
            adapters.replaced[key] = module.get_parameter(key)
            module._parameters[key] = parameter


def tie_replacements(model: nn.Module) -> None:
    """Let active replacements have the parameters of their modules.

    `nn.Module.to_empty` makes two parameters of one that two modules have.
    """
    for _, module, adapters in adapted_modules(model):
        for name in adapters.active if adapters.replaced else ():
            for key in adapters.replaced:
                adapters[name]._parameters[key] = module._parameters[key]


def remove_adapter(model: nn.Module, name: str) -> None:
    """Remove one adapter; the model is then as if it had never been there. Raise `RequestError`
    for an unknown name.
    """
    _check_known(model, name)
    activate_adapters(model, [other for other in active_adapters(model) if other != name])
    for path, module, adapters in list(adapted_modules(model)):
        if name in adapters:
            del adapters[name]
        if not adapters:
            for hook in adapters.hooks:
                hook.remove()
            del module._modules["lora"]
            if path.endswith(".wkv_b"):
                vars(model.get_submodule(path.rpartition(".")[0])).pop("absorbed", None)


def train_adapters(model: nn.Module, names: Collection[str]) -> None:
    """Let exactly the parameters of these adapters require gradients, and no others of the
    model.
    """
    model.requires_grad_(False)
    for _, _, adapters in adapted_modules(model):
        for own in adapters.replaced.values():
            own.requires_grad_(False)
        for name in names:
            if name in adapters:
                adapters[name].requires_grad_(True)


def plain_weights(model: nn.Module, *, quantized: bool = False) -> dict[str, nn.Parameter]:
    """Return the parameters of a model without its adapters, as it multiplies by them now, for
    saving the model.

    Active replacements are cast to the dtype of the parameters that they replace.

    Args:
        model: the model.
        quantized: leave out the parts of quantized leaves.

    Raises:
        RequestError: adapters are active and not merged, so that they would be lost, or weights are
            quantized and are not to be left out.
    """
    leaves = quantized_leaves(model)
    for path in leaves if not quantized else ():
        raise RequestError(
            f"{path} is quantized; expected a dense model (dequantize_model), or to "
            f"save its adapter alone"
        )
    for path, _, adapters in adapted_modules(model):
        if not adapters.merged and adapters.active_lora():
            raise RequestError(
                f"{path}: adapter {adapters.active[0]!r} is active; expected to merge it "
                f"first (merge_adapter), or to save "
                "it alone (save_adapter)"
            )
    inside = tuple(f"{path}.lora." for path, _, _ in adapted_modules(model))
    inside += tuple(f"{path}.{name}" for path, leaf in leaves.items() for name in leaf.part_names)
    # A tied or replaced parameter has two names; the first one is that in the module it belongs to.
    named = model.named_parameters(remove_duplicate=False)
    out = {name: parameter for name, parameter in named if not name.startswith(inside)}
    for path, _, adapters in adapted_modules(model):
        for key, own in adapters.replaced.items():
            name = f"{path}.{key}"
            if out[name].dtype != own.dtype:
                out[name] = nn.Parameter(out[name].detach().to(own.dtype), requires_grad=False)
    return out
