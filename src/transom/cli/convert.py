"""`transom convert`: write a model in another format; an adapter is merged into its base."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from transom.base.locks import output_folder
from transom.cli.main import user_path
from transom.cli.options import DTYPES, MODEL, add_json, add_revision, option

FORMATS = ("hf", "native", "meta", "mistral")  # of folders


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    formats = (
        "hf (Hugging Face), awq (hf with codes in the layout of AWQ), native (Transom), meta or "
        "mistral (params.json), gguf (llama.cpp), or exported (programs of torch.export); default: "
        "gguf if OUT ends in .gguf, else hf"
    )
    option(parser, "SRC", MODEL, user_path, dest="source")
    option(parser, "OUT", "a new or empty folder to write, or a .gguf file", user_path)
    parser.add_argument("--format", choices=(*FORMATS, "awq", "gguf", "exported"), help=formats)
    more = "in a GGUF file also q8_0, q4_0 or q4_1 (default: that of the files)"
    option(parser, "--dtype DTYPE", f"{DTYPES}; {more}")
    size = "largest weights file of hf and native, such as 500MB (default: 5GB)"
    option(parser, "--max-shard-size SIZE", size)
    add_revision(parser)
    kept = "in hf and native, keep weights in the codes of a quantized folder or a GGUF file"
    option(parser, "--keep-quantized", kept)
    what = "exported: tokens per row that fit into the cache (default: max_seq_len, at most 2048)"
    option(parser, "--context N", what, int)
    option(parser, "--batch B", "exported: rows of every call (default: 1)", int)
    option(parser, "--overwrite", "replace the model in OUT")
    add_json(parser)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Write the folder; print what was read and written."""
    out, names = Path(options.out), ("context", "batch", "keep_quantized")
    how = (options.dtype, options.max_shard_size, options.revision)
    more = {name: getattr(options, name) for name in names}
    is_file = out.suffix == ".gguf" or options.format == "gguf"
    with output_folder(out, options.overwrite, file=is_file):
        from transom.checkpoints.convert import convert

        done = convert(options.source, out, options.format, *how, **more)
    companions = ", ".join(done.companions) or "no tokenizer"
    print(
        f"{done.source} ({done.source_format}) -> {out} ({done.format}): {done.parameters:,} "
        f"parameters, {done.bytes:,} bytes of weights; copied: {companions}",
        file=sys.stderr,
    )
    words = {"source": str(done.source), "companions": list(done.companions), "out": str(out)}
    return vars(done) | words
