"""Which tokens each expert of a mixture processes most often."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import expect
from transom.base.runtime import attached, evaluating
from transom.layers.inputs import TransformerInput
from transom.layers.moe import Router
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer

TOP = 10  # tokens shown for each expert


@dataclass(frozen=True)
class ExpertTokens:
    """The tokens of one expert.

    Attributes:
        total: Number of tokens routed to it.
        most: The most frequent ones as (id, count), in descending order of their counts.
    """

    total: int
    most: tuple[tuple[int, int], ...]


@torch.no_grad()
def expert_tokens(
    model: LLM, batches: Iterable[TransformerInput], top: int = TOP
) -> list[list[ExpertTokens]]:
    """Return the `top` most frequent tokens of every expert, for every mixture-of-experts layer.

    The model runs without capacity and jitter, and padding is not counted. Among equally frequent
    tokens the smaller id comes first.

    Raises:
        RequestError: The model has no experts, or `top` is not positive.
    """
    expect(top >= 1, "top", top, "1 token or more")
    routers = [part for part in model.modules() if isinstance(part, Router)]
    expect(model.args.moe_args is not None, "model", "dense", "one with moe_args")
    width = model.args.vocab_size
    chosen: dict[Router, Tensor] = {}
    pairs: dict[Router, list[Tensor]] = {router: [] for router in routers}

    def hook(router: Router, inputs: object, output: tuple[Tensor, Tensor, Tensor]) -> None:
        chosen[router] = output[0]

    with attached([router.register_forward_hook(hook) for router in routers]):
        for inputs in batches:
            with evaluating(model):
                model(inputs)
            real_R = _real_tokens(inputs).flatten()
            tokens_R1 = inputs.tokens.flatten()[real_R].unsqueeze(1)
            for router in routers:
                pairs[router].append((chosen[router][real_R] * width + tokens_R1).flatten().cpu())
    return [_most_frequent(pairs[one], one.moe.num_experts, width, top) for one in routers]


def _most_frequent(
    pairs: list[Tensor], num_experts: int, width: int, top: int
) -> list[ExpertTokens]:
    """Return the tokens of each expert from pairs encoded as expert * width + token."""
    none = torch.empty(0, dtype=torch.int64)
    distinct, times = torch.cat([none, *pairs]).unique(return_counts=True)
    out = []
    for expert in range(num_experts):
        own = distinct // width == expert
        ids, counts = distinct[own] % width, times[own]
        order = counts.argsort(descending=True, stable=True)[:top]
        most = tuple(zip(ids[order].tolist(), counts[order].tolist(), strict=True))
        out.append(ExpertTokens(int(counts.sum()), most))
    return out


def token_row(layers: list[list[ExpertTokens]], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokens of experts for metrics.jsonl: [text, share] by layer and expert."""

    def shares(one: ExpertTokens) -> list[list[Any]]:
        return [[tokenizer.decode([token]), count / one.total] for token, count in one.most]

    return {"expert_tokens": [[shares(expert) for expert in layer] for layer in layers]}


def _real_tokens(inputs: TransformerInput) -> Tensor:
    """Return bool [B, T]: whether a token is not padding."""
    if isinstance(inputs.tokens_position, Tensor):
        return (inputs.tokens_position >= 0).to(inputs.tokens.device).expand_as(inputs.tokens)
    if inputs.lengths is None:
        return torch.ones_like(inputs.tokens, dtype=torch.bool)
    offsets_T = torch.arange(inputs.tokens.size(1), device=inputs.tokens.device)
    return offsets_T < inputs.lengths.to(offsets_T.device)[:, None]
