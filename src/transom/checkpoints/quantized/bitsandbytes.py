"""Weights of 4 bits as bitsandbytes stores them.

`weight` uint8 [out in / 2, 1] has two codes in a byte, the first in the high half. A table of 16
values, `quant_map`, and one float32 number per block of inputs, `absmax`, make the weight. With
double quantization, `absmax` are codes of a table of 256 values in float32, `nested_quant_map`, and
have a factor for each block of them, `nested_absmax`. `quant_state` is JSON in bytes.

The source is `QuantState` in `functional.py` of bitsandbytes.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from transom.base.errors import expect, explained
from transom.checkpoints.files.lazy_tensors import LazyTensors
from transom.checkpoints.quantized.codes import Codes, Rows
from transom.quantize.formats import FP4, NF4, WeightFormat, pack, unpack, wide_scales

STATE = "quant_state.bitsandbytes__"
_TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4)}


def open_bitsandbytes(where: str, stored: LazyTensors) -> Codes:
    """Return the weight of one module. Its scales are checked when it is read.

    Scales in 8 bits become float32, as no format has this table.

    Args:
        where: The module, for messages.
        stored: Its tensors by the last part of their names, or from `quant_state` on.

    Raises:
        RequestError: A tensor is missing, or of another size than the state says.
    """
    name = next((key for key in stored if key.startswith(STATE)), "quant_state")
    needed = ("weight", "absmax", "quant_map", name)
    missing = ", ".join(key for key in needed if key not in stored)
    expect(not missing, where, sorted(stored), f"{missing}, too")
    malformed = ValueError, KeyError, TypeError, ZeroDivisionError
    with explained(f"{where}.weight.{name}: not the state of a weight", *malformed):
        state: dict[str, Any] = json.loads(bytes(stored[name].read().tolist()))
        outputs, inputs = shape = tuple(map(int, state["shape"]))
        block, total = int(state["blocksize"]), outputs * inputs
        sizes = {"weight": total, "absmax": -(-total // block), "quant_map": 16}
        nested = "nested_offset" in state
        if nested:
            blocks = -(-sizes["absmax"] // int(state["nested_blocksize"]))
            sizes |= {"nested_absmax": blocks, "nested_quant_map": 256}
    for key, size in sizes.items():
        lazy = stored.get(key)
        found = math.prod(lazy.shape) if lazy else 0
        found *= 2 * lazy.dtype.itemsize if lazy and key == "weight" else 1
        expected = f"{size} for a weight of shape {shape}"
        expect(found == size, f"{where}: numbers of {key}", found, expected)
    # A block may reach into the next row. A divisor of its size and of a row does not.
    group = math.gcd(block, inputs)

    def read() -> Rows:
        absmax = stored["absmax"].read()
        if nested:
            table, factors = (stored[f"nested_{n}"].read() for n in ("quant_map", "absmax"))
            of_each = factors.repeat_interleave(state["nested_blocksize"])[: len(absmax)]
            absmax = table[absmax.int()] * of_each + state["nested_offset"]
        bad = absmax[~(absmax >= 0) | absmax.isinf()].tolist()
        expect(not bad, f"{where}.weight.absmax", (bad or [0])[0], "finite, positive numbers")
        scales = absmax.float().repeat_interleave(block // group)[: total // group]
        codes = stored["weight"].read().contiguous().view(torch.uint8)
        return {"codes": codes.view(outputs, -1), "scales": scales.view(outputs, -1)}

    levels = tuple(stored["quant_map"].read().float().tolist())
    return Codes(WeightFormat(levels, group), shape, read)


def to_bitsandbytes(parts: Rows, format: WeightFormat, dtype: torch.dtype) -> Rows:
    """Return the tensors of bitsandbytes for the parts of a weight [out, in], of a `dtype`.

    The format is one of which `kind_of` knows the table.
    """
    kind = kind_of(format)
    table, levels = _TABLES[kind], torch.tensor(format.levels)
    codes, scales = parts["codes"], wide_scales(parts, "scales", format, slice(None))
    if not torch.equal(levels, table):
        places = (table == levels.unsqueeze(1)).byte().argmax(1).byte()
        codes = codes if codes.is_meta else pack(places[unpack(codes).int()])
    shape = [len(codes), 2 * codes.size(1)]
    name = str(dtype).removeprefix("torch.")
    state = {"quant_type": kind, "blocksize": shape[1] // scales.size(1), "dtype": name}
    text = json.dumps({**state, "shape": shape}).encode()
    text += b" " * (-len(text) % 64)  # so that the tensors after it stay aligned
    return {
        "weight": codes.reshape(-1, 1),
        "weight.absmax": scales.flatten(),
        "weight.quant_map": table,
        f"weight.{STATE}{kind}": torch.tensor(list(text), dtype=torch.uint8),
    }


def kind_of(format: WeightFormat) -> str:
    """Return `nf4` or `fp4` if bitsandbytes has the values of the codes, or ""."""
    found = torch.tensor(format.levels or ()).sort().values
    same = (kind for kind, table in _TABLES.items() if torch.equal(table.sort().values, found))
    return "" if format.offset != "none" or format.ordered else next(same, "")
