"""The transforms of `tables.py` on tensors, in both directions, and the permutation between the
two rotary layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor

from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.names.tables import Transform

Shape = tuple[int, ...]


def _turned(tensor: Tensor) -> Tensor:
    """Return matrices [E, in, out] as [E, out, in] or the other way; biases stay as they are."""
    return tensor.mT if tensor.ndim == 3 else tensor


# How foreign tensors become ours, given the shapes of ours, and how ours become foreign.
_BOTH_WAYS: dict[
    Transform,
    tuple[
        Callable[[Sequence[Tensor], Sequence[Shape]], Sequence[Tensor]],
        Callable[[Sequence[Tensor]], Sequence[Tensor]],
    ],
] = {
    "copy": (lambda theirs, shapes: theirs, lambda ours: ours),
    "stack": (lambda theirs, shapes: [stack(theirs)], lambda ours: ours[0].unbind(0)),
    "transpose": (lambda theirs, shapes: [theirs[0].mT], lambda ours: [ours[0].mT]),
    "flat": (
        lambda theirs, shapes: [theirs[0].unflatten(0, (shapes[0][0], -1)).mT],
        lambda ours: [ours[0].mT.flatten(0, 1)],
    ),
    "halves": (
        lambda theirs, shapes: theirs[0].mT.chunk(2, dim=1),
        lambda ours: [concatenate(ours, 1).mT],
    ),
    "rows": (
        # The rows of matrices are their next to last dimension; a bias has one dimension.
        lambda theirs, shapes: theirs[0].split(
            [shape[-2:][0] for shape in shapes], -min(theirs[0].ndim, 2)
        ),
        lambda ours: [concatenate(ours, -min(ours[0].ndim, 2))],
    ),
    "alternate": (
        lambda theirs, shapes: [_turned(theirs[0][..., start::2]) for start in (0, 1)],
        lambda ours: [stack([_turned(one) for one in ours], -1).flatten(-2)],
    ),
}


def apply_transform(
    transform: Transform, tensors: Sequence[Tensor], shapes: Sequence[Shape]
) -> list[Tensor]:
    """Return our tensors of a mapping.

    Args:
        transform: the transform.
        tensors: the foreign tensors, in the order of the mapping.
        shapes: the shapes of ours.
    """
    return list(_BOTH_WAYS[transform][0](tensors, shapes))


def invert_transform(transform: Transform, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the foreign tensors of a mapping, given ours."""
    return list(_BOTH_WAYS[transform][1](tensors))


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
