"""AdamW with 8-bit running means, quantized in blocks (Dettmers et al. 2021, arXiv 2110.02861).

Shape letters: R blocks (rows) of `BLOCK` elements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from transom.base.errors import RequestError, require

BLOCK = 256  # elements that share one scale
# A smaller state hardly takes memory, and the few large entries of a vector matter much.
SMALLEST_QUANTIZED = 4096
# Elements converted to float32 at a time, which bounds the memory of a step.
BATCH_ELEMENTS = 2**22
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
    keys = torch.arange(KEYS, dtype=torch.int64)
    middles = (keys << DROPPED_BITS) + 2 ** (DROPPED_BITS - 1)
    values = (
        torch.where(middles < 2**31, middles, middles - 2**32).to(torch.int32).view(torch.float32)
    )
    codes = torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)
    if not signed:
        codes = torch.where(keys > 0, codes.clamp_min(1), codes)
    return _Tables(levels.to(device), codes.to(torch.uint8).to(device))


class _Piece(NamedTuple):
    """Blocks of one flat parameter, as views that are updated in place."""

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    blocks: slice


class AdamW8bit(Optimizer):
    """torch's AdamW with `exp_avg` and `exp_avg_sq` as codes [R, BLOCK] and scales [R].

    Arithmetic is in float32, on batches of blocks; only the stored state is rounded. The state
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
            require(
                contiguous,
                "stride",
                parameter.stride(),
                "expected contiguous parameters",
            )
            blocks = -(-parameter.numel() // BLOCK)
            state = self.state[parameter]
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                zero = dynamic_map(signed).index(0.0)
                state[f"{key}_codes"] = torch.full(
                    (blocks, BLOCK), zero, dtype=torch.uint8, device=parameter.device
                )
                state[f"{key}_scales"] = torch.zeros(
                    blocks, dtype=torch.float32, device=parameter.device
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Closures are not supported."""
        if closure is not None:
            raise RequestError("closure: got a closure; expected None")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
            for batch in self._batches(group["params"]):
                self._update(batch, group)

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[_Piece]]:
        """Yield small parameters of one device together, and large ones in pieces."""
        room = BATCH_ELEMENTS // BLOCK
        batch: list[_Piece] = []
        filled = 0
        for parameter in parameters:
            if parameter.grad is None:
                continue
            weight, gradient = parameter.detach().view(-1), parameter.grad.reshape(-1)
            blocks = -(-weight.numel() // BLOCK)
            start = 0
            while start < blocks:
                other_device = bool(batch) and batch[0].weight.device != weight.device
                if filled == room or other_device:
                    yield batch
                    batch, filled = [], 0
                stop = min(blocks, start + room - filled)
                part = slice(start * BLOCK, stop * BLOCK)
                batch.append(
                    _Piece(weight[part], gradient[part], self.state[parameter], slice(start, stop))
                )
                filled += stop - start
                start = stop
        if batch:
            yield batch

    def _update(self, batch: list[_Piece], group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        gradient = torch.cat([_blocks(piece.gradient) for piece in batch])
        mean = self._gathered(batch, "exp_avg", signed=True).lerp_(gradient, 1 - beta1)
        square = self._gathered(batch, "exp_avg_sq", signed=False)
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        counts = torch.tensor(
            [piece.blocks.stop - piece.blocks.start for piece in batch], device=mean.device
        )
        steps = torch.stack([piece.state["step"] for piece in batch])
        steps_R1 = steps.repeat_interleave(counts, output_size=len(mean)).unsqueeze(1)
        root = square.sqrt().div_((1 - beta2**steps_R1).sqrt_()).add_(group["eps"])
        update = (mean / root).mul_(-group["lr"] / (1 - beta1**steps_R1))
        self._scatter(batch, "exp_avg", mean, signed=True)
        self._scatter(batch, "exp_avg_sq", square, signed=False)
        at = 0
        for piece, count in zip(batch, counts.tolist(), strict=True):
            # In float32, so that the sum of decay and update is rounded once.
            wide = piece.weight.to(torch.promote_types(piece.weight.dtype, torch.float32))
            wide.mul_(1 - group["lr"] * group["weight_decay"])
            piece.weight.copy_(wide.add_(update[at : at + count].flatten()[: wide.numel()]))
            at += count

    def _gathered(self, batch: list[_Piece], key: str, *, signed: bool) -> Tensor:
        codes = torch.cat([piece.state[f"{key}_codes"][piece.blocks] for piece in batch])
        scales = torch.cat([piece.state[f"{key}_scales"][piece.blocks] for piece in batch])
        return dequantize(codes, scales, signed)

    def _scatter(self, batch: list[_Piece], key: str, values: Tensor, *, signed: bool) -> None:
        codes, scales = quantize(values, signed)
        at = 0
        for piece in batch:
            count = piece.blocks.stop - piece.blocks.start
            piece.state[f"{key}_codes"][piece.blocks] = codes[at : at + count]
            piece.state[f"{key}_scales"][piece.blocks] = scales[at : at + count]
            at += count


def _blocks(flat: Tensor) -> Tensor:
    """Return a flat tensor as float32 [R, BLOCK], padded with zeros."""
    return F.pad(flat.float(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
