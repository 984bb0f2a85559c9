"""Write GGUF files, tensor by tensor.

As in the files of llama.cpp, norms, biases, routers and everything with one dimension stay in
float32. Embeddings and output are Q8_0 in a file of 4 bits. Rows that do not fill blocks are F16.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import notice, require
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.layout import holds_tokenizer
from transom.checkpoints.files.lazy_tensors import LazyTensors, TensorGroup, narrowed
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.model_metadata import model_metadata
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.checkpoints.gguf.weights import Codes, pieces
from transom.checkpoints.mapping import to_foreign
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.names.tables import KeyMapping
from transom.names.transforms import Shape, invert_transform, permute_rotary
from transom.quantize.ggml import DENSE, TYPES, WRITTEN, quantize, row_bytes

# The numbers of `llama_ftype` of llama.h for files that have mostly one type.
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
    "MXFP4": 38,
}
_OTHER_NAMES = {str(dtype).removeprefix("torch."): name for name, dtype in DENSE.items()}
GGUF_DTYPES = {**{name.lower(): name for name in WRITTEN}, **_OTHER_NAMES}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor to write: its type, the shape [..., out, bytes], and what returns the bytes."""

    type: str
    shape: Shape
    read: Callable[[], Tensor]


@dataclass(frozen=True)
class GgufLayout:
    """The metadata and the tensors of a file to write."""

    config: dict[str, Any]
    tensors: Mapping[str, GgufTensor]
    file: ClassVar[str] = "model.gguf"

    def write(self, out: Path) -> int:
        """Write the file into a folder, with the tokenizer there; return the bytes of weights."""
        from gguf import (
            GGMLQuantizationType,
            GGUFValueType,
            GGUFWriter,
        )  # takes a third of a second

        stated = dict(self.config)
        architecture = stated.pop("general.architecture")
        if holds_tokenizer(out):
            stated |= tokenizer_metadata(out, stated[f"{architecture}.vocab_size"], "tokenizer")
        else:
            notice("the GGUF file has no tokenizer; llama.cpp needs one to open it")
        with contextlib.closing(GGUFWriter(out / self.file, architecture)) as writer:
            for key, value in stated.items():
                if value not in ("", []):
                    number = GGUFValueType.UINT32 if type(value) is int else None
                    writer.add_key_value(key, value, number or GGUFValueType.get_type(value))
            for name, one in self.tensors.items():
                size, kind = math.prod(one.shape), GGMLQuantizationType[one.type]
                writer.add_tensor_info(name, one.shape, np.dtype(np.uint8), size, kind)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for one in self.tensors.values():
                writer.write_tensor_data(one.read().numpy())
        return sum(math.prod(one.shape) for one in self.tensors.values())


def plan_gguf(
    args: ModelArgs, ours: LazyTensors, dtype: str | None, codes: Mapping[str, Codes]
) -> GgufLayout:
    """Return everything that is written for a model, before anything is written.

    Args:
        args: The model's arguments.
        ours: Its parameters under Transom's names. They are read while they are written.
        dtype: A name of `GGUF_DTYPES`; None keeps the type of each parameter.
        codes: The parameters that are in the codes of a GGUF file. They are copied if their type
            is that of the new file.

    Raises:
        RequestError: GGUF can't state the model, or has no type for its dtype.
    """
    stated = model_metadata(args, ours)
    name = stated.metadata["general.architecture"]
    kind, mappings = ARCHITECTURES[name], WEIGHT_NAMES[f"gguf_{name}"].mappings(args, ours)
    to: RopeLayout = "interleaved" if kind.interleaved else "halves"

    def changed(name: str, tensor: Tensor) -> Tensor:
        tensor = permute_rotary(name, tensor, args, to)
        shifted = kind.norms_plus_one and name.endswith("norm.weight")
        return tensor.float() + 1 if shifted else tensor

    ours = {name: lazy.then(partial(changed, name)) for name, lazy in ours.items()}
    groups = to_foreign(mappings, ours, "format gguf")
    tensors = {
        key: GgufTensor("F32", (4 * len(one),), partial(quantize, "F32", torch.tensor(one)))
        for key, one in stated.factors.items()
    }
    for mapping, group in zip(mappings, groups, strict=True):
        (key,), (meta,) = group.keys, group.metas
        own = str(meta.dtype).removeprefix("torch.")
        require(own in _OTHER_NAMES, f"{key}: dtype", own, f"expected {', '.join(_OTHER_NAMES)}")
        type = _type_of(key, meta.shape, GGUF_DTYPES[dtype or own])
        read = partial(_converted, key, type, group)
        kinds = {codes[name].type if name in codes else "" for name in mapping.ours}
        kept = kinds == {type} or (dtype is None and len(kinds) == 1 and kinds != {""})
        if kept and args.rope_layout == to:
            (type,), read = kinds, partial(_copied, mapping, codes)
        *outer, inputs = meta.shape
        tensors[key] = GgufTensor(type, (*outer, row_bytes(type, inputs)), read)
    types = Counter(one.type for one in tensors.values() if len(one.shape) > 1)
    most = types.most_common(1)[0][0]
    if most not in DENSE and types["F16"]:
        notice(f"{types['F16']} tensors are F16: their row length is no multiple of {most}")
    if name in ("llama", "phi3") and args.sliding_window is not None:
        notice(f"llama.cpp ignores sliding_window = {args.sliding_window} of the family {name}")
    facts = {"general.file_type": _FILE_TYPES[most], "general.quantization_version": 2}
    return GgufLayout({"general.type": "model", **facts, **stated.metadata}, tensors)


def _type_of(name: str, shape: Shape, kind: str) -> str:
    """Return the type of a tensor in a file of a type."""
    wide = not name.endswith(".weight") or name.endswith(("norm.weight", "ffn_gate_inp.weight"))
    if wide or len(shape) == 1:
        return "F32"
    if kind in DENSE or shape[-1] % TYPES[kind].weights:
        return kind if kind in DENSE else "F16"
    return "Q8_0" if name in ("token_embd.weight", "output.weight") else kind


def _converted(name: str, kind: str, group: TensorGroup) -> Tensor:
    """Return the bytes of the only tensor of a group in a type."""
    read, wide = group.read()[0].detach().cpu(), DENSE.get(kind, torch.float32)
    some = (narrowed(name, read[rows], wide) for rows in pieces(read.shape))
    return torch.cat([quantize(kind, numbers) for numbers in some])


def _copied(mapping: KeyMapping, codes: Mapping[str, Codes]) -> Tensor:
    return invert_transform(mapping.transform, [codes[name].blocks() for name in mapping.ours])[0]
