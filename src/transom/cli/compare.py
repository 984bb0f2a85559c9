"""`transom inspect A B`: the differences of two models, or of two runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import expect
from transom.base.files import read_json
from transom.checkpoints.files.location import find_model
from transom.cli.options import require_unset
from transom.config.model_args import ModelArgs
from transom.planning.tables import amount, counted, heading, pairs, show, table

if TYPE_CHECKING:
    from transom.evaluation.compare import ModelDifference

RUN = "run.json"
SHOWN = 10  # tensors that are printed; --json has all
ROTARY = {
    "turned": "; rows of B were permuted to that of A before the comparison",
    "kept": ", but rows of latent attention cannot be permuted and are compared as they are",
}


def run_compare(options: argparse.Namespace) -> dict[str, Any]:
    """Print what differs. The exit code is 0 whether or not something does."""
    require_unset(options, False, "with one model", "memory", "trace", "length")
    names, revision = (options.model, options.other), options.revision
    local = [Path(name).exists() for name in names]
    expect(revision is None or not all(local), "--revision", revision, "none without a hub id")
    if all((Path(name) / RUN).exists() for name in names):
        document = compare_runs(*map(Path, names))
    else:
        from transom.evaluation.compare import compare_models

        # The revision is that of each hub id.
        one, other = (
            find_model(name, None if here else revision)
            for name, here in zip(names, local, strict=True)
        )
        document = {"kind": "models", "a": str(one), "b": str(other)}
        document |= model_document(compare_models(one, other))
    if not options.json:
        show(pairs([("A", document["a"]), ("B", document["b"])]))
        (print_runs if document["kind"] == "runs" else print_models)(document)
    return document


# Fields.


def flat(data: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings and lists with their paths, such as
    `data.sources[0].name`.
    """
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, (list, tuple)) and data:
        for index, value in enumerate(data):
            yield from flat(value, f"{path}[{index}]")
    else:
        yield path, data


def differing(first: object, second: object) -> dict[str, tuple[Any, Any]]:
    """Return the values that differ, by path; a value that one side lacks is None."""
    one, other = dict(flat(first)), dict(flat(second))
    both = {path: (one.get(path), other.get(path)) for path in dict.fromkeys((*one, *other))}
    return {path: pair for path, pair in both.items() if pair[0] != pair[1]}


def print_fields(title: str, found: Mapping[str, Sequence[Any]]) -> None:
    """Print a table of both sides, or one line if nothing differs."""
    if not found:
        heading(f"{title}: the same")
        return
    heading(f"{title}: differences in {counted(len(found), 'value')}")
    rows = [(path, *map(_value_words, pair)) for path, pair in found.items()]
    show(table(("field", "A", "B"), (), rows))


def _value_words(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


# Runs.


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """Return the differences of two run.json (versions and machine, data, config, model), and
    the last scores of both.
    """
    facts = [read_json(first / RUN), read_json(second / RUN)]
    for one in facts:  # the config with the values that were chosen contains the given one
        one["config"] = one.pop("resolved", one.get("config"))
    parts = ("data", "config", "model")
    named = {part: differing(*(one.get(part) for one in facts)) for part in parts}
    # The whole model stands under `model`; the config may only name it.
    config = {
        path: pair for path, pair in named["config"].items() if path.partition(".")[0] != "model"
    }
    known = (*parts, "steps", "seed")  # the last two are in the config as well
    rest = [{key: value for key, value in one.items() if key not in known} for one in facts]
    one, other = final_scores(first), final_scores(second)
    return {
        "kind": "runs",
        "a": str(first),
        "b": str(second),
        "run": differing(*rest),
        **named,
        "config": config,
        "scores": {
            name: (one.get(name), other.get(name)) for name in dict.fromkeys((*one, *other))
        },
    }


def final_scores(run: Path) -> dict[str, float]:
    """Return the last step and loss of a run and its last held-out scores, the final ones if it
    has them.
    """
    from transom.training.report.report import read_metrics

    rows, _ = read_metrics(run / "metrics.jsonl")
    out: dict[str, float] = {}
    for last in rows["loss"][-1:]:
        out = {name: last[name] for name in ("step", "loss", "tokens", "seconds") if name in last}
    for scores in (row[kind] for kind in ("held_out", "final") for row in rows[kind][-1:]):
        out |= {
            name: scores[name] for name in ("bits_per_byte", "perplexity") if name in (scores or ())
        }
    return out


def print_runs(document: Mapping[str, Any]) -> None:
    """Print the differences of two runs, then their scores."""
    for part in ("run", "data", "config", "model"):
        print_fields(part.capitalize(), document[part])
    heading("Final scores" if document["scores"] else "Final scores: none measured")
    rows = [(name, *map(_score_words, pair)) for name, pair in document["scores"].items()]
    if rows:
        show(table(("score",), ("A", "B"), rows))


def _score_words(value: float | None) -> str:
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"


# Models.


def model_document(found: ModelDifference) -> dict[str, Any]:
    """Return a comparison as plain data, with null for a difference that is not finite."""
    one, other = found.args
    tensors = [asdict(tensor) for tensor in found.differing]
    dtypes = {
        name: [str(kind).removeprefix("torch.") for kind in pair]
        for name, pair in found.dtypes.items()
    }
    return {
        "config": differing(resolved(one), resolved(other)),
        "same_layers": one.layers == other.layers,
        "rotary": found.rotary,
        "only_a": found.only_first,
        "only_b": found.only_second,
        "shapes": found.shapes,
        "dtypes": dtypes,
        "compared": found.compared,
        "identical": found.identical,
        "differing": [
            {**tensor, "largest": tensor["largest"] if math.isfinite(tensor["largest"]) else None}
            for tensor in tensors
        ],
    }


# Fields of a model that its layers do not have, and those of a mixture that its width is derived
# from.
_OUTSIDE_LAYERS = (
    *("n_layers", "vocab_size", "max_seq_len", "max_batch_size", "rope_layout", "tie_embeddings"),
    *("embedding_scale", "logit_scale", "logit_softcap", "mup_base_dim", "vision_args", "head"),
)
_DERIVES = (
    "ffn_exp",
    "capacity_factor",
    "auto_scale_F",
    "interleave_moe_layer_step",
    "first_dense_layers",
    "dense_layers",
)


def resolved(args: ModelArgs) -> dict[str, Any]:
    """Return the fields of a model with shorthands and derived values worked out, those of
    layers once if all agree.
    """
    out = {name: value for name, value in asdict(args).items() if name in _OUTSIDE_LAYERS}
    layers = [asdict(layer) for layer in args.layers]
    for layer in layers:
        moe, rope = layer["moe"], layer["rope"]
        if moe is not None:
            layer["hidden_dim"] = None
            layer["moe"] = {key: value for key, value in moe.items() if key not in _DERIVES}
            if moe["shared_expert"] and moe["shared_hidden_dim"] is None:
                layer["moe"]["shared_hidden_dim"] = moe["hidden_dim"]
        if rope is not None:
            layer["rope"] = {key: value for key, value in rope.items() if key != "layout"}
        if layer["softmax_scale"] is None:
            layer["softmax_scale"] = layer["head_dim"] ** -0.5
        del layer["index"]
    for name in layers[0]:
        values = [layer[name] for layer in layers]
        alike = all(value == values[0] for value in values)
        out[name] = values[0] if alike else values
    return {**out, "layer_pattern": args.pattern}


def print_models(document: Mapping[str, Any]) -> None:
    """Print fields, then names, shapes and dtypes that differ, then the tensors with the
    largest differences.
    """
    print_fields("Config", document["config"])
    if document["config"] and document["same_layers"]:
        print("All layers are of the same kind and size.")
    heading("Weights")
    show(pairs(list(weight_lines(document))))
    shapes, apart = document["shapes"], document["differing"]
    if shapes:
        heading(f"Shapes: differences in {counted(len(shapes), 'tensor')}")
        rows = [(name, *(str(tuple(shape)) for shape in pair)) for name, pair in shapes.items()]
        show(table(("tensor", "A", "B"), (), rows[:SHOWN]))
    if apart:
        more = f", the first {SHOWN} are" if len(apart) > SHOWN else ""
        heading(f"Values: differences in {counted(len(apart), 'tensor')}{more}")
        rows = [
            (
                one["name"],
                str(tuple(one["shape"])),
                "not finite" if one["largest"] is None else f"{one['largest']:.3g}",
                f"{one['scale']:.3g}",
                f"{one['differing'] / one['count']:.1%}",
            )
            for one in apart[:SHOWN]
        ]
        show(table(("tensor", "shape"), ("max |A - B|", "max |A|", "numbers that differ"), rows))


def weight_lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (title, text) lines about names, dtypes and rotary layouts."""
    yield (
        "identical",
        f"{document['identical']:,} of {document['compared']:,} tensors that both have",
    )
    for side in ("a", "b"):
        names = document[f"only_{side}"]
        more = f" and {amount(len(names) - SHOWN)} more" if len(names) > SHOWN else ""
        if names:
            yield f"only in {side.upper()}", f"{len(names):,}: {', '.join(names[:SHOWN])}{more}"
    apart = {one["name"] for one in document["differing"]} | set(document["shapes"])
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, (first, second) in document["dtypes"].items():
        kinds.setdefault((first, second), []).append(name)
    for (first, second), names in kinds.items():
        equal = sum(name not in apart for name in names)
        yield (
            "dtype",
            f"{first} in A, {second} in B: {counted(len(names), 'tensor')}, {equal:,} of them "
            f"equal in every number",
        )
    if document["rotary"] in ROTARY:
        yield "rotary", f"the layouts differ{ROTARY[document['rotary']]}"
