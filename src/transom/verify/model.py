"""The model against the oracle: logits and the gradient of every weight, in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.verify.findings import Finding, close, first_difference
from transom.verify.oracle import Oracle
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model
from transom.verify.targets import small_models

COUNT = 14  # tokens: two windows, two chunks and three steps of the temperature
# The angles of RoPE are float64 in the oracle and float32 in the model, as the formula asks; after
# 14 positions they differ by 1e-6. The samples differ by at most 3e-7.
TOLERANCE = 1e-5


def check(model: str | None = None) -> Iterator[Finding]:
    """Compare a small copy of a model, or all samples without one.

    Raises:
        RequestError: If the model uses an option that the oracle does not implement.
    """
    for name, args in small_models(model, SAMPLES):
        yield from compare_with_oracle(args, name)


def compare_with_oracle(args: ModelArgs, name: str) -> Iterator[Finding]:
    """Compare the logits of one row, then the gradient of every weight."""
    expected, gradients = _expected(args)
    model = sample_model(args)
    logits = model(TransformerInput(random_tokens(args, 1, COUNT))).logits
    first = first_difference(logits[0], expected, TOLERANCE, 0)
    case = f"{name}, {COUNT} tokens"
    yield close(
        "logits = oracle", case, logits[0], expected, TOLERANCE, f"first at position {first}"
    )
    (logits[0] * _output_gradient(expected)).sum().backward()
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            case, detail = f"{name}, {key}", f"gradient of {key}"
            yield close("gradients = oracle", case, gradient, gradients[key], TOLERANCE, detail)


@functools.cache
def _expected(args: ModelArgs) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Return the oracle's logits [T, V] and gradients for the weights of the sample model."""
    state = sample_model(args).state_dict()
    weights = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    logits = Oracle(args, weights).logits(random_tokens(args, 1, COUNT)[0].tolist())
    (logits * _output_gradient(logits)).sum().backward()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in weights.items()
    }
    return logits.detach(), gradients


def _output_gradient(logits_TV: Tensor) -> Tensor:
    """Return fixed weights [T, V]; their product with the logits is summed and differentiated."""
    return torch.cos(torch.arange(logits_TV.numel(), dtype=logits_TV.dtype)).view_as(logits_TV)
