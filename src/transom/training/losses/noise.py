"""NEFTune: noise on the embeddings of fine-tuning, which keeps a model from learning its few
examples by heart.
"""

from __future__ import annotations

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


class EmbeddingNoise:
    """In training, every embedding gets uniform noise of up to strength / sqrt(T D), T the tokens
    of its example.

    Jain et al. 2023, arXiv 2310.05914. Evaluation and generation get none; `remove` takes it off
    the model.
    """

    def __init__(self, model: LLM, strength: float) -> None:
        self.strength = strength
        self._lengths_BT1: Tensor | None = None  # of the call under way
        self._hooks = (
            model.register_forward_pre_hook(self._look),
            model.tok_embeddings.register_forward_hook(self._add),
        )

    def remove(self) -> None:
        """The model is as before."""
        for hook in self._hooks:
            hook.remove()

    def _look(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        inputs: TransformerInput = args[0]
        shape = torch.Size((*inputs.tokens.shape, 1))
        lengths = torch.full(shape, float(inputs.tokens.size(1)))
        if inputs.sizes is not None:  # packed: neighbours in a row are no part of an example
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
