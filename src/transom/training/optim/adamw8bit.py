"""AdamW with 8-bit running means, quantized in blocks (Dettmers et al. 2021, arXiv 2110.02861).

No block crosses a row of a weight, so that ranks which divide the weight divide its codes alike.

Shape letters: R blocks of L elements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transom.base.errors import RequestError, expect
from transom.distributed.parts import local_part

BLOCK = 256  # elements that share one scale, at most
SMALLEST_BLOCK = 32  # below, the scales take too much memory
# A smaller state hardly takes memory, and the few large entries of a vector matter much.
SMALLEST_QUANTIZED = 4096
# Elements converted to float32 at a time, which bounds the memory of a step.
BATCH_ELEMENTS = 2**22
SIGNED = {"exp_avg": True, "exp_avg_sq": False}  # the running means, and whether one is signed
DECADES = 7
DROPPED_BITS = 13  # of a float32, which leaves its sign, its exponent and ten bits of its mantissa
KEYS = 2 ** (32 - DROPPED_BITS)


@functools.cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """Return the 256 values of a code in rising order.

    They are 0, 1 and, for each decade from 1e-7 to 1, twice as many values as for the one below.
    This is the paper's dynamic tree: relative precision near 1, and a range of seven decades. The
    unsigned map has one more bit of precision in place of the sign.
    """
    values = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2 ** (decade if signed else decade + 1)
        scale = 10.0 ** (decade - DECADES + 1)
        middles = [scale * (0.1 + 0.9 * (index + 0.5) / count) for index in range(count)]
        values += middles
        if signed:
            values += [-value for value in middles]
    return tuple(sorted(values))


def block_length(shape: Sequence[int]) -> int:
    """Return how many elements of a weight share one scale: a power of 2 that divides its rows."""
    return math.gcd(shape[-1], BLOCK)


def can_quantize(weight: Tensor) -> bool:
    """Return whether 8-bit states pay: the weight is large, and so are its blocks."""
    return weight.numel() >= SMALLEST_QUANTIZED and block_length(weight.shape) >= SMALLEST_BLOCK


def quantize(values_RL: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize blocks.

    The error is at most 0.76 (signed) or 0.41 (unsigned) percent of the largest value of a block,
    and at most 7.1 or 3.6 percent of a value above a tenth of it. Unsigned values above zero stay
    above zero: a second moment of zero with a first one that is not would be divided by eps alone.

    Args:
        values_RL: Values [R, L].
        signed: Whether values may be negative.

    Returns:
        uint8 codes [R, L] and float32 scales [R], the largest size in each block.
    """
    scale_R = values_RL.abs().amax(1).float()
    # Smallest normal number: zero blocks divide by it, and stay zero.
    unit = values_RL.float() / scale_R.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    keys = (unit.view(torch.int32) >> DROPPED_BITS).bitwise_and_(KEYS - 1)
    codes = _tables(signed, values_RL.device).codes.index_select(0, keys.flatten())
    return codes.view_as(values_RL), scale_R


def dequantize(codes_RL: Tensor, scale_R: Tensor, signed: bool) -> Tensor:
    """Return the float32 values [R, L] of codes [R, L] and scales [R]."""
    levels = _tables(signed, codes_RL.device).levels
    values_RL = levels.index_select(0, codes_RL.flatten().int()).view(codes_RL.shape)
    return values_RL * scale_R.unsqueeze(1)


class _Tables(NamedTuple):
    """The values of the codes [256], and the code of each float32 by its first 19 bits [KEYS]."""

    levels: Tensor
    codes: Tensor


@functools.cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    # A search in the 255 middles would take ten times as long as the rest of a step. The first 19
    # bits of a float32 give the code in one look-up, with an error of 0.05 percent at the edges.
    levels = torch.tensor(dynamic_map(signed), dtype=torch.float32)
    keys = torch.arange(-KEYS // 2, KEYS // 2, dtype=torch.int32)  # by the sign bit
    middles = ((keys << DROPPED_BITS) + 2 ** (DROPPED_BITS - 1)).view(torch.float32)
    codes = torch.bucketize(middles, (levels[1:] + levels[:-1]) / 2)
    if not signed:
        codes[keys > 0] = codes[keys > 0].clamp_min(1)
    codes = codes.roll(KEYS // 2)  # the order of keys without a sign
    return _Tables(levels.to(device), codes.to(torch.uint8).to(device))


class AdamW8bit(Optimizer):
    """torch's AdamW with `exp_avg` and `exp_avg_sq` as codes and scales.

    For a weight [..., D], codes are uint8 [..., D / L, L] and scales float32 [..., D / L], where L
    is the `block_length` of the weight. A DTensor has DTensors with the same placements. Arithmetic
    is in float32, on some blocks at a time; only the stored state is rounded. The state takes
    2 + 8 / L bytes per element instead of 8.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of contiguous parameters, and make their state.

        Raises:
            RequestError: If a parameter has strides, or ranks divide it inside of blocks.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            contiguous = parameter.is_contiguous()
            expect(contiguous, "stride", parameter.stride(), "contiguous parameters")
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key, signed in SIGNED.items():
                zero = dynamic_map(signed).index(0.0)
                state[f"{key}_codes"] = _blocks(parameter, zero, torch.uint8)
                state[f"{key}_scales"] = _blocks(parameter, 0.0, torch.float32)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Closures are not supported."""
        if closure is not None:
            raise RequestError("closure: got a closure; expected None")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: Tensor, gradients: Tensor, group: dict[str, Any]) -> None:
        state, length = self.state[parameter], block_length(parameter.shape)
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        correction1, correction2 = (1 - beta ** state["step"] for beta in group["betas"])
        weights = local_part(parameter).view(-1, length)
        blocks = [weights, local_part(gradients).reshape(-1, length)]
        for key in SIGNED:
            blocks += [
                local_part(state[f"{key}_codes"]).view(-1, length),
                local_part(state[f"{key}_scales"]).view(-1),
            ]
        pieces = (one.split(BATCH_ELEMENTS // length) for one in blocks)
        for weight, gradient, *old in zip(*pieces, strict=True):
            gradient = gradient.float()
            mean = dequantize(old[0], old[1], signed=True).lerp_(gradient, 1 - beta1)
            square = dequantize(old[2], old[3], signed=False)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = square.sqrt().div_(correction2.sqrt()).add_(group["eps"])
            update = (mean / root).mul_(-rate / correction1)
            # In float32, so that the sum of decay and update is rounded once.
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            wide.mul_(1 - rate * group["weight_decay"])
            weight.copy_(wide.add_(update))
            new = (*quantize(mean, signed=True), *quantize(square, signed=False))
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)


def _blocks(parameter: Tensor, fill: float, dtype: torch.dtype) -> Tensor:
    """Return codes (uint8) or scales (float32) of a parameter, divided as the parameter is."""
    length = block_length(parameter.shape)

    def shape(weight: Tensor) -> torch.Size:
        *rest, width = weight.shape
        expected = f"32, since {width} columns of a rank are no multiple of {length}, a block"
        expect(width % length == 0, "optimizer.state_bits", 8, expected)
        blocks = (*rest, width // length)
        return torch.Size((*blocks, length) if dtype == torch.uint8 else blocks)

    own = local_part(parameter)
    made = torch.full(shape(own), fill, dtype=dtype, device=own.device)
    if not isinstance(parameter, DTensor):
        return made
    full = torch.empty(shape(parameter), device="meta")
    mesh, places = parameter.device_mesh, parameter.placements
    return DTensor.from_local(made, mesh, places, shape=full.shape, stride=full.stride())
