"""AWQ: larger weights for the inputs that are large, so that rounding changes these less.

Lin et al. 2023, arXiv 2306.00978. The columns of a weight are multiplied by scales, and the norm or
the linear that produces its inputs is divided by them. The function of the model stays the same;
its rounding error does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.block import TransformerBlock
from transom.layers.latent_attention import LatentAttention
from transom.layers.linear import GroupedLinear
from transom.layers.moe import MoE
from transom.layers.norm import RMSNorm
from transom.quantize.calibration import InputStatistics
from transom.quantize.fitting import rounded
from transom.quantize.formats import WeightFormat

STEPS = 20  # exponents that are tried, from 0 to 1 - 1 / STEPS
OUTPUTS = 256  # of a leaf, about as many as this show which exponent is best


@dataclass(frozen=True)
class Fold:
    """Channels that a module produces, and all modules that read them.

    Attributes:
        producer: A norm or a linear; None if there is none that can be divided.
        readers: Modules whose weight has a column for each channel.
        repeats: How often the readers see each head of the producer (grouped-query attention).
        width: Channels of a head; 0 for all.
    """

    producer: Any
    readers: Sequence[Any]
    repeats: int = 1
    width: int = 0

    def pooled(self, channels: Tensor) -> Tensor:
        """Return the mean [..., produced] over what equals one produced channel."""
        heads = (-1, self.repeats, self.width or channels.size(-1))
        return channels.unflatten(-1, heads).mean(-2).flatten(-2)

    def spread(self, scales: Tensor) -> Tensor:
        """Return the scale of each channel that the readers see."""
        heads = scales.unflatten(-1, (-1, 1, self.width or scales.size(-1)))
        return heads.expand(*heads.shape[:-2], self.repeats, -1).flatten(-3)


def folds(block: TransformerBlock) -> Iterator[Fold]:
    """Yield the folds of a block, with and without a producer."""
    attention: Any = block.attention
    feed: Any = block.feed_forward
    if isinstance(attention, LatentAttention):
        if attention.mla.q_lora_rank is None:
            yield Fold(block.attention_norm, [attention.wq, attention.wkv_a])
        else:
            yield Fold(block.attention_norm, [attention.wq_a, attention.wkv_a])
            yield Fold(attention.q_a_norm, [attention.wq_b])
        yield Fold(attention.kv_a_norm, [attention.wkv_b])
    else:
        layer = attention.layer
        yield Fold(block.attention_norm, [attention.wq, attention.wk, attention.wv])
        repeats = layer.n_heads // layer.n_kv_heads
        yield Fold(attention.wv, [attention.wo], repeats, layer.head_dim)
    mixed = isinstance(feed, MoE)
    parts = [feed.experts, feed.shared_expert] if mixed else [feed]
    parts = [part for part in parts if part is not None]
    readers = [one for part in parts for one in (part.w_gate, part.w_value) if one is not None]
    yield Fold(block.ffn_norm, [*readers, feed.router] if mixed else readers)
    for part in parts:
        # Without a gate, or with one that is added to, the hidden state is not linear in the value.
        clamped = mixed and part is feed.experts and feed.moe.expert_activation == "clamped"
        linear = part.w_gate is not None and not clamped
        yield Fold(part.w_value if linear else None, [part.w_out])


@torch.no_grad()
def scale_inputs(
    block: TransformerBlock,
    sums: Mapping[nn.Module, InputStatistics],
    formats: Mapping[nn.Module, WeightFormat],
) -> dict[nn.Module, Tensor]:
    """Fold the scales of a block whose rounding changes the outputs of its leaves least.

    Args:
        block: The block, whose weights change in place and whose function does not.
        sums: The inputs of the leaves.
        formats: The formats of the leaves that are going to be quantized.

    Returns:
        The scales [E or 1, in] of the inputs of each leaf for which some were found.
    """
    made: dict[nn.Module, Tensor] = {}
    for fold in folds(block):
        seen = [reader for reader in fold.readers if reader in sums]
        adapted = any(reader._modules for reader in fold.readers)
        if fold.producer is None or not seen or adapted:
            continue
        scales = _best_scales(fold, seen, sums, formats)
        _divide(fold.producer, scales)
        spread = fold.spread(scales)
        for reader in fold.readers:
            reader.weight.mul_(spread.unsqueeze(-2) if reader.weight.ndim == 3 else spread)
            made[reader] = spread
    return made


def _best_scales(
    fold: Fold,
    readers: Sequence[Any],
    sums: Mapping[nn.Module, InputStatistics],
    formats: Mapping[nn.Module, WeightFormat],
) -> Tensor:
    """Return scales [E or 1, produced]: the mean size of the inputs to the best exponent."""
    alone = isinstance(fold.producer, GroupedLinear)  # every expert has its own

    def total(values: Tensor) -> Tensor:
        return values if alone else values.sum(0, keepdim=True)

    sizes = torch.stack([total(sums[reader].sizes) for reader in readers]).sum(0)
    rows = torch.stack([total(sums[reader].rows) for reader in readers]).sum(0)
    means = fold.pooled(sizes / rows.clamp(min=1).unsqueeze(-1)).clamp(min=1e-4)
    best, least = torch.ones_like(means), torch.full_like(means[:, :1], torch.inf)
    for step in range(STEPS):
        scales = means ** (step / STEPS)
        scales = scales / (scales.amax(-1, True) * scales.amin(-1, True)).sqrt()
        spread = fold.spread(scales).unsqueeze(-2)
        errors = torch.zeros_like(least)
        for reader in readers:
            outputs, inputs = reader.weight.shape[-2:]
            every = -(-outputs // OUTPUTS)
            weight = reader.weight.view(-1, outputs, inputs)[:, ::every].float()
            change = rounded(weight * spread, formats[reader]) / spread - weight
            moved = (change @ sums[reader].hessians).mul_(change).sum((1, 2))
            errors += every * total(moved)[:, None]
        better = errors < least
        best, least = torch.where(better, scales, best), torch.where(better, errors, least)
    return best


def _divide(producer: Any, scales: Tensor) -> None:
    """Divide the outputs of a norm or a linear by scales [E or 1, channels]."""
    weight, bias = producer.weight, getattr(producer, "bias", None)
    own = scales if weight.ndim == 3 else scales[0]
    if isinstance(producer, RMSNorm) and producer.kind == "rms_plus_one":
        weight.copy_((weight + 1.0) / own - 1.0)
    else:
        weight.div_(own if weight.ndim == 1 else own.unsqueeze(-1))
    if bias is not None:
        bias.div_(own)
