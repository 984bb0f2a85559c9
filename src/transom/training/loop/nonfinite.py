"""Where numbers stopped being numbers: the first place to look when a loss or a gradient is not
finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


def locate_nonfinite(model: LLM, inputs: Sequence[TransformerInput]) -> str:
    """What went first, in words: a weight, what a layer made of the rows, or the gradient nearest
    to the loss.

    Backward goes from the loss to the embeddings, so of all gradients that are not finite the first
    is that of the module furthest behind. Runs the rows once more where all weights are finite.
    Call it without gradients.
    """
    bad = next((name for name, weight in model.named_parameters() if not _finite(weight)), None)
    if bad is not None:
        return f"the weight {bad} went first: it is not finite after the step before"
    for rows in inputs:
        place = _first_output(model, rows)
        if place is not None:
            return f"the output of {place} went first"
    named = [
        (name, weight.grad) for name, weight in model.named_parameters() if weight.grad is not None
    ]
    first = next(
        (name for name, grad in reversed(_in_order(named, len(model.layers))) if not _finite(grad)),
        None,
    )
    return "the loss itself went first" if first is None else f"the gradient of {first} went first"


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all()) if tensor.is_floating_point() else True


def _in_order(named: Iterable[tuple[str, Tensor]], layers: int) -> list[tuple[str, Tensor]]:
    """Gradients in the order of the forward pass: embeddings, layers, then what stands behind
    them.
    """

    def place(entry: tuple[str, Tensor]) -> int:
        parts = entry[0].split(".")
        if parts[0] == "layers":
            return int(parts[1])
        return layers if parts[0] in ("norm", "output", "head") else -1

    return sorted(named, key=place)


def _first_output(model: LLM, rows: TransformerInput) -> str | None:
    """The first of embeddings, layers and final norm whose output is not finite."""
    seen: list[str] = []

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not seen and not all(
            _finite(tensor) for tensor in tensors if isinstance(tensor, Tensor)
        ):
            seen.append(name)

    with ExitStack() as stack:
        for name, module in _places(model):
            stack.callback(module.register_forward_hook(partial(look, name)).remove)
        model(replace(rows, logits="none"))
    return seen[0] if seen else None


def _places(model: LLM) -> Iterator[tuple[str, nn.Module]]:
    yield "tok_embeddings", model.tok_embeddings
    for index, layer in enumerate(model.layers):
        yield f"layers.{index}", layer
    yield "norm", model.norm
