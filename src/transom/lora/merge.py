"""Active adapters into the weights, and out again bit for bit; or into them for good, several as
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError
from transom.lora.adapters import (
    LEAVES,
    Adapters,
    Embedding,
    Leaf,
    active_adapters,
    adapter_names,
    carriers,
    direction_factor,
    refuse_merged,
    remove_adapter,
    update,
)
from transom.lora.combine import combined, weigh_adapters
from transom.lora.combine_args import CombineArgs
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def merge_adapter(model: M) -> M:
    """Fold the active adapters into the weights in place; `unmerge_adapter` restores the weights
    from before.

    The sum is made in float32 or better and cast once; the weights from before are kept in host
    memory. None active, or an adapter on embeddings that are the output too, is a `RequestError`.
    """
    for leaf, held in _to_merge(model):
        merged = merged_weight(leaf, held)
        held.base = leaf.weight.detach().to("cpu", copy=True)
        leaf.weight.copy_(merged)
        held.merged = True
    return model


def _to_merge(model: nn.Module) -> list[tuple[Leaf, Adapters]]:
    """The leaves with active adapters, once it is sure that all of them can be merged."""
    refuse_merged(model, "the adapters cannot be merged again")
    if not active_adapters(model):
        raise RequestError("no adapter is active; expected a model with one or more to merge")
    work: list[tuple[Leaf, Adapters]] = []
    for path, module, held in carriers(model):
        if isinstance(module, LEAVES) and held.active_lora():
            if isinstance(module, Quantized):
                raise RequestError(
                    f"{path} is quantized, and four bits cannot hold the sum; expected to "
                    f"make the model dense first (dequantize_model)"
                )
            if (
                isinstance(module, Embedding)
                and isinstance(model, LLM)
                and model.args.tie_embeddings
            ):
                raise RequestError(
                    f"adapter {held.active[0]!r} is on {path}, which is the output too "
                    f"(tie_embeddings) and would change with it; expected to keep it apart"
                )
            work.append((module, held))
    return work


@torch.no_grad()
def fold_adapters(
    model: M, args: CombineArgs | None = None, weights: Mapping[str, float] | None = None
) -> M:
    """Make the active adapters part of the model for good, in place; no adapter is left, and no
    copy is kept.

    `args` says how several on one leaf are combined (default: added up), `weights` how much of each
    (default: 1). Active whole modules become the model's.
    """
    args = CombineArgs() if args is None else args
    weights = {} if weights is None else weights
    draws = torch.Generator().manual_seed(args.seed)
    if args.method == "linear":
        weigh_adapters(model, weights)
    for leaf, held in _to_merge(model):
        added = args.method == "linear"
        leaf.weight.copy_(
            merged_weight(leaf, held) if added else _combined(leaf, held, weights, args, draws)
        )
    for _, module, held in carriers(model):
        for (
            key,
            own,
        ) in held.replaced.items():  # the model's own take the values, in their own dtype
            own.copy_(module.get_parameter(key))
    for name in adapter_names(model):
        remove_adapter(model, name)
    return model


def _combined(
    leaf: Leaf,
    held: Adapters,
    weights: Mapping[str, float],
    args: CombineArgs,
    draws: torch.Generator,
) -> Tensor:
    """The leaf's weight and its active adapters' changes, put together as `args` says."""
    named = [(name, lora) for name in held.active if (lora := held.lora(name)) is not None]
    if any(lora.magnitude is not None for _, lora in named):
        raise RequestError(
            f"method: got {args.method!r}; an adapter here is DoRA, which changes lengths and adds "
            f"nothing; expected linear, with one adapter"
        )
    deltas = [lora.scale * update(leaf, lora) for _, lora in named]
    change = combined(deltas, [weights.get(name, 1.0) for name, _ in named], args, draws)
    return leaf.weight.detach().to(change.dtype) + change


@torch.no_grad()
def unmerge_adapter(model: M) -> M:
    """Undo `merge_adapter`: every weight has the bits it had before, and the adapters act beside it
    again.
    """
    merged = [(module, held) for _, module, held in carriers(model) if held.merged]
    if not merged:
        raise RequestError("no adapter is merged; expected a model after merge_adapter")
    for module, held in merged:
        assert isinstance(module, LEAVES) and held.base is not None, "what merging leaves behind"
        module.weight.copy_(held.base)
        held.base, held.merged = None, False
    return model


def merged_weight(leaf: Leaf, held: Adapters) -> Tensor:
    """The weight that does what leaf and active adapters do, in float32 or better."""
    wide = torch.promote_types(leaf.weight.dtype, torch.float32)
    whole = leaf.weight.detach().to(wide)
    for lora in held.active_lora():
        whole = whole + lora.scale * update(leaf, lora)
    for lora in held.active_lora():
        if lora.magnitude is not None:  # alone on its leaf: `activate_adapters` saw to it
            factor = direction_factor(leaf, lora).to(whole.dtype)
            whole = whole * (factor if isinstance(leaf, Embedding) else factor.unsqueeze(-1))
    return whole
