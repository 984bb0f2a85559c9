"""`transom quantize`: write a model in few bits per weight, and measure what that costs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transom.base.locks import output_folder
from transom.cli.main import user_path
from transom.cli.options import DEVICES, MODEL, add_fields, add_json, option, read_fields
from transom.planning.tables import byte_words, heading, show, table
from transom.quantize.args import QuantizeArgs

# Usage, type, default and help.
FLAGS: tuple[tuple[str, Callable[[str], Any], Any, str], ...] = (
    (
        "--calibration DATA",
        user_path,
        "stdlib-docs",
        "for gptq, awq and a budget: a text file, folder or glob, rows as for finetune, or a name "
        "of `datasets`",
    ),
    ("--calibration-rows N", int, 64, "rows of 512 tokens of it"),
    (
        "--held-out DATA",
        user_path,
        None,
        "what to measure on, as --calibration (default: Python's language reference)",
    ),
    ("--held-out-tokens N", int, 16_384, "tokens of it; 0: do not measure"),
    ("--format NAME", str, "hf", "format of OUT: hf (Hugging Face) or native (Transom)"),
    (
        "--dtype NAME",
        str,
        None,
        "dtype of scales and of weights that stay dense (default: that of the files if it has 16 "
        "bits, else float16)",
    ),
    ("--device NAME", str, "auto", DEVICES),
    ("--revision NAME", str, None, "branch, tag or commit of a hub id"),
)
SCORES = {"bits_per_byte": ".4f", "kl": ".4f", "top1_agreement": ".1%"}
COLUMNS = ("bits per byte", "KL, nats per token", "same first choice", "size", "bits per weight")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    option(parser, "MODEL", MODEL, user_path)
    option(parser, "OUT", "a new or empty folder to write", user_path)
    add_fields(parser, QuantizeArgs, kind="int4", method="gptq")
    for usage, kind, default, what in FLAGS:
        shown = "" if default is None else f" (default: {default})"
        option(parser, usage, what + shown, kind, default=default)
    option(parser, "--overwrite", "replace the model in OUT")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Quantize, and print the receipt."""
    args, out = read_fields(options, QuantizeArgs), Path(options.out)
    names = [usage.split()[0].removeprefix("--").replace("-", "_") for usage, *_ in FLAGS]
    given = {name: getattr(options, name) for name in names}
    with output_folder(out, options.overwrite):
        from transom.evaluation.quantizing import quantize_folder

        receipt = quantize_folder(options.model, out, args, **given, progress=True)
    if "models" in receipt:
        print_receipt(receipt)
    folder = shlex.quote(str(out))
    print(f"{out}: a model in codes, with quantization_receipt.json", file=sys.stderr)
    print(f"next: transom chat {folder}; transom verify quantize {folder}", file=sys.stderr)
    return {"quantized": str(out), **receipt}


def print_receipt(receipt: Mapping[str, Any]) -> None:
    """Print one row for each model, and the text that they were measured on."""
    args, held, rows = receipt["quantize"], receipt["held_out"], []
    what = f"{args['method']} to {args['kind']}, {args['bits_per_weight']:.2f} bits per weight"
    heading(f"quantize: {receipt['model']['folder']}, {what} in codes")
    for name, one in receipt["models"].items():
        scores = [_cell(one.get(key), form) for key, form in SCORES.items()]
        speed = one.get("decode_tokens_per_second")
        if speed is None:
            rows.append((name, *scores, "as before", "", "-"))
            continue
        size = byte_words(one["bytes"]), f"{one['bits_per_weight']:.2f}"
        rows.append((name, *scores, *size, f"{speed['median']:.1f}"))
    show(table(("model",), (*COLUMNS, "decode tokens/s"), rows))
    if receipt["recovered"] is not None and args["method"] != "rtn":
        print(f"recovered of the loss of round-to-nearest: {receipt['recovered']:.0%}")
    text = f"{held['bytes']:,} bytes in {held['rows']:,} rows, {held['tokens']:,} tokens"
    print(f"measured on {held['source']}: {text}; intervals of {receipt['confidence']:.0%}")


def _cell(figure: Mapping[str, float | None] | None, form: str) -> str:
    """Return a value and its interval; `-` for none."""
    if figure is None:
        return "-"
    value, low, high = (figure[key] for key in ("value", "low", "high"))
    return f"{value:{form}}" if low is None else f"{value:{form}} [{low:{form}}, {high:{form}}]"
