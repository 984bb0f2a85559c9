"""`transom merge`: merge adapters into the weights of their base, and report what that loses."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, expect, explained
from transom.base.locks import output_folder
from transom.checkpoints.files.hub import is_hub_id
from transom.checkpoints.files.layout import ADAPTER_CONFIG
from transom.cli.convert import FORMATS
from transom.cli.main import user_path
from transom.cli.options import DTYPES, add_fields, option, read_fields, require_unset
from transom.lora.args import CombineArgs
from transom.planning.tables import heading, show, table

USAGE = "ADAPTER [OUT], or BASE ADAPTER... OUT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    folders = (
        "ADAPTER, or ADAPTER OUT, or BASE ADAPTER ... OUT. ADAPTER is an adapter folder, its run, "
        "or a hub id. BASE is by default the base that the adapter names, OUT is ADAPTER-merged"
    )
    data = (
        "text to measure on: a file, folder or glob (default: the held-out examples of the run, "
        "or else Python's language reference)"
    )
    option(parser, "FOLDER", folders, user_path, dest="folders", nargs="+")
    add_fields(parser, CombineArgs, ("method", "density", "seed"))
    option(parser, "--weights X,X", "a factor for each adapter (default: 1)", dest="factors")
    option(parser, "--data FILE", data, user_path)
    option(parser, "--tokens N", "number of tokens to measure on (default: 4096)", int)
    parser.add_argument("--format", choices=FORMATS, help="format of OUT (default: the base's)")
    option(parser, "--dtype DTYPE", f"{DTYPES} (default: that of the base's files)")
    device = "device to merge and measure on, in float32 (default: cpu)"
    option(parser, "--device DEVICE", device, default="cpu")
    option(parser, "--overwrite", "replace the model in OUT")
    option(parser, "--json", "print the report as the last line")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Merge, print the measurements, and name the next commands."""
    base, adapters, out = roles(options.folders)
    args, tokens = combine_args(options, len(adapters)), options.tokens
    expect(tokens is None or tokens >= 2, "--tokens", tokens, "2 or more")
    with output_folder(out, options.overwrite):
        from transom.evaluation.merging import TOKENS, merge_folders

        report = merge_folders(
            base,
            adapters,
            out,
            args=args,
            format=options.format,
            dtype=options.dtype,
            data=options.data,
            tokens=TOKENS if tokens is None else tokens,
            device=options.device,
        )
    print_report(report, out)
    return {"merged": str(out), **report}


def roles(folders: list[str]) -> tuple[str | None, list[str], Path]:
    """Return the base, the adapters and OUT; without a base it is the one that adapters name.

    Raises:
        RequestError: OUT is an adapter, or no folder has a name.
    """
    if len(folders) == 1:
        adapter = Path(folders[0])
        expect(bool(adapter.name), "FOLDER", folders[0], USAGE)
        from_hub = is_hub_id(folders[0]) and not adapter.exists()
        return None, folders, Path(f"{adapter.name if from_hub else adapter}-merged")
    *rest, out = folders
    base, adapters = (rest[0], rest[1:]) if len(rest) > 1 else (None, rest)
    if (Path(out) / ADAPTER_CONFIG).exists():
        raise RequestError(
            f"OUT: got {out!r}, an adapter, which is never overwritten; expected {USAGE}"
        )
    return base, adapters, Path(out)


def combine_args(options: argparse.Namespace, count: int) -> CombineArgs:
    """Return how `count` adapters are combined.

    Raises:
        RequestError: A flag is wrong, or the method does not read it.
    """
    drops = options.method == "dare"
    require_unset(options, drops, "with --method dare", "seed")
    require_unset(
        options, drops or options.method == "ties", "with --method ties or dare", "density"
    )
    words = options.factors.split(",") if options.factors is not None else ()
    wrong = f"--weights: got {options.factors!r}; expected numbers as 0.7,0.3"
    with explained(wrong, ValueError):
        args = replace(read_fields(options, CombineArgs), weights=tuple(map(float, words)))
    args.weights_of(count)
    return args


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """Print what was merged, and how far each candidate is from the unmerged model."""
    adapters = ", ".join(one["folder"] for one in report["adapters"])
    heading(f"merge: {adapters} into {report['base']['folder']}")
    measured = [*report["controls"].items()]
    measured += [(one["name"], one) for one in report["candidates"] if "kl" in one]
    rows = []
    for name, one in measured:
        agreement, gap = f"{one['top1_agreement']:.2%}", f"{one['largest_logit_difference']:.2g}"
        loss = "-" if one["nats"] is None else f"{one['nats']:.4f}"
        rows.append((name, f"{one['kl']:.2g}", agreement, gap, loss))
    if rows:
        against = f"compared with {report['reference']}, {report['data']['tokens']:,} tokens"
        columns = ("KL, nats per token", "top-1 agreement", "largest logit difference")
        show(table((against,), (*columns, "loss, nats"), rows))
    print(f"kept: {report['kept']}; {report['why']}")
    form, folder = f"{report['out']['format']}, {report['out']['dtype']}", shlex.quote(str(out))
    print(f"{out}: {form}, with merge_report.json", file=sys.stderr)
    print(f"next: transom verify merge {folder}; transom chat {folder}", file=sys.stderr)
