"""What the transforms of `names.py` do to tensors, in both directions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

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
