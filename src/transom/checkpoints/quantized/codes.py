"""Weights that are in codes in a file, under our names."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transom.base.errors import notice
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.names.tables import KeyMapping, Transform
from transom.names.transforms import Shape, apply_transform, invert_transform
from transom.quantize.formats import WeightFormat, dequantize, empty_parts, wide_scales
from transom.quantize.ggml import parts as parts_of_blocks
from transom.quantize.leaves import Quantized

_PIECE = 1 << 22  # numbers that are dequantized at a time
Rows = dict[str, Tensor]


@dataclass(frozen=True)
class Codes:
    """A weight in the codes of a file, not read yet.

    Attributes:
        format: The format of its parts.
        shape: The shape of the weight.
        rows: Returns the parts of the weight, or with a `type` its `blocks` [..., out, bytes]: as
            views of the memory map where nothing has to be computed.
        type: The ggml type of the blocks.
    """

    format: WeightFormat
    shape: Shape
    rows: Callable[[], Rows]
    type: str = ""

    @classmethod
    def of(cls, leaf: Quantized) -> Codes:
        """Return the codes of a leaf."""
        return cls(leaf.format, leaf.shape, lambda: leaf.parts_in_rows)

    def read(self) -> Rows:
        """Return the parts of the weight."""
        if not self.type:
            return self.rows()
        out, blocks = empty_parts(self.shape, self.format, "cpu"), self.rows()["blocks"]
        by_row = {name: part.unflatten(0, (self.shape[0], -1)) for name, part in out.items()}
        for rows in pieces(self.shape):
            some = blocks[rows]
            for name, part in parts_of_blocks(self.type, some).items():
                by_row[name][rows] = part.unflatten(0, (len(some), -1))
        return out

    def dense(self) -> LazyTensor:
        """Return the weight in float32."""
        return LazyTensor(self.shape, torch.float32, lambda: dequantize(self.read(), self.format))

    def plain(self) -> Codes:
        """Return the weight with scales in float32 if they are codes themselves."""
        if not self.format.block or self.format.offset == "minimums":
            return self

        def rows() -> Rows:
            parts = self.read()
            scales = wide_scales(parts, "scales", self.format, slice(None))
            return {"codes": parts["codes"], "scales": scales}

        return Codes(WeightFormat(self.format.levels, self.format.group), self.shape, rows)

    def reordered(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """Return the weight with its rows in another order, in which `change` brings a matrix."""

        def rows() -> Rows:
            found = self.rows()
            return {name: found[name] if name == "order" else change(found[name]) for name in found}

        return replace(self, rows=rows)


def pieces(shape: Shape) -> list[slice]:
    """Return slices of the first dimension with about `_PIECE` numbers each."""
    step = max(1, _PIECE // math.prod(shape[1:]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def under_our_names(
    mappings: Iterable[KeyMapping], source: Mapping[str, Codes], leaves: Mapping[str, Shape]
) -> dict[str, Codes]:
    """Return the codes of our weights from those of files.

    A weight that is made of several, which have different formats, is left out.

    Args:
        mappings: Names of files and ours.
        source: The weights of the files by their keys.
        leaves: The shapes of all weights of leaves, by our names.
    """
    out: dict[str, Codes] = {}
    for mapping in mappings:
        found = [source[key] for key in mapping.foreign if key in source]
        complete = len(found) == len(mapping.foreign) and not any(n in out for n in mapping.ours)
        if not complete:
            continue
        if len({(one.format, one.type) for one in found}) > 1:
            notice(f"{mapping.ours[0]} is dequantized: its parts are in codes of several formats")
            continue
        shapes = [leaves[name] for name in mapping.ours]
        for index, name in enumerate(mapping.ours):
            rows = functools.partial(_made, mapping.transform, found, shapes, index)
            out[name] = replace(found[0], shape=shapes[index], rows=rows)
    return out


def _made(
    transform: Transform, found: Sequence[Codes], shapes: Sequence[Shape], index: int
) -> Rows:
    """Return the rows of one of the weights that a mapping makes of those of files."""
    read = [one.rows() for one in found]
    return {
        name: read[0][name]
        if (name, transform) == ("order", "rows")
        else apply_transform(transform, [rows[name] for rows in read], shapes)[index]
        for name in read[0]
    }


def under_foreign_names(transform: Transform, ours: Sequence[Rows], count: int) -> list[Rows]:
    """Return the rows of `count` weights of files from those of ours."""
    out: list[Rows] = [{} for _ in range(count)]
    for name in ours[0]:
        if (name, transform) == ("order", "rows"):
            made = [ours[0][name]]
        else:
            made = invert_transform(transform, [rows[name] for rows in ours])
        for rows, tensor in zip(out, made, strict=True):
            rows[name] = tensor
    return out
