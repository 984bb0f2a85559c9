"""Initial weights: those that constructors draw, and those of a seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError

# Leaves that write into the residual stream, and the output of the model. They start at zero.
_AT_ZERO = ("wo", "w_out", "output")
_TIED_STD = 0.02


Copy = Callable[[Tensor, Tensor], object]


@torch.no_grad()
def draw_weight(
    weight: Tensor, generator: torch.Generator | None = None, copy: Copy = Tensor.copy_
) -> None:
    """Fill `weight` [..., in] in place with uniform numbers of standard deviation 1 / (2 sqrt(in)).

    A `generator` draws on the CPU, so that a seed gives the same numbers on every device. Without
    one, the default generator of the weight's device draws, as in torch's modules. A weight on the
    meta device is not changed. `copy` copies what a generator has drawn into the weight.
    """
    if (
        weight.is_meta and generator is None
    ):  # torch would import its compiler for seconds to do nothing
        return
    bound = 0.5 * (3.0 / weight.shape[-1]) ** 0.5
    if generator is None:
        weight.uniform_(-bound, bound)
    else:
        drawn = torch.rand(weight.shape, generator=generator, device="cpu")
        copy(weight, (drawn * 2 - 1) * bound)


@torch.no_grad()
def start_at_chance(model: nn.Module, *, tied: bool) -> None:
    """Change freshly constructed weights to the start that `LLM.init_weights` describes."""
    for name, weight in model.named_parameters():
        leaf = f".{name}".split(".")[-2]
        if weight.is_meta:
            continue
        if leaf in _AT_ZERO:
            weight.zero_()
        elif leaf == "tok_embeddings" and tied:
            weight.mul_(_TIED_STD)


@torch.no_grad()
def init_weights(
    weights: Mapping[str, Tensor],
    seed: int,
    *,
    plus_one: bool,
    tied: bool,
    copy: Copy = Tensor.copy_,
) -> None:
    """Fill all weights of a model as `LLM.init_weights` describes.

    Args:
        weights: The weights by name, in their order. For one on the meta device, numbers are drawn
            and not used.
        seed: Seed of the random numbers.
        plus_one: Whether norms of the text model store weight - 1.
        tied: Whether the output uses the token embeddings.
        copy: Copies a full tensor into a weight.

    Raises:
        RequestError: The model is quantized.
    """
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise RequestError(
                f"init_weights: {name} is {weight.dtype}; expected a model that is not quantized"
            )
    generator = torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        *_, leaf, last = f".{name}".split(".")
        if last == "weight" and weight.ndim == 1:
            weight.fill_(0.0 if plus_one and not name.startswith("vision.") else 1.0)
        elif last in ("bias", "choice_bias", "sinks") or leaf in _AT_ZERO:
            weight.zero_()
        elif leaf == "tok_embeddings":
            # Tied embeddings are the output too: N(0, 1) would give a loss of about dim.
            draw = torch.randn(weight.shape, generator=generator, device="cpu")
            copy(weight, draw * (_TIED_STD if tied else 1.0))
        else:
            draw_weight(weight, generator, copy)
