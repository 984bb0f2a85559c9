"""`quantization_config` of a config.json: which weights of a folder are in codes, and how.

The sources are `utils/quantization_config.py` of transformers 5 and `quantization/config.py` of
GPTQModel. No torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transom.base.errors import expect
from transom.base.fields import regex
from transom.base.files import read_json
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.files.layout import CONFIG, folder_format
from transom.planning.tables import counted

KEY = "quantization_config"
Method = Literal["gptq", "awq", "bitsandbytes", "fp8"]
# Keys that say how the codes were found, or how other programs compute with them.
_HARMLESS: dict[str, str] = {
    "gptq": "act_group_aware backend batch_size block_name_to_quantize cache_block_outputs "
    "damp_auto_increment damp_percent dataset desc_act disable_exllama embeddings exllama_config "
    "lm_head max_input_length meta method model_file_base_name model_name_or_path model_seqlen "
    "module_name_preceding_first_block modules_in_block_to_quantize mse offload_to_disk "
    "offload_to_disk_path pad_token_id static_groups sym tokenizer true_sequential use_cuda_fp16 "
    "use_exllama",
    # GPTQModel writes `dynamic` here too, and leaves out what it excludes; all else has one size.
    "awq": "backend desc_act do_fuse dynamic exllama_config fuse_max_seq_len lm_head meta method "
    "modules_to_fuse modules_to_not_convert",
    "bitsandbytes": "_load_in_4bit _load_in_8bit bnb_4bit_compute_dtype bnb_4bit_quant_storage "
    "bnb_4bit_quant_type bnb_4bit_use_double_quant embeddings llm_int8_enable_fp32_cpu_offload "
    "llm_int8_has_fp16_weight llm_int8_skip_modules llm_int8_threshold",
    "fp8": "dequantize ignored_layers modules_to_not_convert",
}


@dataclass(frozen=True)
class Quantization:
    """How the weights of a folder are stored.

    Attributes:
        method: The layout of their tensors.
        bits: Bits of a code.
        group: Neighbouring inputs that share a scale; 0 for all inputs of an output.
        less_one: gptq: Zero points are stored less one, as in its first version.
        block: fp8: Outputs and inputs that share a scale; zeros for all.
        dynamic: gptq: Bits and groups of modules whose names match a pattern.
    """

    method: Method
    bits: int = 4
    group: int = 0
    less_one: bool = False
    block: tuple[int, int] = (0, 0)
    dynamic: tuple[tuple[re.Pattern[str], int, int], ...] = ()

    def __str__(self) -> str:
        """How most modules are stored, and how many are stored in other ways."""
        others = Counter(_words(*sizes) for _, *sizes in self.dynamic)
        shown = [f"{how} for {counted(n, 'pattern')} of names" for how, n in others.items()]
        return "; ".join([f"{self.method} of {_words(self.bits, self.group)}", *shown])

    def of(self, module: str) -> tuple[int, int]:
        """Return the bits and the group of a module."""
        own = (one[1:] for one in self.dynamic if one[0].match(module))
        return next(own, (self.bits, self.group))


def _words(bits: int, group: int) -> str:
    return f"{bits} bits" + (f" in groups of {group}" if group else "")


def read_quantization(config: ForeignConfig) -> Quantization | None:
    """Return how the weights of a folder are stored; None if they are not quantized.

    Args:
        config: The content of its config.json.

    Raises:
        RequestError: Transom can't read the method, or a value of a key.
    """
    if not config.get(KEY):
        return None
    own, methods = config.part(KEY, {}), tuple(_READERS)
    method = own.get("quant_method")
    expected = f"{', '.join(methods)}, or weights that are not quantized"
    own.check(method in methods, "quant_method", expected)
    for key in _HARMLESS[method].split():
        own.get(key)
    return _READERS[method](own)


def stated_quantization(folder: Path) -> Quantization | None:
    """Return `read_quantization` of a model folder of any format."""
    if folder_format(folder) not in ("native", "hf"):
        return None
    path = folder / CONFIG
    return read_quantization(ForeignConfig(read_json(path), str(path), {}))


def _gptq(own: ForeignConfig) -> Quantization:
    own.expect("pack_dtype", "int32")
    own.expect("is_marlin_format", False)
    for key in ("adapter", "rotation"):
        own.check(not own.get(key), key, "none")
    layout = "format" if own.get("checkpoint_format") is None else "checkpoint_format"
    own.expect(layout, "gptq", "gptq_v2")
    own.get("format")
    stated = {"bits": own["bits"], "group_size": own["group_size"]}
    dynamic = own.get("dynamic", {})
    own.check(isinstance(dynamic, Mapping), "dynamic", "patterns of names")
    patterns: list[tuple[re.Pattern[str], int, int]] = []
    for text, changes in dynamic.items():
        if text.startswith("-:"):
            continue  # these are not quantized, as their tensors show
        where = f"{own.where}: dynamic: {text}"
        pattern = regex(text.removeprefix("+:"), f"{own.where}: dynamic")
        patterns.append((pattern, *_sizes({**stated, **changes}, where)))
    less_one = own.get(layout, "gptq") == "gptq"
    sizes = _sizes(stated, own.where)
    return Quantization("gptq", *sizes, less_one, dynamic=tuple(patterns))


def _awq(own: ForeignConfig) -> Quantization:
    for key in ("version", "checkpoint_format", "format"):  # the last two are GPTQModel's
        own.check(str(own.get(key, "gemm")).lower() == "gemm", key, "gemm")
    own.expect("pack_dtype", "int32")
    own.expect("zero_point", True, False)  # if not, `qzeros` has the middle of all codes
    own.expect("bits", 4)
    return Quantization("awq", *_sizes({"bits": 4, "group_size": own["group_size"]}, own.where))


def _bitsandbytes(own: ForeignConfig) -> Quantization:
    own.expect("load_in_8bit", False)
    own.expect("load_in_4bit", True)
    return Quantization("bitsandbytes")


def _fp8(own: ForeignConfig) -> Quantization:
    own.expect("fmt", "e4m3")
    scheme = own.get("activation_scheme")
    own.note(f"activation_scheme = {scheme!r}: only GPUs that multiply 8-bit floats round inputs")
    block = own.get("weight_block_size", [0, 0])
    fits = isinstance(block, list) and [type(n) for n in block] == [int, int] and min(block) >= 0
    own.check(fits, "weight_block_size", "two numbers")
    return Quantization("fp8", 8, block=(block[0], block[1]))


_READERS = {"gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes, "fp8": _fp8}


def _sizes(stated: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Return bits and group."""
    bits, group = stated["bits"], stated["group_size"]
    expect(bits in (4, 8), f"{where}: bits", bits, "4 or 8")
    fits = type(group) is int and (group == -1 or group > 1)
    expect(fits, f"{where}: group_size", group, "-1 or a number of inputs")
    return bits, max(group, 0)
