"""The model against the oracle: logits and every gradient, so that a wrong formula cannot agree
with itself.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.verify.findings import Finding, difference
from transom.verify.oracle import Oracle, lacks
from transom.verify.sample_models import SAMPLES, random_tokens, sample_model

COUNT = 14  # tokens: two windows, two chunks and three steps of the temperature
# The oracle's angles are float64 and the model's float32, as the formula asks: 14 positions on they
# are 1e-6 apart. Measured: at most 3e-7 over all built-in models; the smallest planted bug is far
# above.
TOLERANCE = 1e-5


def compare_with_oracle(args: ModelArgs, name: str) -> Iterator[Finding]:
    """Logits of one row, then the gradient of every weight, in float64."""
    state, expected, gradients = expectation(args)
    model = sample_model(args)
    model.load_state_dict(state)
    logits = model(TransformerInput(random_tokens(args, 1, COUNT))).logits
    assert logits is not None, "all logits are the default"
    yield logits_finding(name, logits[0], expected)
    (logits[0] * pull(expected)).sum().backward()
    for key, weight in model.named_parameters():
        if weight.requires_grad:
            mine = torch.zeros_like(weight) if weight.grad is None else weight.grad
            error = difference(mine, gradients[key])
            detail = f"gradient of {key}" if not error <= TOLERANCE else ""
            yield Finding("gradients = oracle", f"{name}, {key}", error, TOLERANCE, detail)


def logits_finding(name: str, mine: Tensor, expected: Tensor) -> Finding:
    """Logits [T, V] compared, with the first position at which they part."""
    error, detail = difference(mine, expected), ""
    if not error <= TOLERANCE:
        bad = [t for t in range(len(expected)) if not difference(mine[t], expected[t]) <= TOLERANCE]
        detail = f"first at position {bad[0] if bad else 0}"
    return Finding("logits = oracle", f"{name}, {len(expected)} tokens", error, TOLERANCE, detail)


@functools.cache
def expectation(args: ModelArgs) -> tuple[Mapping[str, Tensor], Tensor, Mapping[str, Tensor]]:
    """(weights, logits [T, V], gradients by name) of the oracle; none of it passes through the
    model's code.
    """
    state = {name: tensor.clone() for name, tensor in sample_model(args).state_dict().items()}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    logits = Oracle(args, leaves).logits(random_tokens(args, 1, COUNT)[0].tolist())
    (logits * pull(logits)).sum().backward()
    gradients = {
        name: torch.zeros_like(x) if x.grad is None else x.grad for name, x in leaves.items()
    }
    return state, logits.detach(), gradients


def pull(logits_TV: Tensor) -> Tensor:
    """Fixed weights of every logit in the number that is differentiated."""
    return torch.cos(torch.arange(logits_TV.numel(), dtype=logits_TV.dtype)).view_as(logits_TV)


def check_model() -> Iterator[Finding]:
    """Every built-in model: together they use every option that the oracle speaks."""
    for name, fields in SAMPLES.items():
        yield from compare_with_oracle(ModelArgs.from_dict(fields), name)


def unspoken(args: ModelArgs) -> list[str]:
    """One line for every option of a model that this comparison cannot judge."""
    return [
        f"{field}: the oracle has no formula for it, nothing was compared" for field in lacks(args)
    ]
