"""The weights of an adapter on one leaf, and what the leaf computes with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.layers.linear import Embedding, GroupedLinear, Linear, grouped_product, per_row
from transom.lora.args import Scaling, scale_of
from transom.quantize.leaves import Quantized

Leaf = Linear | GroupedLinear | Embedding
LEAVES = (Linear, GroupedLinear, Embedding)


class LoraWeights(nn.Module):
    """The low-rank part of one adapter on one leaf.

    Args:
        A: [rank, in], with a leading E for experts; for an embedding in is V. A `Parameter` is used
            as it is, so that leaves can share one A.
        B: [out, rank], with a leading E for experts; for an embedding out is D.
        alpha: numerator of the scale, or the scale itself.
        scaling: how the scale follows from alpha and rank.
        dropout: share of the inputs of A that is dropped in training.
        magnitude: length of each output, which makes the adapter DoRA: [out] or [E, out].
        family: the foreign family whose names it was read with, for writing it again.
    """

    def __init__(
        self,
        A: Tensor,
        B: Tensor,
        alpha: float,
        scaling: Scaling = "alpha_over_rank",
        *,
        dropout: float = 0.0,
        magnitude: Tensor | None = None,
        family: str | None = None,
    ) -> None:
        super().__init__()
        self.A = A if isinstance(A, nn.Parameter) else nn.Parameter(A)
        self.B = nn.Parameter(B)
        self.magnitude = None if magnitude is None else nn.Parameter(magnitude)
        self.alpha, self.scaling, self.dropout, self.family = alpha, scaling, dropout, family

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.A.size(-2)

    @property
    def scale(self) -> float:
        """The factor on B(A x)."""
        return scale_of(self.scaling, self.alpha, self.rank)

    def drop(self, x: Tensor) -> Tensor:
        """Return `x` with dropout in training mode, else `x`."""
        return F.dropout(x, self.dropout, self.training and self.dropout > 0)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scale={self.scale:g}, dropout={self.dropout:g}"


class Replacement(nn.Module):
    """Parameters of one adapter that replace a module's own, under the same names, while the
    adapter is active.
    """

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))


def weight_delta(leaf: Leaf, lora: LoraWeights) -> Tensor:
    """Return B A in the shape of the leaf's weight, unscaled, in float32 or wider."""
    # Reading the weight of a quantized leaf would compute it.
    own = leaf.weight_dtype if isinstance(leaf, Quantized) else leaf.weight.dtype
    wide = torch.promote_types(torch.promote_types(lora.A.dtype, own), torch.float32)
    product = lora.B.to(wide) @ lora.A.to(wide)
    return product.mT if isinstance(leaf, Embedding) else product


def output_norms(leaf: Leaf, weight: Tensor) -> Tensor:
    """Return the norm of the weights of each output: [out] or [E, out] of a matrix, [D] of an
    embedding.
    """
    return torch.linalg.vector_norm(weight, dim=0 if isinstance(leaf, Embedding) else -1)


def dora_factor(leaf: Leaf, lora: LoraWeights) -> Tensor:
    """Return DoRA's magnitude / norm of W + scale B A, in the shape of `output_norms`.

    The norm counts as a constant in backward (section 4.3 of arXiv 2402.09353).
    """
    assert lora.magnitude is not None, "only DoRA has one"
    with torch.no_grad():
        norm = output_norms(leaf, leaf.weight + lora.scale * weight_delta(leaf, lora))
    return lora.magnitude / norm


def adapted_output(
    leaf: Leaf, lora: LoraWeights, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    """Return `output` with one adapter; products run in the wider dtype of input and adapter."""
    x = inputs[0]
    if isinstance(leaf, Embedding):
        added = F.linear(lora.scale * F.embedding(x, lora.A.mT), lora.B)
        return (
            output + added if lora.magnitude is None else dora_factor(leaf, lora) * (output + added)
        )
    wide = torch.promote_types(x.dtype, lora.A.dtype)
    dropped = lora.drop(x)
    # The scale acts between the factors, where rows are short: forward and backward each save a
    # pass over the outputs.
    inner = lora.scale * _product(leaf, dropped.to(wide), lora.A.to(wide), inputs)
    added = _product(leaf, inner, lora.B.to(wide), inputs)
    if lora.magnitude is None:
        return output + added
    factor = dora_factor(leaf, lora)
    bias: Tensor | None = leaf.bias
    if isinstance(leaf, GroupedLinear):
        factor = per_row(factor, inputs[1], len(x), fill=1.0)
        bias = None if bias is None else per_row(bias, inputs[1], len(x), fill=0.0)
    # The factor acts on W x too, so W sees the same dropout mask.
    own = leaf.forward(dropped, *inputs[1:]) if lora.training and lora.dropout > 0 else output
    plain = own if bias is None else own - bias
    return output + (factor - 1) * plain + factor * added


def _product(leaf: Leaf, x: Tensor, weight: Tensor, inputs: tuple[Any, ...]) -> Tensor:
    """Return x times the transpose of a matrix; for experts each group of rows has its own
    matrix.
    """
    return (
        grouped_product(x, weight, inputs[1])
        if isinstance(leaf, GroupedLinear)
        else F.linear(x, weight)
    )
