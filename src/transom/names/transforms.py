"""The transforms of `tables.py` on tensors, in both directions, and the permutation between the
two rotary layouts.
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


def apply_transform(
    transform: Transform, tensors: Sequence[Tensor], shapes: Sequence[Shape]
) -> list[Tensor]:
    """Return our tensors of a mapping.

    Args:
        transform: the transform.
        tensors: the foreign tensors, in the order of the mapping.
        shapes: the shapes of ours.
    """
    first = tensors[0]
    match transform:
        case "copy":
            return list(tensors)
        case "stack":
            return [stack(tensors)]
        case "transpose":
            return [first.mT]
        case "flat":
            return [first.unflatten(0, (shapes[0][0], -1)).mT]
        case "halves":
            return list(first.mT.chunk(2, dim=1))
        case "rows":
            return list(first.split([shape[0] for shape in shapes]))
        case "alternate":
            columns = (first[..., 0::2], first[..., 1::2])
            return [part.mT if part.ndim == 3 else part for part in columns]


def invert_transform(transform: Transform, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the foreign tensors of a mapping, given ours."""
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
            return [concatenate(tensors, 1).mT]
        case "rows":
            return [concatenate(tensors)]
        case "alternate":
            columns = [part.mT if part.ndim == 3 else part for part in tensors]
            return [stack(columns, -1).flatten(-2)]


def concatenate(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return `torch.cat` of tensors.

    On the meta device, `torch.cat` imports the compiler, which takes seconds; this function does
    not.
    """
    first = tensors[0]
    if not first.is_meta:
        return torch.cat(list(tensors), dim)
    if len({one.movedim(dim, 0).shape[1:] for one in tensors}) > 1:
        raise RuntimeError(
            f"shapes {[tuple(one.shape) for one in tensors]} differ outside dimension {dim}"
        )
    shape = list(first.shape)
    shape[dim] = sum(one.size(dim) for one in tensors)
    return first.new_empty(shape, dtype=reduce(torch.promote_types, (one.dtype for one in tensors)))


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Return `torch.stack` of tensors, with `concatenate`."""
    return concatenate([one.unsqueeze(dim) for one in tensors], dim)


def permute_rotary(name: str, tensor: Tensor, args: ModelArgs, to: RopeLayout) -> Tensor:
    """Return a parameter in another rotary layout; one that does not make queries or keys is
    returned as it is.

    The pairs (0, 1), (2, 3) ... of interleaved become (0, d/2), (1, d/2 + 1) ... of halves, or the
    other way. Rows of latent attention are ordered in another way, so callers must not pass models
    with `mla_args`.

    Args:
        name: our name of the parameter.
        tensor: its value, in the layout of `args`.
        args: the model.
        to: the layout to return.
    """
    *_, leaf, _ = f"..{name}".split(".")
    rotates = leaf in ("wq", "wk", "q_norm", "k_norm") and name.startswith("layers.")
    if args.rope_layout == to or not rotates:
        return tensor
    heads = tensor.unflatten(0, (-1, args.head_size))
    rotary, rest = heads.split((args.rotary_dim, args.head_size - args.rotary_dim), 1)
    rotary = rotary.unflatten(1, (-1, 2) if to == "halves" else (2, -1)).transpose(1, 2)
    out = heads.new_empty(heads.shape)  # not `empty_like` or `cat`: see `concatenate`
    out[:, : args.rotary_dim].unflatten(1, rotary.shape[1:3]).copy_(rotary)
    out[:, args.rotary_dim :].copy_(rest)
    return out.flatten(0, 1)
