"""The tensors of GGUF files under Transom's conventions, read one at a time.

Tensors of codes are dequantized to float32, exactly as ggml does it. What the converter of
llama.cpp has added to norms is subtracted.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transom.base.files import gguf_pointer
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.layout import names_table
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.folder import open_folder
from transom.checkpoints.gguf.reader import GgufModel, StoredTensor, map_bytes
from transom.config.model_args import ModelArgs
from transom.names.tables import Transform
from transom.names.transforms import Shape, apply_transform
from transom.quantize.formats import WeightFormat, empty_parts
from transom.quantize.ggml import DENSE, TYPES, dense, parts

_PIECE = 1 << 22  # numbers that are dequantized at a time
_HALVES = {torch.float16, torch.bfloat16}


@dataclass(frozen=True)
class Codes:
    """The weight of a leaf in the codes of a GGUF file, not read yet.

    Attributes:
        type: The type of its tensor.
        shape: The shape of the weight.
        blocks: Returns the blocks [..., out, bytes], as a view of the memory map if it can.
    """

    type: str
    shape: Shape
    blocks: Callable[[], Tensor]

    @property
    def format(self) -> WeightFormat:
        """The format of the parts."""
        return TYPES[self.type].format

    def read(self) -> dict[str, Tensor]:
        """Return the parts of the weight, in memory of their own."""
        out, blocks = empty_parts(self.shape, self.format, "cpu"), self.blocks()
        by_row = {name: part.unflatten(0, (self.shape[0], -1)) for name, part in out.items()}
        for rows in pieces(self.shape):
            some = blocks[rows]
            for name, part in parts(self.type, some).items():
                by_row[name][rows] = part.unflatten(0, (len(some), -1))
        return out


def open_gguf(folder: Path) -> dict[str, LazyTensor]:
    """Return the tensors of a translated folder by their names in the GGUF file, not read yet.

    llama.cpp stores norms and routers in float32 also where the file is in half precision. Those
    whose numbers all have that precision are returned in it.
    """
    model, architecture = open_folder(folder)
    kind = ARCHITECTURES[architecture]
    out: dict[str, LazyTensor] = {}
    for name, stored in model.tensors.items():
        if name.startswith("rope_") or ".attn_rot_embd." in name:
            continue  # divisors of rotary frequencies, which became settings
        read = functools.partial(_read, model.files[stored.part], stored)
        lazy = LazyTensor(stored.shape, DENSE.get(stored.type, torch.float32), read)
        shifted = kind.norms_plus_one and name.endswith("norm.weight")
        out[name] = lazy.then(lambda tensor: tensor - 1) if shifted else lazy
    narrow = {lazy.dtype for lazy in out.values()} & _HALVES
    if all(stored.type in DENSE for stored in model.tensors.values()) and len(narrow) == 1:
        out = {name: _narrowed(lazy, *narrow) for name, lazy in out.items()}
    return out


def open_codes(folder: Path, args: ModelArgs, leaves: Mapping[str, Shape]) -> dict[str, Codes]:
    """Return the codes of leaves whose weights have one in the file, not read yet.

    Args:
        folder: A translated folder.
        args: Its model.
        leaves: The shapes of all weights of leaves, by our names.
    """
    model, _ = open_folder(folder)
    out: dict[str, Codes] = {}
    for mapping in WEIGHT_NAMES[names_table(folder)].mappings_to_read(args, leaves):
        found = [model.tensors[key] for key in mapping.foreign if key in model.tensors]
        kinds = {stored.type for stored in found}
        complete = len(found) == len(mapping.foreign) and not any(n in out for n in mapping.ours)
        if not complete or len(kinds) > 1 or kinds & DENSE.keys():
            continue
        shapes = [leaves[name] for name in mapping.ours]
        made = functools.partial(_made, model, mapping.transform, found, shapes)
        for index, name in enumerate(mapping.ours):
            read = functools.partial(made, index)
            out[name] = Codes(found[0].type, shapes[index], read)
    return out


def _made(
    model: GgufModel,
    transform: Transform,
    tensors: Sequence[StoredTensor],
    shapes: Sequence[Shape],
    index: int,
) -> Tensor:
    """Return the blocks of one of the weights that a mapping makes of tensors."""
    blocks = [_blocks(model.files[stored.part], stored) for stored in tensors]
    return apply_transform(transform, blocks, shapes)[index]


def _blocks(file: Path, stored: StoredTensor) -> Tensor:
    """Return the bytes of a tensor [..., out, bytes], or those of the numbers of a plain type."""
    mapped = torch.from_numpy(map_bytes(file, stored))
    return mapped.view(*stored.shape[:-1], -1)


def _read(file: Path, stored: StoredTensor) -> Tensor:
    blocks = _blocks(file, stored)
    if stored.type in DENSE or blocks.ndim == 1:
        return dense(stored.type, blocks)
    out = torch.empty(stored.shape)
    for rows in pieces(stored.shape):
        out[rows] = dense(stored.type, blocks[rows])
    return out


def pieces(shape: Shape) -> list[slice]:
    """Return slices of the first dimension with about `_PIECE` numbers each."""
    step = max(1, _PIECE // math.prod(shape[1:]))
    return [slice(start, start + step) for start in range(0, shape[0], step)]


def _narrowed(lazy: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return a float32 tensor in another dtype if it has all of its numbers."""
    if lazy.dtype != torch.float32:
        return lazy
    wide = lazy.read()
    narrow = wide.to(dtype)
    return LazyTensor.of(narrow) if torch.equal(narrow.float(), wide) else lazy


def quantized_types(folder: Path) -> str:
    """Return how many tensors of each type the GGUF file of a folder has; "" if none is quantized.

    It is "" for other folders too.
    """
    tensors = gguf_pointer(folder).get("tensors", {})
    types = Counter(kind for _, kind, *_ in tensors.values())
    if types.keys() <= DENSE.keys():
        return ""
    return ", ".join(f"{kind} ({count})" for kind, count in types.most_common())
