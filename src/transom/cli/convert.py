"""`transom convert`: a model folder or hub id of any format, written as another one; an adapter
merged.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from transom.base.locks import output_folder
from transom.cli.main import emit_json, user_path

FORMATS = ("hf", "native", "meta", "mistral")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    what = "a model or adapter folder, a run folder for its best step, or a hub id"
    parser.add_argument("source", type=user_path, metavar="SRC", help=what)
    parser.add_argument(
        "out", type=user_path, metavar="OUT", help="the folder to write, new or empty"
    )
    parser.add_argument(
        "--format", choices=FORMATS, default="hf",
        help="hf (Hugging Face, default), native (Transom's own), or params.json folders of meta "
"and mistral",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: the files' own)"
    )
    parser.add_argument(
        "--max-shard-size", metavar="SIZE", help="cut hf and native weights here (default: 5GB)"
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document as the last line"
    )


def run(options: argparse.Namespace) -> int:
    """Write the folder; say what was read and written."""
    out = Path(options.out)
    with output_folder(out, options.overwrite):
        from transom.checkpoints.convert import convert

        done = convert(
            options.source,
            out,
            options.format,
            options.dtype,
            options.max_shard_size,
            options.revision,
        )
    print(
        f"{done.source} ({done.source_format}) -> {out} ({done.format}): {done.parameters:,} "
        f"parameters, "
        f"{done.bytes:,} bytes of weights; {', '.join(done.companions) or 'no tokenizer'} with "
        f"them",
        file=sys.stderr,
    )
    if options.json:
        emit_json(
            {
                "source": str(done.source),
                "source_format": done.source_format,
                "out": str(out),
                "format": done.format,
                "parameters": done.parameters,
                "bytes": done.bytes,
                "companions": list(done.companions),
            }
        )
    return 0
