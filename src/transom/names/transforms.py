"""What the transforms of `names.py` do to tensors, in both directions, and one rotary layout into
the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor

from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.names.tables import Transform

Shape = tuple[int, ...]


def to_own(
    transform: Transform, tensors: Sequence[Tensor], shapes: Sequence[Shape]
) -> list[Tensor]:
    """Our tensors, of the given shapes, from the foreign ones of a row."""
    first = tensors[0]
    match transform:
        case "copy":
            return list(tensors)
        case "stack":
            return [stacked(tensors)]
        case "transpose":
            return [first.mT]
        case "flat":
            return [first.unflatten(0, (shapes[0][0], -1)).mT]
        case "halves":
            gate, value = first.mT.chunk(2, dim=1)
            return [gate, value]
        case "rows":
            return list(first.split([shape[0] for shape in shapes]))
        case "alternate":
            columns = (first[..., 0::2], first[..., 1::2])
            return [part.mT if part.ndim == 3 else part for part in columns]


def to_other(transform: Transform, tensors: Sequence[Tensor]) -> list[Tensor]:
    """The foreign tensors of a row from ours."""
    first = tensors[0]
    match transform:
        case "copy":
            return list(tensors)
        case "stack":
            return list(first.unbind(0))
        case "transpose":
            return [first.mT]
        case "flat":
            return [first.mT.flatten(0, 1)]
        case "halves":
            return [joined(tensors, 1).mT]
        case "rows":
            return [joined(tensors)]
        case "alternate":
            columns = [part.mT if part.ndim == 3 else part for part in tensors]
            return [stacked(columns, -1).flatten(-2)]


def joined(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.cat`, also for outlines on the meta device, where torch's own imports its compiler for
    seconds.
    """
    first = tensors[0]
    if not first.is_meta:
        return torch.cat(list(tensors), dim)
    if len({one.movedim(dim, 0).shape[1:] for one in tensors}) > 1:
        raise RuntimeError(
            f"{', '.join(str(tuple(one.shape)) for one in tensors)} do not join along {dim}"
        )
    shape = list(first.shape)
    shape[dim] = sum(one.size(dim) for one in tensors)
    return first.new_empty(shape, dtype=reduce(torch.promote_types, (one.dtype for one in tensors)))


def stacked(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """`torch.stack`, by `joined`."""
    return joined([one.unsqueeze(dim) for one in tensors], dim)


def turn_rotary(name: str, tensor: Tensor, args: ModelArgs, to: RopeLayout) -> Tensor:
    """Rotary rows of what makes queries and keys, from one layout into the other; other tensors as
    they are.

    Interleaved pairs (0, 1), (2, 3) ... become halves (0, d/2), (1, d/2 + 1) ... or the other way.
    A latent's rows are ordered otherwise: `mla_args` is for callers to refuse.
    """
    *_, leaf, _ = f"..{name}".split(".")
    turns = leaf in ("wq", "wk", "q_norm", "k_norm") and name.startswith("layers.")
    if args.rope_layout == to or not turns:
        return tensor
    heads = tensor.unflatten(0, (-1, args.head_size))
    turned, rest = heads.split((args.rotary_dim, args.head_size - args.rotary_dim), 1)
    turned = turned.unflatten(1, (-1, 2) if to == "halves" else (2, -1)).transpose(1, 2)
    out = heads.new_empty(heads.shape)  # not `empty_like` or `cat`: see `joined`
    out[:, : args.rotary_dim].unflatten(1, turned.shape[1:3]).copy_(turned)
    out[:, args.rotary_dim :].copy_(rest)
    return out.flatten(0, 1)
