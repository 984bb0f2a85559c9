"""AdamW with 8-bit running means, quantized in blocks (Dettmers et al. 2021, arXiv 2110.02861).

Shape letters: R blocks (rows) of `BLOCK` elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from transom.base.errors import RequestError, expect

BLOCK = 256  # elements that share one scale
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


def quantize(values_R: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantize blocks.

    The error is at most 0.76 (signed) or 0.41 (unsigned) percent of the largest value of a block,
    and at most 7.1 or 3.6 percent of a value above a tenth of it. Unsigned values above zero stay
    above zero: a second moment of zero with a first one that is not would be divided by eps alone.

    Args:
        values_R: Values [R, BLOCK].
        signed: Whether values may be negative.

    Returns:
        uint8 codes [R, BLOCK] and float32 scales [R], the largest size in each block.
    """
    scale_R = values_R.abs().amax(1).float()
    # Smallest normal number: zero blocks divide by it, and stay zero.
    unit = values_R.float() / scale_R.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    keys = (unit.view(torch.int32) >> DROPPED_BITS).bitwise_and_(KEYS - 1)
    codes = _tables(signed, values_R.device).codes.index_select(0, keys.flatten())
    return codes.view_as(values_R), scale_R


def dequantize(codes_R: Tensor, scale_R: Tensor, signed: bool) -> Tensor:
    """Return the float32 values [R, BLOCK] of codes [R, BLOCK] and scales [R]."""
    levels = _tables(signed, codes_R.device).levels
    return levels.index_select(0, codes_R.flatten().int()).view(codes_R.shape) * scale_R.unsqueeze(
        1
    )


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
    """torch's AdamW with `exp_avg` and `exp_avg_sq` as codes [R, BLOCK] and scales [R].

    Arithmetic is in float32, on some blocks at a time; only the stored state is rounded. The state
    takes 2.03 bytes per element instead of 8.
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
        """Add a group of contiguous parameters, and make their state."""
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            contiguous = parameter.is_contiguous()
            expect(contiguous, "stride", parameter.stride(), "contiguous parameters")
            blocks, device = -(-parameter.numel() // BLOCK), parameter.device
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for key, signed in SIGNED.items():
                zero = dynamic_map(signed).index(0.0)
                codes = torch.full((blocks, BLOCK), zero, dtype=torch.uint8, device=device)
                state[f"{key}_codes"] = codes
                state[f"{key}_scales"] = torch.zeros(blocks, device=device)

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
        state = self.state[parameter]
        state["step"] += 1
        (beta1, beta2), rate = group["betas"], group["lr"]
        correction1, correction2 = (1 - beta ** state["step"] for beta in group["betas"])
        stored = [state[f"{key}_{part}"] for key in SIGNED for part in ("codes", "scales")]
        pieces = zip(
            parameter.detach().view(-1).split(BATCH_ELEMENTS),
            gradients.reshape(-1).split(BATCH_ELEMENTS),
            *(tensor.split(BATCH_ELEMENTS // BLOCK) for tensor in stored),
            strict=True,
        )
        for weight, flat, *old in pieces:
            gradient = F.pad(flat.float(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
            mean = dequantize(old[0], old[1], signed=True).lerp_(gradient, 1 - beta1)
            square = dequantize(old[2], old[3], signed=False)
            square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            root = square.sqrt().div_(correction2.sqrt()).add_(group["eps"])
            update = (mean / root).mul_(-rate / correction1)
            # In float32, so that the sum of decay and update is rounded once.
            wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
            wide.mul_(1 - rate * group["weight_decay"])
            weight.copy_(wide.add_(update.flatten()[: wide.numel()]))
            new = (*quantize(mean, signed=True), *quantize(square, signed=False))
            for tensor, value in zip(old, new, strict=True):
                tensor.copy_(value)
