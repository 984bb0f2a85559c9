"""Which tokens an expert is for: the ones most often sent to it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import require
from transom.base.runtime import evaluating
from transom.evaluation.trace import blocks
from transom.layers.inputs import TransformerInput
from transom.layers.moe import MoE, Router
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer

TOP = 10  # tokens shown per expert


@dataclass(frozen=True)
class ExpertTokens:
    """An expert's most frequent tokens, (id, how often) from the most frequent on, of `total` it
    was sent.
    """

    total: int
    most: tuple[tuple[int, int], ...]


@torch.no_grad()
def expert_tokens(
    model: LLM, batches: Iterable[TransformerInput], top: int = TOP
) -> list[list[ExpertTokens]]:
    """For every MoE layer and expert, the `top` tokens most often sent to it in `batches`; padding
    does not count.

    Runs without capacity and jitter, as in evaluation; ties go to the smaller id.
    """
    require(top >= 1, "top", top, "expected 1 token or more")
    routers = [
        part.router for block in blocks(model) if isinstance(part := block.feed_forward, MoE)
    ]
    require(len(routers) > 0, "model", "dense", "expected one with moe_args")
    chosen: dict[Router, Tensor] = {}

    def hook(router: Router, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen[router] = output[0]

    width, counts = model.args.vocab_size, [_Counts() for _ in routers]
    handles = [router.register_forward_hook(hook) for router in routers]
    try:
        for inputs in batches:
            with evaluating(model):
                model(inputs)
            real = _real_tokens(inputs).flatten()
            tokens_R1 = inputs.tokens.flatten()[real].unsqueeze(1)
            for router, count in zip(routers, counts, strict=True):
                count.add((chosen[router][real] * width + tokens_R1).flatten())
    finally:
        for handle in handles:
            handle.remove()
    return [
        count.most(router.moe.num_experts, width, top)
        for router, count in zip(routers, counts, strict=True)
    ]


def token_row(layers: list[list[ExpertTokens]], tokenizer: Tokenizer) -> dict[str, Any]:
    """The same as a part of metrics.jsonl: per layer and expert [text, share of what it was sent]
    pairs.
    """
    return {
        "expert_tokens": [
            [
                [[tokenizer.decode([token]), count / expert.total] for token, count in expert.most]
                for expert in layer
            ]
            for layer in layers
        ]
    }


def _real_tokens(inputs: TransformerInput) -> Tensor:
    """Which tokens [B, T] are not padding."""
    if isinstance(inputs.tokens_position, Tensor):
        return (inputs.tokens_position >= 0).to(inputs.tokens.device).expand_as(inputs.tokens)
    if inputs.lengths is None:
        return torch.ones_like(inputs.tokens, dtype=torch.bool)
    offsets_T = torch.arange(inputs.tokens.size(1), device=inputs.tokens.device)
    return offsets_T < inputs.lengths.to(offsets_T.device)[:, None]


class _Counts:
    """How often each (expert, token) pair was seen; only pairs that occur take memory."""

    def __init__(self) -> None:
        self.pairs = torch.empty(0, dtype=torch.int64)
        self.times = torch.empty(0, dtype=torch.int64)

    def add(self, pairs_R: Tensor) -> None:
        new, times = pairs_R.cpu().unique(return_counts=True)
        self.pairs, place = torch.cat((self.pairs, new)).unique(return_inverse=True)
        self.times = torch.zeros_like(self.pairs).index_add_(
            0, place, torch.cat((self.times, times))
        )

    def most(self, num_experts: int, width: int, top: int) -> list[ExpertTokens]:
        found = []
        for expert in range(num_experts):
            own = self.pairs // width == expert
            ids, times = self.pairs[own] % width, self.times[own]
            order = times.argsort(descending=True, stable=True)[:top]
            most = tuple(zip(ids[order].tolist(), times[order].tolist(), strict=True))
            found.append(ExpertTokens(int(times.sum()), most))
        return found
