"""NEFTune: noise on the embeddings in fine-tuning, against learning few examples by heart."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


def add_embedding_noise(model: LLM, strength: float) -> None:
    """Add uniform noise of up to strength / sqrt(T D) to every embedding in training, by hooks.

    T is the number of tokens of an example, and D the model dim (Jain et al. 2023, arXiv
    2310.05914). Evaluation and generation get no noise.
    """
    lengths_BT1: list[Tensor] = []  # of the present call

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        lengths_BT1[:] = [example_lengths(args[0])] if module.training else []

    def add(module: nn.Module, args: tuple[Any, ...], output_BTD: Tensor) -> Tensor:
        if not module.training or not lengths_BT1:
            return output_BTD
        bound_BT1 = strength / (lengths_BT1[0] * output_BTD.size(-1)).sqrt()
        noise_BTD = torch.empty_like(output_BTD).uniform_(-1, 1)
        return output_BTD + noise_BTD * bound_BT1.to(output_BTD.dtype)

    model.register_forward_pre_hook(look)
    model.tok_embeddings.register_forward_hook(add)


def example_lengths(inputs: TransformerInput) -> Tensor:
    """Return the number of tokens of the example that each token belongs to, float32 [B, T, 1]."""
    shape = torch.Size((*inputs.tokens.shape, 1))
    lengths = torch.full(shape, float(inputs.tokens.size(1)))
    if inputs.sizes is not None:  # packed: other examples of the row don't count
        rows = inputs.sizes if isinstance(inputs.sizes[0], int) else chain(*inputs.sizes)
        sizes = torch.tensor(list(rows))
        lengths = sizes.repeat_interleave(sizes).view(shape).float()
    elif inputs.lengths is not None:
        lengths = inputs.lengths.cpu().view(-1, 1, 1).expand(shape).float()
    return lengths.to(inputs.tokens.device)
