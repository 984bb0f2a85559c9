"""The place where numbers stop being finite, when a loss or a gradient is not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.models.nonfinite import first_nonfinite, is_finite

ALL_FINITE = "all weights, outputs and gradients are finite"


def locate_nonfinite(model: LLM, inputs: Sequence[TransformerInput]) -> str:
    """Return which weight, output or gradient is the first that is not finite, in words.

    If all weights are finite, the model runs once more. NaN propagates from the loss to the
    embeddings in the backward pass, so the cause is the bad gradient nearest to the output. Call it
    under `no_grad`.
    """
    place = first_nonfinite(
        model, (partial(model, replace(rows, logits="none")) for rows in inputs)
    )
    if place is not None:
        return place
    for name, one in reversed(list(model.named_parameters())):  # from output to input
        if one.grad is not None and not is_finite(one.grad):
            return f"the gradient of {name} is the first that is not finite"
    return ALL_FINITE
