"""AdamW whose running means take 8 bits each, quantised in blocks (Dettmers et al. 2021, arXiv
2110.02861).

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
# Below this many elements the state is too small to matter, and a vector's few large entries matter
# much.
SMALLEST_QUANTIZED = 4096
# Elements brought to float32 at once: what bounds the memory of a step, and fills the machine.
BATCH_ELEMENTS = 2**22
DECADES = 7
DROPPED_BITS = 13  # of a float32, which leaves its sign, its exponent and ten bits of its mantissa
KEYS = 2 ** (32 - DROPPED_BITS)


@functools.cache
def dynamic_map(signed: bool) -> tuple[float, ...]:
    """The 256 values of a code, rising: 0, 1 and, decade by decade from 1e-7 up to 1, twice as many
    values.

    The paper's dynamic tree: relative precision near 1, seven decades of range. The unsigned map
    has the room of the sign as precision.
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
    """(uint8 codes [R, BLOCK], float32 scales [R]) of values [R, BLOCK]; a scale is its block's
    largest size.

    The error is at most 0.76 (signed) or 0.41 (unsigned) percent of the largest, and of a value
    above a tenth of the largest at most 7.1 or 3.6 percent. Unsigned values above zero stay above
    zero: a second moment that vanished beside a first one that did not would divide by eps alone.
    """
    scale_R = values_R.abs().amax(1).float()
    # Smallest normal number: zero blocks divide by it, and stay zero.
    unit = values_R.float() / scale_R.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(1)
    keys = (unit.view(torch.int32) >> DROPPED_BITS).bitwise_and_(KEYS - 1)
    codes = _tables(signed, values_R.device).codes.index_select(0, keys.flatten())
    return codes.view_as(values_R), scale_R


def dequantize(codes_R: Tensor, scale_R: Tensor, signed: bool) -> Tensor:
    """Values [R, BLOCK], float32."""
    levels = _tables(signed, codes_R.device).levels
    return levels.index_select(0, codes_R.flatten().int()).view(codes_R.shape) * scale_R.unsqueeze(
        1
    )


class _Tables(NamedTuple):
    """The values of the codes [256], and the code of every float32 by its first 19 bits [KEYS]."""

    levels: Tensor
    codes: Tensor


@functools.cache
def _tables(signed: bool, device: torch.device) -> _Tables:
    # Searching the 255 middles costs ten times all the rest of a step; sign, exponent and ten bits
    # of the mantissa find the code in one look-up, at the price of 0.05 percent at the edges.
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
    """Blocks of one parameter, flat: views, updated in place; the last block may be partly
    filled.
    """

    weight: Tensor
    gradient: Tensor
    state: dict[str, Tensor]
    blocks: slice


class AdamW8bit(Optimizer):
    """torch's AdamW with `exp_avg` and `exp_avg_sq` as codes [R, BLOCK] and scales [R]; made for
    large tensors.

    Arithmetic is in float32 and on whole batches of blocks; only what waits for the next step is
    rounded. 2.03 bytes of state per element instead of 8.
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
        """Take one more group of contiguous parameters and make their state: zero means, no step
        taken.
        """
        super().add_param_group(param_group)
        for parameter in self.param_groups[-1]["params"]:
            contiguous = parameter.is_contiguous()
            require(
                contiguous,
                "stride",
                parameter.stride(),
                "8-bit AdamW accepts contiguous parameters",
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
        """Update every parameter that has a gradient; closures are not supported."""
        if closure is not None:
            raise RequestError("closure: 8-bit AdamW evaluates no closure; expected None")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["step"] += 1
            for batch in self._batches(group["params"]):
                self._update(batch, group)

    def _batches(self, parameters: list[Tensor]) -> Iterator[list[_Piece]]:
        """Small parameters of one device together, large ones in pieces."""
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
            wide = piece.weight.to(
                torch.promote_types(piece.weight.dtype, torch.float32)
            )  # round once, not twice
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
    """[R, BLOCK] float32, zeros behind the last element."""
    return F.pad(flat.float(), (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
