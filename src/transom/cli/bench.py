"""`transom bench`: measure the speed of prefill and decoding, and its share of the machine's."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from transom.base.errors import expect
from transom.checkpoints.describe_model import describe_model
from transom.cli.main import emit_json, user_path
from transom.cli.options import MODEL, add_fields, add_json, add_model, option, read_fields
from transom.inference.decode_args import DecodeArgs
from transom.planning.tables import byte_words, flop_words, show, table

if TYPE_CHECKING:
    from transom.inference.speed import Speed
    from transom.models.llm import LLM


TITLES = (
    "batch",
    "prompt",
    "prefill tokens/s",
    "of matmul peak",
    "first token",
    "decode tokens/s",
    "of bandwidth",
    "read per step",
    "peak memory",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    add_model(parser, f"{MODEL}; or a config.json or a preset, with random weights")
    what = "tokens of a prompt; all are measured (default: 512)"
    option(parser, "-p --prompt-length N", what, int, nargs="+", default=[512])
    what = "tokens to generate after a prompt (default: 128)"
    option(parser, "-n --new-tokens N", what, int, default=128)
    what = "prompts side by side; all are measured (default: 1)"
    option(parser, "-b --batch-size N", what, int, nargs="+", default=[1])
    what = "measurements of each, after one to warm up (default: 3)"
    option(parser, "-r --repetitions N", what, int, default=3)
    add_fields(parser, DecodeArgs)
    option(parser, "--picture FILE.svg|png", "draw the speeds, too", user_path)
    add_json(parser)


def run(options: argparse.Namespace) -> None:
    """Measure; print a table, and with --json one document."""
    picture, decode = options.picture and Path(options.picture), read_fields(options, DecodeArgs)
    if picture is not None:
        fits = picture.suffix in (".svg", ".png") and picture.parent.is_dir()
        expect(fits, "--picture", options.picture, ".svg or .png in a folder")
    described = describe_model(options.folder, options.revision)
    from transom.inference.speed import measure_speed, open_or_draw

    model = open_or_draw(described, options.device, options.dtype, options.keep_quantized)
    measured = measure_speed(
        model,
        batch_sizes=options.batch_size,
        prompt_lengths=options.prompt_length,
        new_tokens=options.new_tokens,
        repetitions=options.repetitions,
        decode=decode,
    )
    speeds = []
    for speed in measured:
        speeds.append(speed)
        print(" | ".join(cells(speed)), file=sys.stderr, flush=True)
    report(described.name, model, speeds, json=options.json)
    if picture is not None:
        from transom.inference.speed_picture import draw_speeds

        draw_speeds(speeds, picture, described.name)


def report(name: str, model: LLM, speeds: Sequence[Speed], *, json: bool) -> None:
    """Print one JSON document, or the table and the limits."""
    from transom.base.runtime import dtype_name, machine, matmul_peak, read_bandwidth

    dtype, kind = dtype_name(model.dtype), model.device.type
    bandwidth, peak = read_bandwidth(kind), matmul_peak(kind, model.dtype)
    if json:
        facts = {"read_bandwidth": bandwidth, "matmul_peak": peak, **machine()}
        facts |= {"model": name, "dtype": dtype, "device": str(model.device)}
        emit_json({**facts, "speeds": [asdict(speed) for speed in speeds]})
        return
    show(table((), TITLES, map(cells, speeds)))
    limits = f"{bandwidth / 1e9:,.1f} GB/s and {flop_words(peak)}/s, measured now"
    print(f"{name} in {dtype} on {model.device}: {limits}")


def cells(speed: Speed) -> tuple[str, ...]:
    """Return a row of the table."""
    rates = (speed.prefill_tokens_per_second, speed.decode_tokens_per_second)
    prefill, decode = (f"{x.median:,.1f} ±{(x.high - x.low) / x.median / 2:.0%}" for x in rates)
    return (
        f"{speed.batch_size:,}",
        f"{speed.prompt_length:,}",
        prefill,
        f"{speed.matmul_fraction:.0%}",
        f"{speed.first_token_seconds.median * 1000:,.0f} ms",
        decode,
        f"{speed.bandwidth_fraction:.0%}",
        byte_words(round(speed.bytes_per_step)),
        byte_words(speed.peak_memory_bytes),
    )
