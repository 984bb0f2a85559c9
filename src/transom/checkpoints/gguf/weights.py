"""The tensors of GGUF files under Transom's conventions, read one at a time.

Tensors of codes are dequantized to float32, exactly as ggml does it. What the converter of
llama.cpp has added to norms is subtracted.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from transom.base.files import gguf_pointer
from transom.checkpoints.files.file_pieces import FilePiece, SourceFile, read_piece
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.folder import open_folder
from transom.checkpoints.gguf.reader import GgufModel, StoredTensor, map_bytes
from transom.checkpoints.quantized.codes import Codes, Rows, pieces
from transom.quantize.ggml import DENSE, TYPES, dense

_HALVES = {torch.float16, torch.bfloat16}


def open_gguf(folder: Path, *, apart: bool = False) -> dict[str, LazyTensor]:
    """Return the tensors of a translated folder by their names in the GGUF file, not read yet.

    llama.cpp stores norms and routers in float32 also where the file is in half precision. Those
    whose numbers all have that precision are returned in it.
    """
    model, architecture = open_folder(folder)
    kind, places = ARCHITECTURES[architecture], _places(model)
    out: dict[str, LazyTensor] = {}
    for name, stored in model.tensors.items():
        if name.startswith("rope_") or ".attn_rot_embd." in name:
            continue  # divisors of rotary frequencies, which became settings
        read = functools.partial(_read, places[name], stored, apart)
        plain = DENSE.get(stored.type)
        mapped, pieces = plain is not None and not apart, (places[name],) if plain else ()
        lazy = LazyTensor(stored.shape, plain or torch.float32, read, mapped, pieces)
        shifted = kind.norms_plus_one and name.endswith("norm.weight")
        out[name] = lazy.then(lambda tensor: tensor - 1) if shifted else lazy
    narrow = {lazy.dtype for lazy in out.values()} & _HALVES
    if all(stored.type in DENSE for stored in model.tensors.values()) and len(narrow) == 1:
        out = {name: _narrowed(lazy, *narrow) for name, lazy in out.items()}
    return out


def _places(model: GgufModel) -> dict[str, FilePiece]:
    files = [SourceFile(file) for file in model.files]
    return {
        name: FilePiece(files[stored.part], stored.offset, stored.size)
        for name, stored in model.tensors.items()
    }


def gguf_codes(folder: Path, *, apart: bool = False) -> dict[str, Codes]:
    """Return the tensors of a translated folder that are in codes, not read yet.

    `apart` is that of `open_safetensors`.
    """
    model, _ = open_folder(folder)
    places = _places(model)
    return {
        name: Codes(
            TYPES[stored.type].format,
            stored.shape,
            functools.partial(_rows, places[name], stored, apart),
            stored.type,
        )
        for name, stored in model.tensors.items()
        if stored.type not in DENSE
    }


def _rows(place: FilePiece, stored: StoredTensor, apart: bool) -> Rows:
    return {"blocks": _blocks(place, stored, apart)}


def _blocks(place: FilePiece, stored: StoredTensor, apart: bool) -> Tensor:
    """Return the bytes of a tensor [..., out, bytes], or those of the numbers of a plain type."""
    shape = *stored.shape[:-1], -1
    if apart:
        return read_piece(place, shape, torch.uint8)
    return torch.from_numpy(map_bytes(place.file.path, stored)).view(shape)


def _read(place: FilePiece, stored: StoredTensor, apart: bool) -> Tensor:
    blocks = _blocks(place, stored, apart)
    if stored.type in DENSE or blocks.ndim == 1:
        return dense(stored.type, blocks)
    out = torch.empty(stored.shape)
    for rows in pieces(stored.shape):
        out[rows] = dense(stored.type, blocks[rows])
    return out


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
