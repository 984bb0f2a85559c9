"""Quantize a model folder, and measure what that costs: a receipt beside the weights.

The receipt compares the written folder, loaded back, with the original on text that the calibration
has not read.
"""

from __future__ import annotations

import contextlib
import io
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch

from transom.base.errors import expect, located, notice
from transom.base.files import json_text, shown_name, write_text
from transom.base.runtime import DTYPES, dtype_name, machine
from transom.base.version import __version__
from transom.checkpoints.files.companions import carry_companions
from transom.checkpoints.files.lazy_tensors import main_dtype
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.files.staging import staged
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.load import load
from transom.checkpoints.open_model import open_text
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import check_out, save
from transom.checkpoints.state import open_parameters
from transom.data.chat.instructions import NAME as STDLIB
from transom.evaluation.agreement import batches_of
from transom.evaluation.intervals import CONFIDENCE, difference, figure
from transom.evaluation.quality import ORIGINAL, measure_quality, text_bytes, unseen
from transom.evaluation.token_rows import LENGTH, TokenRows, token_rows
from transom.inference.speed import Range, measure_speed
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.lora.merge import fold_adapters
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import quantize
from transom.quantize.leaves import parameter_count, quantized_leaves, replace_weight
from transom.quantize.methods import mean_bits, quantize_model
from transom.tokenizers.tokenizer import Tokenizer

RECEIPT = "quantization_receipt.json"
ROWS, HELD_OUT = 64, 16_384  # rows of calibration text, 512 tokens each; tokens to measure on
QUANTIZED, NEAREST = "quantized", "round-to-nearest"
PROMPT, NEW, ROUNDS = 64, 32, 3  # of decoding


def quantize_folder(
    model: str | Path,
    out: str | Path,
    args: QuantizeArgs | None = None,
    *,
    calibration: str = STDLIB,
    calibration_rows: int = ROWS,
    held_out: str | None = None,
    held_out_tokens: int = HELD_OUT,
    format: Literal["hf", "native"] = "hf",
    dtype: str | None = None,
    device: str = "auto",
    revision: str | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Write a model with its weights in codes, and `quantization_receipt.json` beside them.

    The model is computed in float32. An adapter is merged into its base before.

    Args:
        model: A model, adapter or run folder, a GGUF file, a hub id, or `smollm2`.
        out: The folder to write, completely or not at all.
        args: The format and the method.
        calibration: The text that a method reads, as `token_rows` takes it.
        calibration_rows: Rows of 512 tokens to calibrate with.
        held_out: The text to measure on, as `token_rows` takes it. Rows that the calibration has
            read are left out. None is Python's language reference.
        held_out_tokens: Tokens to measure on; with 0, nothing is measured.
        format: The format of `out`.
        dtype: The dtype of the weights that stay dense, and of scales if `args` does not name it;
            None keeps that of the files if it has 16 bits, and is float16 otherwise.
        device: Where to quantize and to measure.
        revision: Branch, tag or commit of a hub id.
        progress: Show on standard error how far the work is.

    Returns:
        The content of the receipt.

    Raises:
        RequestError: The model is quantized or doesn't fit the format, or a text is missing or too
            short.
        WorkError: The model computes NaN or infinite numbers, or writing fails.
    """
    started, args = time.perf_counter(), args or QuantizeArgs()
    expect(calibration_rows >= 1, "calibration_rows", calibration_rows, "1 or more")
    expect(format in ("hf", "native"), "format", format, "hf or native")
    expect(dtype is None or dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    location = find_model(model, revision)
    check_out(out, location, read_args(location.model), format)
    made = _dense(location, device, "float32")
    read, held = None, None
    if args.calibrated:
        most = calibration_rows * LENGTH
        with located("calibration"):
            read = token_rows(location, made.args, calibration, tokens=most, joined=True)
    if held_out_tokens:
        tokenizer = open_text(location).tokenizer  # without one there is nothing to measure on
        with located("held_out"):
            found = token_rows(location, made.args, held_out, tokens=held_out_tokens, joined=True)
        held = unseen(found, read.rows if read else ())
    kind = DTYPES[dtype] if dtype else _narrow_dtype(location)
    batches = list(batches_of(read.rows)) if read else None
    scales = dtype_name(kind) if args.scales == "weight" else args.scales
    asked = {**asdict(args), "scales": scales}
    quantize_model(made, QuantizeArgs.from_dict(asked), batches, tell=notice if progress else None)
    receipt = {
        "model": {"folder": shown_name(location.model), "fingerprint": fingerprint(location.model)},
        "quantize": {**asked, "bits_per_weight": mean_bits(made)},
        "calibration": read.facts() if read else None,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {"transom": __version__, **machine()},
    }
    with staged(Path(out)) as folder:
        save(made.to(kind), folder, format)
        carry_companions(location, folder)
        if held:
            receipt |= measure(location, folder, made, held, tokenizer, progress=progress)
        write_text(folder / RECEIPT, json_text(receipt, indent=2))
    return receipt


def _dense(location: ModelLocation, device: str, dtype: str | None = None) -> LLM:
    """Return a model whose adapter, if it has one, is merged."""
    model = load(location, device, dtype)
    return model if location.adapter is None else fold_adapters(model)


def _narrow_dtype(location: ModelLocation) -> torch.dtype:
    kind = main_dtype(open_parameters(location.model, read_args(location.model)))
    return kind if kind.itemsize == 2 else torch.float16


def measure(
    location: ModelLocation,
    folder: Path,
    made: LLM,
    held: TokenRows,
    tokenizer: Tokenizer,
    *,
    progress: bool = False,
) -> dict[str, Any]:
    """Return the measurements of a receipt: those of a quantized folder beside its original.

    Quality is measured in float32, also that of the weights rounded to the nearest codes of the
    same formats. Speed is measured in the dtypes in which the models open.

    Args:
        location: The original.
        folder: The quantized folder.
        made: The model that was written there.
        held: The rows to measure on.
        tokenizer: That of the original.
        progress: Show on standard error how far the work is.
    """
    device = str(made.device)
    nearest = nearest_codes(_dense(location, device, "float32"), made)
    models = {QUANTIZED: _written(folder, device, "float32"), NEAREST: nearest}
    original = _dense(location, device, "float32")
    scores = measure_quality(original, models, held.rows, tokenizer, progress=progress)
    del original, nearest, models
    bits = {name: own["bits_per_byte"] for name, own in scores.items()}
    out: dict[str, dict[str, Any]] = {}
    for name, own in scores.items():
        out[name] = {key: figure(one) for key, one in own.items()}
        out[name]["loss"] = difference(bits[ORIGINAL], bits[name])
    for name, facts in _speeds(location, folder, device).items():
        out[name] |= facts
    lost, of_nearest = (out[name]["loss"]["value"] for name in (QUANTIZED, NEAREST))
    size = sum(text_bytes(tokenizer, row) for row in held.rows)
    return {
        "models": out,
        "recovered": 1 - lost / of_nearest if of_nearest > 0 else None,
        "confidence": CONFIDENCE,
        "held_out": {**held.facts(), "bytes": size},
    }


def _written(folder: Path, device: str, dtype: str | None = None) -> LLM:
    """Return the model of a temporary folder, whose name is not for people."""
    with contextlib.redirect_stderr(io.StringIO()):
        return load(folder, device, dtype)


@torch.no_grad()
def nearest_codes(model: LLM, like: LLM) -> LLM:
    """Return a dense model with each weight in its nearest code of the formats of another."""
    for path, leaf in quantized_leaves(like).items():
        dense = model.get_submodule(path)
        assert isinstance(dense, Linear | GroupedLinear | Embedding), "as in the other model"
        format = replace(leaf.format, ordered=False)
        replace_weight(dense, quantize(dense.weight, format), format)
    return model


def _speeds(location: ModelLocation, folder: Path, device: str) -> dict[str, dict[str, Any]]:
    """Return the bytes and the speed of both models as they open, measured in turns."""
    models = {ORIGINAL: _dense(location, device), QUANTIZED: _written(folder, device)}
    most = max(2, models[QUANTIZED].args.max_seq_len // 2)
    rates: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            lengths, new = (min(PROMPT, most),), min(NEW, most)
            measured = measure_speed(model, prompt_lengths=lengths, new_tokens=new, repetitions=1)
            rates[name] += [speed.decode_tokens_per_second.median for speed in measured]
    sizes = {name: sum(one.nbytes for one in models[name].parameters()) for name in models}
    return {
        name: {
            "dtype": dtype_name(model.dtype),
            "bytes": sizes[name],
            "bits_per_weight": 8 * sizes[name] / parameter_count(model),
            "decode_tokens_per_second": asdict(Range.of(rates[name])),
        }
        for name, model in models.items()
    }
