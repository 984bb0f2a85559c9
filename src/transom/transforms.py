"""What the transforms of `names.py` do to tensors, in both directions, and one rotary layout into the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transom.args import ModelArgs, RopeLayout
from transom.names import Transform

Shape = tuple[int, ...]


def to_own(transform: Transform, tensors: Sequence[Tensor], shapes: Sequence[Shape]) -> list[Tensor]:
    """Our tensors, of the given shapes, from the foreign ones of a row."""
    first = tensors[0]
    match transform:
        case "copy":
            return list(tensors)
        case "stack":
            return [torch.stack(list(tensors))]
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
            return [torch.cat(list(tensors), 1).mT]
        case "rows":
            return [torch.cat(list(tensors))]
        case "alternate":
            columns = [part.mT if part.ndim == 3 else part for part in tensors]
            return [torch.stack(columns, -1).flatten(-2)]


def turn_rotary(name: str, tensor: Tensor, args: ModelArgs, to: RopeLayout) -> Tensor:
    """Rotary rows of what makes queries and keys, from one layout into the other; other tensors as they are.

    Interleaved pairs (0, 1), (2, 3) ... become halves (0, d/2), (1, d/2 + 1) ... or the other way. A latent's rows
    are ordered otherwise: `mla_args` is for callers to refuse.
    """
    *_, leaf, _ = f"..{name}".split(".")
    turns = leaf in ("wq", "wk", "q_norm", "k_norm") and name.startswith("layers.")
    if args.rope_layout == to or not turns:
        return tensor
    heads = tensor.unflatten(0, (-1, args.head_size))
    turned, rest = heads.split((args.rotary_dim, args.head_size - args.rotary_dim), 1)
    turned = turned.unflatten(1, (-1, 2) if to == "halves" else (2, -1)).transpose(1, 2).flatten(1, 2)
    return torch.cat((turned, rest), 1).flatten(0, 1)
