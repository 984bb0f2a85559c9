"""The place where numbers stop being finite, when a loss or a gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


def locate_nonfinite(model: LLM, inputs: Sequence[TransformerInput]) -> str:
    """Return which weight, output or gradient is the first that is not finite, in words.

    If all weights are finite, the model runs once more. NaN propagates from the loss to the
    embeddings in the backward pass, so the cause is the bad gradient nearest to the output. Call it
    under `no_grad`.
    """
    for name, weight in model.named_parameters():
        if not _finite(weight):
            return f"the weight {name} is not finite after the step before"
    for rows in inputs:
        place = _first_output(model, rows)
        if place is not None:
            return f"the output of {place} is the first that is not finite"
    for name, weight in reversed(list(model.named_parameters())):  # from output to input
        if weight.grad is not None and not _finite(weight.grad):
            return f"the gradient of {name} is the first that is not finite"
    return "all weights, outputs and gradients are finite"


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _first_output(model: LLM, rows: TransformerInput) -> str | None:
    """Return the first of embeddings, layers and final norm whose output is not finite."""
    found: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(_finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)):
            found.append(name)

    layers = {f"layers.{index}": layer for index, layer in enumerate(model.layers)}
    modules = {"tok_embeddings": model.tok_embeddings, **layers, "norm": model.norm}
    with ExitStack() as stack:
        for name, module in modules.items():
            stack.callback(module.register_forward_hook(partial(look, name)).remove)
        model(replace(rows, logits="none"))
    return found[0] if found else None
