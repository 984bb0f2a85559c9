"""Weights with one input, side by side in memory, so that one product reads them all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transom.layers.attention import Attention
from transom.layers.feed_forward import FeedForward
from transom.layers.latent_attention import LatentAttention
from transom.layers.linear import Linear
from transom.quantize.leaves import QuantizedLinear

_SAME_INPUT: Mapping[type[nn.Module], Sequence[tuple[str, ...]]] = {
    Attention: [("wq", "wk", "wv")],
    FeedForward: [("w_gate", "w_value")],
    LatentAttention: [("wq", "wkv_a"), ("wq_a", "wkv_a")],
}


@contextlib.contextmanager
def joined_weights(model: nn.Module) -> Iterator[None]:
    """Multiply leaves of a model that have one input as one leaf, while gradients are off.

    Parameters keep their names and their identity: they become views of the rows of one tensor, and
    stay so afterwards. A cast or a move separates them again. One group of weights is in memory
    twice meanwhile. Left as they are: leaves with adapters or hooks, weights that are offloaded or
    distributed, and quantized leaves of different formats or with scales that are codes.

    Args:
        model: The model. While this lasts, its weights may change in place, but must not be
            replaced.
    """
    groups: list[list[Any]] = [
        [module._modules.get(name) for name in names]
        for module in model.modules()
        for names in _SAME_INPUT.get(type(module), ())
    ]
    alike = [
        leaves
        for leaves in groups
        if None not in (kinds := {*map(_kind, leaves)}) and len(kinds) == 1
    ]
    try:
        for leaves in alike:
            names = [name for name, _ in leaves[0].named_parameters()]
            leaves[0].joined = {
                name: _rows([getattr(one, name) for one in leaves]) for name in names
            }
        yield
    finally:
        for leaves in alike:
            leaves[0].joined = None


def _kind(leaf: Any) -> tuple[object, ...] | None:
    """Return what leaves have in common whose parameters can be rows of one tensor; else None."""
    if type(leaf) not in (Linear, QuantizedLinear):
        return None
    format = leaf.format if isinstance(leaf, QuantizedLinear) else None
    in_rows = format is None or not (format.block or format.ordered)
    observed = leaf._modules or leaf._forward_hooks or leaf._forward_pre_hooks
    own = dict(leaf.named_parameters())
    plain = (
        type(one) is nn.Parameter and not one.is_meta and not one.is_inference()
        for one in own.values()
    )
    if observed or not in_rows or not all(plain):
        return None
    return format, *((name, one.dtype, one.device, one.shape[1:]) for name, one in own.items())


@torch.inference_mode(False)  # tensors of generation could not be trained with afterwards
@torch.no_grad()
def _rows(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return parameters [out, ...] one below the other; they become views of the result."""
    sizes, first = [*map(len, parameters)], parameters[0]
    same = len({one.untyped_storage().data_ptr() for one in parameters}) == 1
    ends = [one.data_ptr() + one.nbytes for one in parameters]
    follow = [one.data_ptr() for one in parameters[1:]] == ends[:-1]
    if same and follow and all(one.is_contiguous() for one in parameters):
        return first.detach().as_strided((sum(sizes), *first.shape[1:]), first.stride())
    rows = torch.cat([*parameters])
    for one, own in zip(parameters, rows.split(sizes), strict=True):
        one.data = own  # the parameter itself stays, which an optimizer may know
    return rows
