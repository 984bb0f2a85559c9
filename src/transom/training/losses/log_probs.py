"""Log-probabilities of given tokens, and the model as it is without its adapters: what methods
compare.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transom.base.errors import RequestError, require
from transom.base.runtime import evaluating
from transom.data.batch import NO_TARGET
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import activate_adapters, active_adapters, adapted_modules
from transom.models.llm import LLM
from transom.training.losses.cross_entropy import chunk_tokens


def target_log_probs(
    model: LLM,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """log p(target) [B, T] in nats, float32 or better, of normed hidden states; 0 where there is no
    target.

    p is the softmax of logits / `temperature`, the distribution that answers are drawn from.

    Only positions with a target meet the output matrix, `chunk` of them at a time; backward makes
    their logits again. Without a `chunk`, logits of up to 2^22 numbers are made at once, more in
    chunks of at most 2^24.
    """

    def log_probs(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        logits_TV = model.project(hidden_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        if temperature != 1:
            logits_TV = logits_TV / temperature
        return -F.cross_entropy(logits_TV, targets_T, reduction="none")

    has_target_BT = targets_BT != NO_TARGET
    targets_T = targets_BT[has_target_BT]
    tokens = chunk_tokens(len(targets_T), model.args.vocab_size) if chunk is None else chunk
    found_T = torch.cat(by_chunks(log_probs, tokens, hidden_BTD[has_target_BT], targets_T))
    return found_T.new_zeros(targets_BT.shape).masked_scatter(has_target_BT, found_T)


def by_chunks(make: Callable[..., Tensor], tokens: int, *columns_T: Tensor) -> list[Tensor]:
    """`make` of all columns, of at most `tokens` of their rows at a time (0: all); backward makes
    chunks again.
    """
    count = len(columns_T[0])
    if tokens == 0 or count <= tokens:
        return [make(*columns_T)]
    pieces = -(-count // tokens)  # even ones: the last is not much shorter than the others
    chunked = zip(*(column_T.chunk(pieces) for column_T in columns_T), strict=True)
    return [checkpoint(make, *columns, use_reentrant=False) for columns in chunked]


@torch.no_grad()
def measured_log_probs(
    model: LLM,
    inputs: TransformerInput,
    targets_BT: Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """`target_log_probs` of a call of its own, without gradients, dropout, jitter and capacities of
    experts.
    """
    with evaluating(model):
        hidden_BTD = model(replace(inputs, logits="none")).hidden_BTD
        return target_log_probs(model, hidden_BTD, targets_BT, chunk, temperature)


@contextmanager
def adapters_off(model: LLM) -> Iterator[None]:
    """The model without its adapters, replaced modules included: a reference without a second copy
    of the weights.

    For calls without gradients: backward would make checkpointed blocks again with the adapters. A
    model without an active adapter is a `RequestError`, since it would be compared with itself.
    """
    names = active_adapters(model)
    require(
        len(names) > 0,
        "adapter",
        None,
        "expected a model with an active adapter, which can be switched off",
    )
    activate_adapters(model, ())
    try:
        yield
    finally:
        activate_adapters(model, names)


def check_frozen_base(model: LLM) -> None:
    """Refuse a model of which more than its adapters trains: without them it would be another one
    every step.
    """
    own = {
        id(parameter) for _, _, held in adapted_modules(model) for parameter in held.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise RequestError(
                f"{name}: trains outside of the adapters, so that the model without them is no "
                f"fixed reference; "
                "expected to train adapters only, or log-probabilities computed before the "
                "first step"
            )
