"""Folders whose config.json has a `quantization_config`: their codes opened, and written."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.base.version import __version__
from transom.checkpoints.files.layout import weight_files
from transom.checkpoints.files.lazy_tensors import PLAIN_DTYPES, LazyTensor, TensorGroup, main_dtype
from transom.checkpoints.files.safetensors_files import open_safetensors
from transom.checkpoints.quantized.bitsandbytes import kind_of, open_bitsandbytes, to_bitsandbytes
from transom.checkpoints.quantized.codes import Codes, Rows, under_foreign_names
from transom.checkpoints.quantized.config import Method, stated_quantization
from transom.checkpoints.quantized.float8 import WIDEST, open_float8, to_float8
from transom.checkpoints.quantized.packed import fits, fits_awq, open_packed, packed
from transom.names.tables import KeyMapping
from transom.planning.tables import counted
from transom.quantize.formats import FLOAT8, WeightFormat, empty_parts

# The last parts of the names of tensors that make the weight of a module.
_SUFFIXES = {
    "gptq": r"qweight|qzeros|scales|g_idx",
    "awq": r"qweight|qzeros|scales",
    "bitsandbytes": r"weight\.(?:absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)",
    "fp8": r"weight_scale(?:_inv)?",
}


def open_quantized(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, Codes]]:
    """Return the tensors of a quantized folder, and its weights in codes by their dense names.

    Weights of 8-bit floats in blocks of several outputs are among the tensors, in the dtype of the
    others.

    Raises:
        RequestError: The config or a tensor is wrong.
    """
    how = stated_quantization(folder)
    assert how is not None, "as the caller checked"
    source = open_safetensors(folder, weight_files(folder).files, apart=True)
    plain: dict[str, LazyTensor] = {}
    modules: dict[str, dict[str, LazyTensor]] = defaultdict(dict)
    # vLLM has scales for inputs and KV caches in 8 bits beside those of weights.
    extra = r".*\.(input|output|q|k|v|kv)_scale" if how.method == "fp8" else "(?!)"
    unread = [key for key in source if re.fullmatch(extra, key)]
    if unread:
        notice(f"{folder}: {counted(len(unread), 'tensor')} left unread: scales of inputs, caches")
    for key, lazy in source.items():
        match = re.fullmatch(rf"(.+)\.({_SUFFIXES[how.method]})", key)
        if match is None and key not in unread:
            plain[key] = lazy
        elif match is not None:
            modules[match[1]][match[2].removeprefix("weight.")] = lazy
    codes: dict[str, Codes] = {}
    kind = main_dtype({key: lazy for key, lazy in plain.items() if lazy.dtype in PLAIN_DTYPES})
    for module, stored in modules.items():
        key, where = f"{module}.weight", f"{folder}: {module}"
        if how.method in ("bitsandbytes", "fp8") and key in plain:
            stored["weight"] = plain.pop(key)
        if how.method == "bitsandbytes":
            codes[key] = open_bitsandbytes(where, stored)
        elif how.method == "fp8":
            found = open_float8(where, stored, how.block, kind)
            if isinstance(found, Codes):
                codes[key] = found
            else:
                plain[key] = found
        else:
            awq = how.method == "awq"
            codes[key] = open_packed(where, stored, *how.of(module), less_one=how.less_one, awq=awq)
    return plain, codes


def quantized_groups(
    mappings: Sequence[KeyMapping],
    groups: Sequence[TensorGroup],
    codes: Mapping[str, Codes],
    dtype: torch.dtype,
    *,
    awq: bool = False,
) -> tuple[list[TensorGroup], dict[str, Any]]:
    """Return the tensors of a folder with weights in codes, and its `quantization_config`.

    The codes of one method are written: gptq, bitsandbytes or fp8, whichever has most weights.
    Notices count the other codes, which are dequantized, and name the tensors that no other tool
    reads. With `awq`, all codes are written in that layout.

    Args:
        mappings: The names of the weights in the file, and ours.
        groups: The dense tensors of every mapping.
        codes: The weights in codes, by our names.
        dtype: The dtype in which products compute.
        awq: Write the layout of AWQ.

    Raises:
        RequestError: AWQ does not have the codes of a weight.
    """
    found = [[codes[name].plain() for name in one.ours if name in codes] for one in mappings]
    kind = _awq_method if awq else _method
    methods = [kind(*each) for each in zip(mappings, groups, found, strict=True)]
    sizes = Counter[Method | None]()
    for method, group in zip(methods, groups, strict=True):
        sizes[method] += sum(meta.numel() for meta in group.metas if method)
    chosen = max(sizes, key=sizes.__getitem__)
    written: dict[str, WeightFormat | None] = {}
    dense = 0
    for mapping, group, some, method in zip(mappings, groups, found, methods, strict=True):
        dense += bool(some) and method != chosen
        form = some[0].format if method and method == chosen else None
        matrix = group.metas[0].ndim > 1 and mapping.ours != ("tok_embeddings.weight",)
        if form or matrix:
            written |= {key.removesuffix(".weight"): form for key in mapping.foreign}
        if form and not matrix:
            notice(f"{mapping.foreign[0]} is in codes, which other tools can't read for embeddings")
    if dense:
        which = counted(dense, "weight")
        notice(f"{which} dequantized: the codes don't fit {chosen or 'gptq, bitsandbytes or fp8'}")
    config = _config(chosen, written, dtype) if chosen else {}

    def encode(parts: Rows, format: WeightFormat) -> Rows:
        if chosen == "fp8":
            return to_float8(parts)
        if chosen == "bitsandbytes":
            return to_bitsandbytes(parts, format, dtype)
        return packed(parts, format, less_one=config.get("checkpoint_format") == "gptq", awq=awq)

    out = [
        _coded(mapping, group, some, encode) if method and method == chosen else group
        for mapping, group, some, method in zip(mappings, groups, found, methods, strict=True)
    ]
    return out, config


def _method(mapping: KeyMapping, group: TensorGroup, found: Sequence[Codes]) -> Method | None:
    """Return the method that stores the weights of a mapping as they are, or None."""
    if len(found) < len(mapping.ours) or len({one.format for one in found}) > 1:
        return None
    format, shape = found[0].format, group.metas[0].shape
    if mapping.transform not in ("copy", "stack", "rows"):
        return None
    if fits(format, shape):
        return "gptq"
    if len(shape) == 2 and format.codes is FLOAT8:
        return "fp8"
    return "bitsandbytes" if len(shape) == 2 and kind_of(format) else None


def _awq_method(mapping: KeyMapping, group: TensorGroup, found: Sequence[Codes]) -> Method | None:
    """Return `awq` if the weights of a mapping are in codes, which it must have."""
    if not found:
        return None
    inside = mapping.ours not in (("tok_embeddings.weight",), ("output.weight",))
    fits = inside and _method(mapping, group, found) == "gptq"
    fits = fits and fits_awq(found[0].format, group.metas[0].shape)
    reason = f"hf, as {mapping.foreign[0]} is not int4 in groups, or not in a layer"
    expect(fits, "format", "awq", reason)
    return "awq"


def _coded(
    mapping: KeyMapping,
    group: TensorGroup,
    found: Sequence[Codes],
    encode: Callable[[Rows, WeightFormat], Rows],
) -> TensorGroup:
    """Return a group of tensors with the codes of its weights."""
    format, count = found[0].format, len(mapping.foreign)

    def made(weights: Sequence[Rows]) -> dict[str, Tensor]:
        return {
            key.removesuffix("weight") + name: tensor
            for key, rows in zip(mapping.foreign, weights, strict=True)
            for name, tensor in encode(rows, format).items()
        }

    def read() -> list[Tensor]:
        ours = [one.read() for one in found]
        return list(made(under_foreign_names(mapping.transform, ours, count)).values())

    metas = made([empty_parts(meta.shape, format, "meta") for meta in group.metas])
    return TensorGroup(tuple(metas), [meta.to("meta") for meta in metas.values()], read)


def _config(
    method: Method, modules: Mapping[str, WeightFormat | None], dtype: torch.dtype
) -> dict[str, Any]:
    """Return the `quantization_config` of a folder.

    Args:
        method: gptq, awq, bitsandbytes or fp8.
        modules: The linear layers of the file by name, each with the format of its codes; None if
            it is dense. Embeddings are among them if they are in codes.
        dtype: The dtype in which products compute.
    """
    coded = {module: form for module, form in modules.items() if form is not None}
    dense = [module for module, form in modules.items() if form is None]
    skipped = dense if "lm_head" in modules else [*dense, "lm_head"]  # the output if it is tied
    if method == "fp8":
        ((group, _),) = Counter(form.group for form in coded.values()).most_common(1)
        return {
            "quant_method": method,
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [1, group or WIDEST],
            "modules_to_not_convert": skipped,
        }
    if method == "bitsandbytes":
        return {
            "quant_method": method,
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_use_double_quant": False,
            "llm_int8_skip_modules": skipped,
        }
    sizes = {
        name: (8 if form.levels is None else 4, form.group or -1) for name, form in coded.items()
    }
    ((most, _),) = Counter(sizes.values()).most_common(1)
    if method == "awq":
        several = sorted({group for _, group in sizes.values()})
        reason = f"hf, as groups have {' and '.join(map(str, several))} inputs"
        expect(len(several) == 1, "format", "awq", reason)
        stated = {"quant_method": method, "bits": 4, "group_size": most[1], "version": "gemm"}
        return {**stated, "zero_point": True, "modules_to_not_convert": dense}
    dynamic: dict[str, dict[str, int]] = {
        f"-:^{re.escape(name)}$": {} for name in dense if name != "lm_head"
    }
    for name, size in sizes.items():
        if size != most:
            dynamic[f"+:^{re.escape(name)}$"] = dict(zip(("bits", "group_size"), size, strict=True))
    symmetric = all(form.offset == "none" for form in coded.values())
    return {
        "quant_method": method,
        "bits": most[0],
        "group_size": most[1],
        "desc_act": any(form.ordered for form in coded.values()),
        "sym": symmetric,
        # Only the second version has a zero point of 0.
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "lm_head": "lm_head" in coded,
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"transom:{__version__}"]},
        **({"dynamic": dynamic} if dynamic else {}),
    }
