"""Merging active adapters into the weights, reversibly or for good."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.layers.linear import Embedding
from transom.lora.adapters import (
    Adapters,
    active_adapters,
    adapted_modules,
    adapter_names,
    refuse_merged,
    remove_adapter,
)
from transom.lora.args import CombineArgs
from transom.lora.combine import combined, scale_adapters
from transom.lora.weights import LEAVES, Leaf, dora_factor, weight_delta
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def merge_adapter(model: M) -> M:
    """Merge the active adapters into the weights, in place; `unmerge_adapter` restores every bit.

    The sum is computed in float32 or wider and cast once. The weights from before stay in host
    memory.

    Returns:
        The model.

    Raises:
        RequestError: no adapter is active, one is merged already, or one is on a quantized leaf or
            on embeddings that are the output too.
    """
    for leaf, adapters in _to_merge(model):
        merged = merged_weight(leaf, adapters)
        adapters.base = leaf.weight.detach().to("cpu", copy=True)
        leaf.weight.copy_(merged)
        adapters.merged = True
    return model


def _to_merge(model: nn.Module) -> list[tuple[Leaf, Adapters]]:
    """Return the leaves with active adapters, after checking that all of them can be merged."""
    refuse_merged(model, "the adapters cannot be merged again")
    if not active_adapters(model):
        raise RequestError("no adapter is active; expected a model with one or more to merge")
    work: list[tuple[Leaf, Adapters]] = []
    for path, module, adapters in adapted_modules(model):
        if isinstance(module, LEAVES) and adapters.active_lora():
            if isinstance(module, Quantized):
                raise RequestError(
                    f"{path} is quantized, and its codes cannot hold the sum; "
                    f"expected a dense model (dequantize_model)"
                )
            if (
                isinstance(module, Embedding)
                and isinstance(model, LLM)
                and model.args.tie_embeddings
            ):
                raise RequestError(
                    f"adapter {adapters.active[0]!r} is on {path}, which is the output "
                    f"too (tie_embeddings) and would "
                    "change with it; expected to keep the adapter apart"
                )
            work.append((module, adapters))
    return work


@torch.no_grad()
def fold_adapters(
    model: M, args: CombineArgs | None = None, weights: Mapping[str, float] | None = None
) -> M:
    """Merge the active adapters into the model for good, in place, and remove all adapters.

    Active whole modules become those of the model, in its dtype. No copy of the weights from before
    is kept.

    Args:
        model: the model.
        args: how several adapters on one leaf are combined; default: summed.
        weights: factors by name of adapter; default: 1 each.

    Returns:
        The model.

    Raises:
        RequestError: as `merge_adapter`, or an adapter that replaces weights has a factor or
            another method than linear.
    """
    args, weights = args or CombineArgs(), weights or {}
    draws = torch.Generator().manual_seed(args.seed)
    linear = args.method == "linear"
    if linear:
        scale_adapters(model, weights)
    for leaf, adapters in _to_merge(model):
        merged = (
            merged_weight(leaf, adapters)
            if linear
            else _combined(leaf, adapters, weights, args, draws)
        )
        leaf.weight.copy_(merged)
    for _, module, adapters in adapted_modules(model):
        for key, own in adapters.replaced.items():
            own.copy_(module.get_parameter(key))
    for name in adapter_names(model):
        remove_adapter(model, name)
    return model


def _combined(
    leaf: Leaf,
    adapters: Adapters,
    weights: Mapping[str, float],
    args: CombineArgs,
    draws: torch.Generator,
) -> Tensor:
    """Return the leaf's weight plus the combined changes of its active adapters."""
    named = [(name, lora) for name in adapters.active if (lora := adapters.lora(name))]
    if any(lora.magnitude is not None for _, lora in named):
        raise RequestError(
            f"method: got {args.method!r}; expected linear, with one adapter, as it is DoRA"
        )
    deltas = [lora.scale * weight_delta(leaf, lora) for _, lora in named]
    change = combined(deltas, [weights.get(name, 1.0) for name, _ in named], args, draws)
    return leaf.weight.detach().to(change.dtype) + change


@torch.no_grad()
def unmerge_adapter(model: M) -> M:
    """Undo `merge_adapter`: every weight has the bits from before, and the adapters act beside it
    again.

    Returns:
        The model.

    Raises:
        RequestError: no adapter is merged.
    """
    merged = [one for one in adapted_modules(model) if one[2].merged]
    if not merged:
        raise RequestError("no adapter is merged; expected a model after merge_adapter")
    for _, module, adapters in merged:
        assert isinstance(module, LEAVES) and adapters.base is not None, "merging stores it"
        module.weight.copy_(adapters.base)
        adapters.base, adapters.merged = None, False
    return model


def merged_weight(leaf: Leaf, adapters: Adapters) -> Tensor:
    """Return the weight that computes the same as leaf and active adapters, in float32 or wider."""
    wide = torch.promote_types(leaf.weight.dtype, torch.float32)
    whole = leaf.weight.detach().to(wide)
    for lora in adapters.active_lora():
        whole = whole + lora.scale * weight_delta(leaf, lora)
    for lora in adapters.active_lora():
        # DoRA is the only adapter of its leaf, as `activate_adapters` checks.
        if lora.magnitude is not None:
            factor = dora_factor(leaf, lora).to(whole.dtype)
            whole = whole * (factor if isinstance(leaf, Embedding) else factor.unsqueeze(-1))
    return whole
