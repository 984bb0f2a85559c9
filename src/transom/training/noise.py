"""NEFTune: noise on the embeddings of fine-tuning, which keeps a model from learning its few examples by heart."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transom.model import LLM


def add_noise(model: LLM, strength: float) -> RemovableHandle:
    """In training, every embedding gets uniform noise of up to strength / sqrt(T D) (Jain et al. 2023,
    arXiv 2310.05914); evaluation and generation get none.
    """
    return model.tok_embeddings.register_forward_hook(partial(_noisy, strength))


def _noisy(strength: float, module: nn.Module, args: tuple[Any, ...], output_BTD: Tensor) -> Tensor:
    if not module.training:
        return output_BTD
    bound = strength / (output_BTD.size(-2) * output_BTD.size(-1)) ** 0.5
    return output_BTD + torch.empty_like(output_BTD).uniform_(-bound, bound)
