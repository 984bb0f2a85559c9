"""`transom merge`: adapters into the weights of their base, measured against the model that is
merged.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transom.base.errors import RequestError, require
from transom.base.locks import output_folder
from transom.checkpoints.files.hub import is_hub_id
from transom.cli.convert import FORMATS
from transom.cli.main import emit_json, user_path
from transom.lora.args import METHODS, CombineArgs
from transom.planning.tables import heading, show, table

FORMS = "expected ADAPTER [OUT], or BASE ADAPTER... OUT"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the verb."""
    what = (
        "ADAPTER, or ADAPTER OUT, or BASE ADAPTER ... OUT: an adapter is its folder, a run that "
        "trained one, or a "
        "hub id, on the base that it names unless one is given; OUT is ADAPTER-merged unless given"
    )
    parser.add_argument("folders", nargs="+", type=user_path, metavar="FOLDER", help=what)
    parser.add_argument(
        "--method", choices=METHODS, default="linear",
        help="how several are combined: added up (default), ties (arXiv 2306.01708) or dare "
"(arXiv 2311.03099)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="X,X", help="a factor for each adapter (default: 1)")
    parser.add_argument(
        "--density", type=float, metavar="X", help="ties, dare: share that is kept (default: 0.5)"
    )
    parser.add_argument("--seed", type=int, metavar="N", help="dare: of the draws (default: 0)")
    parser.add_argument(
        "--data", type=user_path, metavar="FILE",
        help="text to measure on: a file, folder or glob (default: what the run held out, else "
"built-in texts)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="tokens of it to measure on (default: 4096)"
    )
    parser.add_argument("--format", choices=FORMATS, help="of OUT (default: that of the base)")
    parser.add_argument(
        "--dtype", help="float32, bfloat16, float16 or float64 (default: that of the base's files)"
    )
    parser.add_argument(
        "--device", default="cpu", help="where to merge and measure, in float32 (default: cpu)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the model that OUT holds")
    parser.add_argument("--json", action="store_true", help="print the report as the last line")


def run(options: argparse.Namespace) -> int:
    """Merge, print what was measured, and name the next commands."""
    base, adapters, out = roles(options.folders)
    args = combine_args(options, len(adapters))
    require(
        options.tokens is None or options.tokens >= 2,
        "--tokens",
        options.tokens,
        "expected 2 or more",
    )
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
            tokens=TOKENS if options.tokens is None else options.tokens,
            device=options.device,
        )
    print_report(report, out)
    if options.json:
        emit_json({"merged": str(out), **report})
    return 0


def roles(folders: list[str]) -> tuple[str | None, list[str], Path]:
    """Base (None: the one that the adapter names), adapters and OUT out of the folders in their
    order.
    """
    if len(folders) == 1:
        (adapter,) = folders
        require(bool(Path(adapter).name), "FOLDER", adapter, FORMS)
        here = is_hub_id(adapter) and not Path(adapter).exists()
        return None, folders, Path(f"{Path(adapter).name if here else Path(adapter)}-merged")
    *rest, out = folders
    base, adapters = (rest[0], rest[1:]) if len(rest) > 1 else (None, rest)
    if (Path(out) / "adapter_config.json").exists():
        raise RequestError(f"OUT: got {out!r}; an adapter, which is not written over; {FORMS}")
    return base, adapters, Path(out)


def combine_args(options: argparse.Namespace, count: int) -> CombineArgs:
    """How `count` adapters become one; flags that the method does not read are refused."""
    read = {"density": options.method != "linear", "seed": options.method == "dare"}
    for flag, fits in read.items():
        value = getattr(options, flag)
        expected = "ties and dare" if flag == "density" else "dare"
        require(value is None or fits, f"--{flag}", value, f"valid only with --method {expected}")
    try:
        weights = (
            tuple(map(float, options.weights.split(","))) if options.weights is not None else ()
        )
    except ValueError:
        raise RequestError(
            f"--weights: got {options.weights!r}; expected numbers as 0.7,0.3"
        ) from None
    given = {name: getattr(options, name) for name in read if getattr(options, name) is not None}
    args = CombineArgs(options.method, weights, **given)
    args.weights_of(count)
    return args


def print_report(report: Mapping[str, Any], out: Path) -> None:
    """What was merged into what, and how far every candidate is from the unmerged model."""
    adapters = ", ".join(one["folder"] for one in report["adapters"])
    heading(f"merge: {adapters} into {report['base']['folder']}")
    measured = [(name, one) for name, one in report["controls"].items()]
    measured += [(one["name"], one) for one in report["candidates"] if "kl" in one]
    rows = [
        (
            name,
            f"{one['kl']:.2g}",
            f"{one['top1_agreement']:.2%}",
            f"{one['largest_logit_difference']:.2g}",
            "-" if one["nats"] is None else f"{one['nats']:.4f}",
        )
        for name, one in measured
    ]
    if rows:
        columns = (
            "KL, nats per token",
            "top-1 agreement",
            "largest logit difference",
            "loss, nats",
        )
        show(
            table(
                (f"against {report['reference']}, {report['data']['tokens']:,} tokens",),
                columns,
                rows,
            )
        )
    print(f"kept: {report['kept']} ({report['why']})")
    written = report["out"]
    print(
        f"{out}: {written['format']}, {written['dtype']}, with merge_report.json", file=sys.stderr
    )
    folder = shlex.quote(str(out))
    print(f"next: transom verify merge {folder}; transom chat {folder}", file=sys.stderr)
