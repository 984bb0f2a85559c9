"""Log-probabilities of given tokens, and the model without its adapters as a reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transom.base.errors import RequestError, expect
from transom.base.runtime import evaluating
from transom.data.batch import NO_TARGET
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import activate_adapters, active_adapters, adapted_modules
from transom.models.llm import LLM

# Up to so many logits are computed at once: chunks would save little memory.
PLAIN_LOGITS = 1 << 22
# Logits of a chunk. Every chunk reads and writes the complete weight gradient, so that few large
# chunks are faster.
CHUNK_LOGITS = 1 << 24


def chunk_tokens(tokens: int, vocab_size: int) -> int:
    """Return the default number of tokens per chunk, 0 for all at once."""
    return 0 if tokens * vocab_size <= PLAIN_LOGITS else max(1, CHUNK_LOGITS // vocab_size)


def by_chunks(make: Callable[..., Tensor], tokens: int, *columns_T: Tensor) -> list[Tensor]:
    """Return the results of `make` for at most `tokens` rows of all columns at a time.

    0 tokens stand for all rows at once. The backward pass computes each of several chunks again.
    """
    count = len(columns_T[0])
    if tokens == 0 or count <= tokens:
        return [make(*columns_T)]
    pieces = -(-count // tokens)
    chunked = zip(*(column_T.chunk(pieces) for column_T in columns_T), strict=True)
    return [checkpoint(make, *columns, use_reentrant=False) for columns in chunked]


def target_log_probs(
    model: LLM,
    hidden_BTD: Tensor,
    targets_BT: Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return log p(target) [B, T] in nats, 0 where there is no target.

    Only positions with a target are projected to logits, and the backward pass computes them again.

    Args:
        model: The model.
        hidden_BTD: Normed hidden states.
        targets_BT: Target ids, NO_TARGET where there is none.
        chunk: Positions whose logits are computed at a time. None computes logits of up to 2^22
            numbers at once, and more in chunks of at most 2^24.
        temperature: What logits are divided by before the softmax, as in sampling.

    Returns:
        float32, or float64 if the logits have it.
    """

    def log_probs(hidden_TD: Tensor, targets_T: Tensor) -> Tensor:
        logits_TV = model.project(hidden_TD)
        logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
        if temperature != 1:
            logits_TV = logits_TV / temperature
        return -F.cross_entropy(logits_TV, targets_T, reduction="none")

    # Indices and not masks: the host waits for a GPU once, and the backward pass never does.
    places_T = (targets_BT.flatten() != NO_TARGET).nonzero()[:, 0]
    targets_T = targets_BT.flatten().index_select(0, places_T)
    hidden_TD = hidden_BTD.flatten(0, -2).index_select(0, places_T)
    tokens = chunk_tokens(len(targets_T), model.args.vocab_size) if chunk is None else chunk
    found_T = torch.cat(by_chunks(log_probs, tokens, hidden_TD, targets_T))
    found_BT = found_T.new_zeros(targets_BT.numel()).index_copy(0, places_T, found_T)
    return found_BT.view(targets_BT.shape)


@torch.no_grad()
def measured_log_probs(
    model: LLM,
    inputs: TransformerInput,
    targets_BT: Tensor,
    chunk: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Return `target_log_probs` of a forward pass in evaluation mode, without gradients."""
    with evaluating(model):
        hidden_BTD = model(replace(inputs, logits="none")).hidden_BTD
        return target_log_probs(model, hidden_BTD, targets_BT, chunk, temperature)


@contextmanager
def adapters_off(model: LLM) -> Iterator[None]:
    """Switch the adapters off inside the block, replaced modules included.

    The model is then a reference without a second copy of the weights. Use it without gradients:
    the backward pass would compute checkpointed blocks with the adapters.

    Raises:
        RequestError: If no adapter is active, since the model would be compared with itself.
    """
    names = active_adapters(model)
    expect(
        len(names) > 0,
        "adapter",
        None,
        "a model with an active adapter, which can be switched off",
    )
    activate_adapters(model, ())
    try:
        yield
    finally:
        activate_adapters(model, names)


def check_frozen_base(model: LLM, setting: str) -> None:
    """Raise a `RequestError` about a setting that compares with the model without its adapters.

    It is raised if more than the adapters trains, because the base would then change.
    """
    own = {
        id(parameter)
        for _, _, adapters in adapted_modules(model)
        for parameter in adapters.parameters()
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in own:
            raise RequestError(
                f"{setting}; expected to train adapters only ({name} trains outside of the "
                "adapters, so the model without them is no fixed reference)"
            )
