"""Write GGUF files, tensor by tensor.

As in the files of llama.cpp, norms, biases, routers and everything with one dimension stay in
float32. Embeddings and output are Q8_0 in a file of 4 bits. Rows that do not fill blocks are F16.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.layout import holds_tokenizer
from transom.checkpoints.files.lazy_tensors import LazyTensors, TensorGroup, narrowed
from transom.checkpoints.gguf.config import ARCHITECTURES
from transom.checkpoints.gguf.model_metadata import model_metadata
from transom.checkpoints.gguf.tokenizer_metadata import tokenizer_metadata
from transom.checkpoints.mapping import to_foreign
from transom.checkpoints.quantized.codes import Codes, Rows, pieces
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.names.tables import Transform
from transom.names.transforms import Shape, invert_transform, permute_rotary
from transom.planning.tables import counted
from transom.quantize.formats import INT4
from transom.quantize.ggml import DENSE, TYPES, WRITTEN, blocks, quantize, row_bytes

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
        codes: The parameters that are in codes. The codes are copied if a type has them that is
            that of the new file, or without a `dtype`.

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
    rounded = again = 0
    for mapping, group in zip(mappings, groups, strict=True):
        (key,), (meta,) = group.keys, group.metas
        own = str(meta.dtype).removeprefix("torch.")
        expect(own in _OTHER_NAMES, f"{key}: dtype", own, ", ".join(_OTHER_NAMES))
        type = _type_of(key, meta.shape, GGUF_DTYPES[dtype or own])
        read = partial(_converted, key, type, group)
        coded = {name: _as_blocks(codes[name]) for name in mapping.ours if name in codes}
        kinds = {coded[name].type if name in coded else "" for name in mapping.ours}
        kept = kinds == {type} or (dtype is None and len(kinds) == 1 and kinds != {""})
        if kept:
            change = partial(permute_rotary, args=args, to=to)
            rows = [one.reordered(partial(change, name)) for name, one in coded.items()]
            (type,), read = kinds, partial(_copied, mapping.transform, rows)
            rounded += any(not codes[name].type and not _is_exact(codes[name]) for name in coded)
        else:
            again += bool(coded)
        *outer, inputs = meta.shape
        tensors[key] = GgufTensor(type, (*outer, row_bytes(type, inputs)), read)
    if rounded:
        which = counted(rounded, "weight")
        notice(f"{which} in the same codes, with scales and minimums in half precision")
    if again:
        notice(f"{counted(again, 'weight')} dequantized: the file has no such codes")
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


def _copied(transform: Transform, codes: Sequence[Codes]) -> Tensor:
    return invert_transform(transform, [one.rows()["blocks"] for one in codes])[0]


def _as_blocks(one: Codes) -> Codes:
    """Return a weight as blocks of a type that has its codes, or as it is if there is none.

    The factors of blocks are in half precision.
    """
    form, inputs = one.format, one.shape[-1]
    group = form.group or inputs
    name = _SAME_CODES.get((form.levels, form.offset), "")
    other = form.block or form.ordered or form.codes.is_floating_point
    if one.type or not name or other or group % TYPES[name].weights:
        return one

    def rows() -> Rows:
        read = one.read()
        scales = read["scales"].float().repeat_interleave(group // TYPES[name].weights, -1)
        parts = {"codes": read["codes"], "scales": scales}
        if form.offset == "zeros":
            zeros = read["zeros"].float() - INT4[0]
            parts["minimums"] = -scales * zeros.repeat_interleave(group // TYPES[name].weights, -1)
        return {"blocks": blocks(name, parts)}

    return Codes(TYPES[name].format, one.shape, rows, name)


_SAME_CODES = {(INT4, "none"): "Q4_0", (INT4, "zeros"): "Q4_1", (None, "none"): "Q8_0"}


def _is_exact(one: Codes) -> bool:
    return one.format.offset == "none" and one.format.scales == torch.float16
