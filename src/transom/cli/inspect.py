"""`transom inspect`: what a model is and costs, layer by layer; with `--trace`, what it does with a
text.

The plan is arithmetic on the arguments: no weights are read and torch is not imported. Two models
or runs are compared instead (`cli/compare.py`).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, nearest, notice, require
from transom.checkpoints.adapters.peft_config import summary
from transom.checkpoints.files.folders import (
    CONFIG,
    PARAMS,
    Found,
    find_model,
    lacks_vocabulary,
    read_args,
)
from transom.checkpoints.files.hub import is_hub_id
from transom.cli.glossary import legend
from transom.cli.main import emit_json, user_path
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS, preset
from transom.planning.layer_plan import ModelPlan, groups, index_words, plan

if (
    TYPE_CHECKING
):  # rich costs more time than the arithmetic, torch far more: both are imported where used
    from rich.console import Console, RenderableType
    from rich.table import Table

    from transom.evaluation.trace import LayerTrace
    from transom.tokenizers.tokenizer import Tokenizer

PIPE_WIDTH = 400  # characters; nobody reads a pipe at 80 columns, and cut cells help no one


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    what = "model, adapter or run folder, hub id, config.json, params.json, or preset"
    parser.add_argument("model", type=user_path, help=f"{what}: {', '.join(PRESETS)}")
    parser.add_argument(
        "other",
        nargs="?",
        type=user_path,
        help="a second model or run: what differs between the two is shown",
    )
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    parser.add_argument(
        "--length", type=int, help="sequence length to count for, tokens; default max_seq_len"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON document with exact numbers instead"
    )
    parser.add_argument(
        "--trace", metavar="TEXT", help="run the model on TEXT and show what every layer does"
    )
    parser.add_argument("--device", help="where --trace runs: cpu (default), cuda, mps or auto")
    parser.add_argument("--dtype", help="dtype of the weights in --trace; default the files' own")


def run(options: argparse.Namespace) -> int:
    """Print the plan, or the trace of a text."""
    if options.other is not None:
        from transom.cli.compare import run_compare

        return run_compare(options)
    subject = find(options.model, options.revision, settings_only=options.trace is None)
    if options.trace is not None:
        require(
            options.length is None,
            "--length",
            options.length,
            "valid only without --trace, TEXT has its own",
        )
        return run_trace(subject, options)
    for flag in ("device", "dtype"):
        value = getattr(options, flag)
        require(value is None, f"--{flag}", value, "valid only with --trace; the plan runs nothing")
    planned = plan(subject.args, options.length)
    if options.json:
        more = {} if subject.adapter is None else {"adapter": subject.adapter}
        emit_json(
            {"model": subject.name, "args": subject.args.to_dict(), **asdict(planned), **more}
        )
        return 0
    if planned.length > planned.max_seq_len:
        notice(
            f"--length {planned.length}: longer than the {planned.max_seq_len} tokens this model "
            f"is meant for"
        )
    print_plan(subject, planned)
    return 0


# -- which model
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """What is inspected: its name as printed, its arguments, its folders unless it is a preset, and
    its adapter.
    """

    name: str
    args: ModelArgs
    found: Found | None
    adapter: dict[str, Any] | None = None

    @property
    def folder(self) -> Path | None:
        """The folder that stands for it: of a model with an adapter the adapter's."""
        return None if self.found is None else self.found.folders[0]


def find(name: str, revision: str | None = None, *, settings_only: bool = False) -> Subject:
    """A model, adapter or run folder, a config.json or params.json, or else a preset, or else a hub
    id.

    `settings_only` fetches no weights of a hub id where its config says it all.
    """
    path = Path(name)
    if path.is_file():
        fits = path.name in (CONFIG, PARAMS)
        require(
            fits,
            "file",
            name,
            "expected a config.json, a params.json, a folder, a hub id or a preset",
        )
        require(revision is None, "--revision", revision, "valid only with a hub id")
        return Subject(name, read_args(path.parent), Found(path.parent))
    if not path.exists() and name in PRESETS:
        require(revision is None, "--revision", revision, "valid only with a hub id")
        return Subject(f"preset {name}", preset(name), None)
    if not path.exists() and not is_hub_id(name):
        hint = nearest(name, PRESETS)
        raise RequestError(
            f"{name!r}: no such folder, file or preset; presets are {', '.join(PRESETS)}{hint}"
        )
    found = find_model(path, revision, settings_only=settings_only)
    if settings_only and lacks_vocabulary(found.model):
        found = find_model(path, revision)
    adapter = None if found.adapter is None else summary(found.adapter)
    return Subject(str(found), read_args(found.model), found, adapter)


# -- the plan
# ---------------------------------------------------------------------------------------------


def print_plan(subject: Subject, planned: ModelPlan) -> None:
    """Table of layers, totals, and one line for every word a newcomer may not know."""
    heading(
        f"{subject.name}: {amount(planned.parameters)} parameters in {len(planned.layers)} layers"
    )
    if subject.adapter is not None:
        facts = subject.adapter
        words = (
            f"{facts['kind']} of rank {facts['rank']}, alpha {facts['alpha']:g}, on "
            f"{', '.join(facts['targets'])}"
        )
        print(f"adapter: {words}; all numbers are those of the model without it")
    show(layer_table(planned))
    heading("Totals")
    show(pairs(total_lines(planned)))
    heading("How to read it")
    show(pairs(legend(planned)))


def layer_table(planned: ModelPlan) -> Table:
    """One row for all layers that are equal; its numbers are those of one layer."""
    rows = []
    for group in groups(planned.layers):
        layer = group.layer
        rows.append(
            (
                index_words(group.indices),
                layer.attention,
                layer.positions,
                layer.heads,
                "yes" if layer.qk_norm else "no",
                layer.feed_forward,
                amount(layer.parameters),
                byte_words(layer.kv_bytes_per_token["bfloat16"]) if planned.cacheable else "-",
                flop_words(layer.flops_per_token),
            )
        )
    words = ("layer", "attention", "positions", "heads", "QK-norm", "feed-forward")
    numbers = ("parameters", "KV bytes/token", "FLOPs/token")
    wide = table(words, numbers, rows)
    if fits(wide):
        return wide
    turned = list(
        zip((*words, *numbers), *rows, strict=True)
    )  # few kinds of layers, so columns are few too
    return table(turned[0], (), turned[1:])


def total_lines(planned: ModelPlan) -> list[tuple[str, str]]:
    """(name, value) of every total."""
    in_layers = sum(layer.parameters for layer in planned.layers)
    output = "output shares them" if planned.tied else f"{amount(planned.output_parameters)} output"
    vision = f" + {amount(planned.vision_parameters)} vision" if planned.vision_parameters else ""
    lines = [
        (
            "parameters",
            f"{amount(planned.parameters)} = {amount(in_layers)} layers + "
            f"{amount(planned.embedding_parameters)} "
            f"token embeddings + {output} + {amount(planned.final_norm_parameters)} final "
            f"norm{vision}",
        )
    ]
    if planned.active_parameters != planned.parameters:
        share = planned.active_parameters / planned.parameters
        lines.append(
            (
                "active",
                f"{amount(planned.active_parameters)} parameters work on one token ({share:.1%})",
            )
        )
    of = f"one sequence of {planned.length:,} tokens"
    cache = [("KV cache", "none: a layer sees later tokens, so nothing can be cached")]
    if planned.cacheable:
        cache = [
            ("KV bytes/token", both_dtypes(planned.kv_bytes_per_token)),
            ("KV cache", f"{both_dtypes(planned.kv_bytes)}, for {of}"),
        ]
    forward, training = planned.flops_per_token, planned.training_flops_per_token
    vocabulary = (
        "tied: output = embeddings"
        if planned.tied
        else "not tied: embeddings and output are two tables"
    )
    return [
        *lines,
        ("weights", both_dtypes(planned.weight_bytes)),
        *cache,
        (
            "FLOPs/token",
            f"{flop_words(forward)} forward ({flop_words(planned.output_flops_per_token)} of it "
            f"the output), {flop_words(training)} training, mean over {of}",
        ),
        ("vocabulary", f"{planned.vocab_size:,} tokens, {vocabulary}"),
        ("longest sequence", f"{planned.max_seq_len:,} tokens"),
    ]


# -- the trace
# --------------------------------------------------------------------------------------------


def run_trace(subject: Subject, options: argparse.Namespace) -> int:
    """Load the model, run one forward on the text, print what every layer did."""
    if subject.found is None:
        raise RequestError(
            f"--trace: {subject.name} has no weights; expected a model or run folder"
        )
    import torch

    from transom.checkpoints.load import load, open_tokenizer
    from transom.evaluation.trace import trace

    tokenizer = open_tokenizer(subject.found)
    ids = tokenizer.encode_prompt(options.trace)
    limit = subject.args.max_seq_len
    require(
        0 < len(ids) <= limit,
        "--trace",
        f"a text of {len(ids)} tokens",
        f"expected 1 to {limit} tokens",
    )
    model = load(subject.found, device=options.device or "cpu", dtype=options.dtype)
    layers = trace(model, torch.tensor([ids], device=model.tok_embeddings.weight.device))
    if options.json:
        emit_json(trace_document(subject.name, ids, tokenizer, layers))
    else:
        print_trace(subject.name, ids, tokenizer, layers)
    return 0


def print_trace(
    name: str, ids: Sequence[int], tokenizer: Tokenizer, layers: Sequence[LayerTrace]
) -> None:
    """What the residual stream becomes from block to block, then where every head looks."""
    last = shown(tokenizer, ids[-1])
    heading(f"{name}: {len(ids)} tokens, the last is {last} at position {len(ids) - 1}")
    experts = any(layer.experts for layer in layers)
    rows = []
    for index, layer in enumerate(layers):
        guesses = [
            f"{shown(tokenizer, id)} {probability:.1%}" for id, probability in layer.predictions
        ]
        sizes = [
            f"{x:.4g}" for x in (layer.attention_rms, layer.feed_forward_rms, layer.residual_rms)
        ]
        chosen = ", ".join(f"{id} ({weight:.3f})" for id, weight in layer.experts) or "-"
        rows.append((str(index), ", ".join(guesses), *([chosen] if experts else []), *sizes))
    words = (
        "layer",
        "next token, if the model ended here",
        *(["experts (weight)"] if experts else []),
    )
    show(table(words, ("attention RMS", "feed-forward RMS", "residual RMS"), rows))
    heads = [
        (
            str(index),
            str(head),
            f"{entropy:.3f}",
            shown(tokenizer, ids[position]),
            str(position),
            f"{weight:.3f}",
        )
        for index, layer in enumerate(layers)
        for head, (entropy, (position, weight)) in enumerate(
            zip(layer.entropy_N.tolist(), layer.strongest, strict=True)
        )
    ]
    heading("Attention heads")
    show(table((), ("layer", "head", "entropy", "strongest key", "position", "weight"), heads))
    heading("How to read it")
    show(pairs(TRACE_LEGEND))


TRACE_LEGEND = [
    (
        "next token",
        "final norm and output applied to the last token's residual stream; the last row is the "
        "answer",
    ),
    (
        "RMS",
        "size (root mean square over features, averaged over tokens) of what attention and "
        "feed-forward add",
    ),
    ("", "and of the residual stream behind the block"),
    (
        "entropy",
        "in nats: 0 is attention to one key, ln n is n keys alike; averaged over the tokens",
    ),
    (
        "strongest key",
        "the token that the last token looks at most, and its share of the attention",
    ),
]


def trace_document(
    name: str, ids: Sequence[int], tokenizer: Tokenizer, layers: Sequence[LayerTrace]
) -> dict[str, Any]:
    """The trace as plain data, unrounded."""

    def text(id: int) -> dict[str, Any]:
        return {"id": id, "text": token_text(tokenizer, id)}

    return {
        "model": name,
        "tokens": [text(id) for id in ids],
        "layers": [
            {
                "index": index,
                "residual_rms": layer.residual_rms,
                "attention_rms": layer.attention_rms,
                "feed_forward_rms": layer.feed_forward_rms,
                "heads": [
                    {"entropy_nats": entropy, "strongest_position": position, "weight": weight}
                    for entropy, (position, weight) in zip(
                        layer.entropy_N.tolist(), layer.strongest, strict=True
                    )
                ],
                "experts": [{"id": id, "weight": weight} for id, weight in layer.experts],
                "predictions": [
                    {**text(id), "probability": share} for id, share in layer.predictions
                ],
            }
            for index, layer in enumerate(layers)
        ],
    }


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """What a token stands for; `<token 217>` where that is part of a character or no text at
    all.
    """
    known = (
        tokenizer.id_to_token(id) is not None
    )  # the model's table may be longer than the vocabulary
    text = tokenizer.decode([id], skip_special=False) if known else ""
    return text if text and "\ufffd" not in text else f"<token {id}>"


def shown(tokenizer: Tokenizer, id: int) -> str:
    """A token in quotes, with spaces and line ends visible, in what standard output can write."""
    encoding = sys.stdout.encoding or "utf-8"
    return repr(token_text(tokenizer, id)).encode(encoding, "backslashreplace").decode(encoding)


# -- words and tables
# -------------------------------------------------------------------------------------


def heading(text: str) -> None:
    """A line of its own after an empty one."""
    from rich.text import Text

    show(Text(f"\n{text}", style="bold"))


def show(part: RenderableType) -> None:
    """Print without the spaces that fill a table up to a rectangle."""
    out = console()
    with out.capture() as captured:
        out.print(part)
    for line in captured.get().splitlines():
        print(line.rstrip())


def console() -> Console:
    """A terminal at its own width; a pipe wide enough for every row, and without colour."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)


def fits(part: Table) -> bool:
    """Whether no cell would have to be wrapped."""
    from rich.measure import Measurement

    out = console()
    natural = Measurement.get(out, out.options.update(width=PIPE_WIDTH), part).maximum
    return natural <= out.width


def table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Columns of words, left, then columns of numbers, right."""
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for word in words:
        out.add_column(word)
    for number in numbers:
        out.add_column(number, justify="right")
    for row in rows:
        out.add_row(*row)
    return out


def pairs(lines: Iterable[tuple[str, str]]) -> Table:
    """Two columns without a frame: a word and what it says."""
    from rich.table import Table

    out = Table.grid(padding=(0, 2))
    for line in lines:
        out.add_row(*line)
    return out


def scaled(value: float, steps: Sequence[str], base: float) -> str:
    """`value` in the largest of `steps` that leaves 1 or more before the point, four digits."""
    step = 0
    while float(f"{value:.4g}") >= base and step < len(steps) - 1:
        value, step = value / base, step + 1
    return f"{value:.4g}{steps[step]}"


def amount(value: int) -> str:
    """A count: `8.03 B` is 8,030,000,000; exact below ten thousand."""
    if value < 10_000:
        return f"{value:,}"
    return scaled(value, ("", " K", " M", " B", " T"), 1000.0)


def byte_words(count: int) -> str:
    """Bytes in powers of 1024."""
    return scaled(count, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"), 1024.0)


def flop_words(count: float) -> str:
    """Floating point operations in powers of 1000."""
    return scaled(count, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"), 1000.0)


def both_dtypes(sizes: dict[str, int]) -> str:
    """`14.96 GiB in bfloat16, 29.92 GiB in float32`."""
    return ", ".join(f"{byte_words(size)} in {dtype}" for dtype, size in sizes.items())
