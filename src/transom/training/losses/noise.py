"""NEFTune: noise on the embeddings in fine-tuning, against learning few examples by heart."""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


class EmbeddingNoise:
    """Adds uniform noise of up to strength / sqrt(T D) to every embedding in training.

    T is the number of tokens of an example, and D the model dim (Jain et al. 2023, arXiv
    2310.05914). Evaluation and generation get no noise.
    """

    def __init__(self, model: LLM, strength: float) -> None:
        self.strength = strength
        self._lengths_BT1: Tensor | None = None  # of the present call
        self._hooks = (
            model.register_forward_pre_hook(self._look),
            model.tok_embeddings.register_forward_hook(self._add),
        )

    def remove(self) -> None:
        """Remove the noise from the model."""
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        inputs: TransformerInput = args[0]
        shape = torch.Size((*inputs.tokens.shape, 1))
        lengths = torch.full(shape, float(inputs.tokens.size(1)))
        if inputs.sizes is not None:  # packed: other examples of the row don't count
            rows = inputs.sizes if isinstance(inputs.sizes[0], int) else chain(*inputs.sizes)
            sizes = torch.tensor(list(rows))
            lengths = sizes.repeat_interleave(sizes).view(shape).float()
        elif inputs.lengths is not None:
            lengths = inputs.lengths.cpu().view(-1, 1, 1).expand(shape).float()
        self._lengths_BT1 = lengths.to(inputs.tokens.device)

    def _add(self, module: nn.Module, args: tuple[Any, ...], output_BTD: Tensor) -> Tensor:
        if not module.training or self._lengths_BT1 is None:
            return output_BTD
        bound_BT1 = self.strength / (self._lengths_BT1 * output_BTD.size(-1)).sqrt()
        return output_BTD + torch.empty_like(output_BTD).uniform_(-1, 1) * bound_BT1.to(
            output_BTD.dtype
        )
