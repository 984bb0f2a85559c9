"""Silent bugs in merging adapters. The registry is `bugs.py`."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from tests.mutations.planting import Call, changed, changed_everywhere
from transom.checkpoints import fingerprint
from transom.checkpoints.merge import Merge
from transom.lora import merge
from transom.lora.adapters import Adapters, adapted_modules
from transom.lora.weights import LEAVES, Leaf, LoraWeights, weight_delta
from transom.models.llm import LLM


def other_base() -> AbstractContextManager[None]:
    """An adapter is merged into another model than the one it was trained on."""

    def make(original: Call) -> Call:
        @torch.no_grad()
        def merged(self: Merge, model: LLM) -> LLM:
            draws = torch.Generator().manual_seed(7)
            for name, weight in model.named_parameters():
                if ".lora." not in name and weight.ndim > 1:
                    weight.copy_(torch.randn(weight.shape, generator=draws) * weight.std())
            made: LLM = original(self, model)
            return made

        return merged

    return changed(Merge, "merged", make)


def unchecked_base() -> AbstractContextManager[None]:
    """A base is accepted without comparing its fingerprint."""

    def make(original: Call) -> Call:
        return lambda adapter, base, base_fingerprint=None: fingerprint.fingerprint(base)

    return changed_everywhere(fingerprint.check_base, make)


def forgotten_scale() -> AbstractContextManager[None]:
    """Merging adds B A without its scale."""

    def make(original: Call) -> Call:
        def merged_weight(leaf: Leaf, adapters: Adapters) -> Tensor:
            parts = adapters.active_lora()
            merged: Tensor = original(leaf, adapters)
            if any(lora.magnitude is not None for lora in parts):
                return merged
            for lora in parts:
                merged = merged + (1 - lora.scale) * weight_delta(leaf, lora)
            return merged

        return merged_weight

    return changed_everywhere(merge.merged_weight, make)


def transposed_update() -> AbstractContextManager[None]:
    """Merging adds the transpose of B A to square weights."""

    def make(original: Call) -> Call:
        def transposed(leaf: Leaf, lora: LoraWeights) -> Tensor:
            made: Tensor = original(leaf, lora)
            return made.mT if made.size(-1) == made.size(-2) else made

        return transposed

    return changed(merge, "weight_delta", make)


def half_sum() -> AbstractContextManager[None]:
    """Merging adds in bfloat16, so that small changes are rounded twice."""

    def make(original: Call) -> Call:
        def merged_weight(leaf: Leaf, adapters: Adapters) -> Tensor:
            merged: Tensor = original(leaf, adapters)
            own = leaf.weight.detach().to(merged.dtype)
            return (own.bfloat16() + (merged - own).bfloat16()).to(merged.dtype)

        return merged_weight

    return changed_everywhere(merge.merged_weight, make)


def subtracted_update() -> AbstractContextManager[None]:
    """Unmerging subtracts the update instead of restoring the weights."""

    def make(original: Call) -> Call:
        def unmerge_adapter(model: LLM) -> LLM:
            for _, leaf, adapters in adapted_modules(model):
                if adapters.merged and isinstance(leaf, LEAVES):
                    whole = leaf.weight.detach()
                    for lora in adapters.active_lora():
                        whole = whole - lora.scale * weight_delta(leaf, lora)
                    adapters.base = whole.to(leaf.weight.dtype).detach()
            made: LLM = original(model)
            return made

        return unmerge_adapter

    return changed_everywhere(merge.unmerge_adapter, make)
