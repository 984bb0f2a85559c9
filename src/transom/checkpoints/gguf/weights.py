"""The tensors of GGUF files under Transom's conventions, read one at a time.

Tensors of codes are dequantized to float32, exactly as ggml does it. What the converter of
llama.cpp has added to norms is subtracted.
"""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.folder import open_folder
from transom.checkpoints.gguf.reader import PLAIN_TYPES, StoredTensor, map_bytes

_DTYPES = dict(zip(PLAIN_TYPES, (torch.float32, torch.float16, torch.bfloat16), strict=True))
_HALVES = {torch.float16, torch.bfloat16}


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
        lazy = LazyTensor(stored.shape, _DTYPES.get(stored.type, torch.float32), read)
        shifted = kind.norms_plus_one and name.endswith("norm.weight")
        out[name] = lazy.then(lambda tensor: tensor - 1) if shifted else lazy
    narrow = {lazy.dtype for lazy in out.values()} & _HALVES
    if all(stored.type in PLAIN_TYPES for stored in model.tensors.values()) and len(narrow) == 1:
        out = {name: _narrowed(lazy, *narrow) for name, lazy in out.items()}
    return out


def _read(file: Path, stored: StoredTensor) -> Tensor:
    mapped = map_bytes(file, stored)
    if stored.type in _DTYPES:
        return torch.from_numpy(mapped).view(_DTYPES[stored.type]).view(stored.shape)
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    dense = dequantize(mapped.reshape(*stored.shape[:-1], -1), GGMLQuantizationType[stored.type])
    return torch.from_numpy(np.ascontiguousarray(dense, np.float32))


def _narrowed(lazy: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    """Return a float32 tensor in another dtype if it has all of its numbers."""
    if lazy.dtype != torch.float32:
        return lazy
    wide = lazy.read()
    narrow = wide.to(dtype)
    return LazyTensor.of(narrow) if torch.equal(narrow.float(), wide) else lazy


def stored_types(folder: Path) -> Counter[str]:
    """Return how many tensors of each type the file of a translated folder has."""
    model, _ = open_folder(folder)
    return Counter(stored.type for stored in model.tensors.values())
