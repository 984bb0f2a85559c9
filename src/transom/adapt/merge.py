"""Active adapters into the weights, and out again bit for bit."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from transom.adapt.lora import (
    LEAVES,
    Adapters,
    Embedding,
    Leaf,
    active_adapters,
    carriers,
    direction_factor,
    refuse_merged,
    update,
)
from transom.errors import RequestError
from transom.model import LLM

M = TypeVar("M", bound=nn.Module)


@torch.no_grad()
def merge_adapter(model: M) -> M:
    """Fold the active adapters into the weights in place; `unmerge_adapter` restores the weights from before.

    The sum is made in float32 or better and cast once; the weights from before are kept in host memory. None
    active, or an adapter on embeddings that are the output too, is a `RequestError`.
    """
    refuse_merged(model, "the adapters cannot be merged again")
    if not active_adapters(model):
        raise RequestError("no adapter is active; accepted is a model with one or more to merge")
    work: list[tuple[Leaf, Adapters]] = []
    for path, module, held in carriers(model):
        if isinstance(module, LEAVES) and held.active_lora():
            if isinstance(module, Embedding) and isinstance(model, LLM) and model.args.tie_embeddings:
                raise RequestError(
                    f"adapter {held.active[0]!r} is on {path}, which is the output too (tie_embeddings) and would "
                    "change with it; accepted is to keep it apart"
                )
            work.append((module, held))
    for leaf, held in work:
        merged = merged_weight(leaf, held)
        held.base = leaf.weight.detach().to("cpu", copy=True)
        leaf.weight.copy_(merged)
        held.merged = True
    return model


@torch.no_grad()
def unmerge_adapter(model: M) -> M:
    """Undo `merge_adapter`: every weight has the bits it had before, and the adapters act beside it again."""
    merged = [(module, held) for _, module, held in carriers(model) if held.merged]
    if not merged:
        raise RequestError("no adapter is merged; accepted is a model after merge_adapter")
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
