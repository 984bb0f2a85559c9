"""`transom inspect A B`: what differs between two models, or between two runs."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import require
from transom.base.files import read_json
from transom.checkpoints.files.folders import Found, find_model
from transom.cli.inspect import amount, heading, pairs, show, table
from transom.cli.main import emit_json
from transom.config.model_args import ModelArgs
from transom.planning.layer_plan import index_words

if TYPE_CHECKING:
    from transom.evaluation.compare import ModelDifference

RUN = "run.json"
MOST = 10  # tensors shown; --json has them all
ABSENT = "-"
Differences = dict[str, tuple[Any, Any]]


def run_compare(options: argparse.Namespace) -> int:
    """Print what differs; the exit code is 0 also where something does."""
    for flag in ("length", "trace", "device", "dtype"):
        require(
            getattr(options, flag) is None,
            f"--{flag}",
            getattr(options, flag),
            "valid only with one model",
        )
    first, second, revision = options.model, options.other, options.revision
    # A revision is that of what is no folder; of both, where both are hub ids.
    local = [Path(name).exists() for name in (first, second)]
    require(
        revision is None or not all(local),
        "--revision",
        revision,
        "valid only with a hub id, and these are none",
    )
    if all((Path(name) / RUN).exists() for name in (first, second)):
        document = compare_runs(Path(first), Path(second))
    else:
        from transom.evaluation.compare import compare_models

        one, other = (
            find_model(name, None if here else revision)
            for name, here in zip((first, second), local, strict=True)
        )
        document = model_document(one, other, compare_models(one, other))
    if options.json:
        emit_json(document)
    elif document["kind"] == "runs":
        print_runs(document)
    else:
        print_models(document)
    return 0


# -- fields
# -----------------------------------------------------------------------------------------------


def flat(data: object, path: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested mappings and lists, each under its path: `data.sources[0].name`."""
    if isinstance(data, Mapping) and data:
        for key, value in data.items():
            yield from flat(value, f"{path}.{key}" if path else str(key))
    elif isinstance(data, (list, tuple)) and data:
        for index, value in enumerate(data):
            yield from flat(value, f"{path}[{index}]")
    else:
        yield path, data


def differing(first: object, second: object) -> Differences:
    """What stands in only one of two structures, or differently in both; what is absent is None."""
    one, other = dict(flat(first)), dict(flat(second))
    return {
        path: (one.get(path), other.get(path))
        for path in dict.fromkeys((*one, *other))
        if one.get(path) != other.get(path)
    }


def print_fields(title: str, found: Mapping[str, Sequence[Any]]) -> None:
    """A table of both sides, or one line where nothing differs."""
    if not found:
        heading(f"{title}: the same")
        return
    heading(f"{title}: {len(found)} differ")
    show(
        table(
            ("field", "A", "B"),
            (),
            [(path, worded(a), worded(b)) for path, (a, b) in found.items()],
        )
    )


def worded(value: object) -> str:
    """A value as its file has it."""
    return ABSENT if value is None else value if isinstance(value, str) else json.dumps(value)


# -- runs
# -------------------------------------------------------------------------------------------------


def compare_runs(first: Path, second: Path) -> dict[str, Any]:
    """What two run.json say differently: versions and machine, data, config, model; and the last
    scores of both.
    """
    one, other = read_json(first / RUN), read_json(second / RUN)
    parts = {"data": "data", "config": "config", "model": "model"}
    named = {part: differing(one.get(key), other.get(key)) for part, key in parts.items()}
    # The whole model stands under `model`; the config may only name it.
    named["config"] = {
        path: pair for path, pair in named["config"].items() if path.partition(".")[0] != "model"
    }
    rest = [
        {key: value for key, value in facts.items() if key not in parts} for facts in (one, other)
    ]
    scores, others = final_scores(first), final_scores(second)
    return {
        "kind": "runs",
        "a": str(first),
        "b": str(second),
        "run": differing(*rest),
        **named,
        "scores": {
            name: (scores.get(name), others.get(name)) for name in dict.fromkeys((*scores, *others))
        },
    }


def final_scores(run: Path) -> dict[str, float]:
    """The last step and loss of a run, and its last held-out scores, over everything where that was
    measured.
    """
    from transom.training.report.report import read_metrics

    rows, _ = read_metrics(run / "metrics.jsonl")
    out: dict[str, float] = {}
    if rows["loss"]:
        last = rows["loss"][-1]
        out = {name: last[name] for name in ("step", "loss", "tokens", "seconds") if name in last}
    measured = [row[kind] for kind in ("held_out", "final") for row in rows[kind][-1:]]
    for scores in filter(
        None, measured
    ):  # the final measurement, where there is one, comes last and counts
        out |= {name: scores[name] for name in ("bits_per_byte", "perplexity") if name in scores}
    return out


def print_runs(document: Mapping[str, Any]) -> None:
    """Both names, then one part after the other."""
    print_names(document)
    for part, title in (
        ("run", "Run"), ("data", "Data"), ("config", "Config"), ("model", "Model"),
    ):  # fmt: skip
        print_fields(title, document[part])
    heading("Final scores" if document["scores"] else "Final scores: none measured")
    if document["scores"]:
        rows = [(name, *map(number, pair)) for name, pair in document["scores"].items()]
        show(table(("score",), ("A", "B"), rows))


# -- models
# -----------------------------------------------------------------------------------------------


def model_document(first: Found, second: Found, found: ModelDifference) -> dict[str, Any]:
    """The comparison as plain data; every difference that is not finite is None, which JSON can
    say.
    """
    one, other = found.args
    return {
        "kind": "models",
        "a": str(first),
        "b": str(second),
        "config": differing(resolved(one), resolved(other)),
        "same_layers": one.layers == other.layers,
        "rotary": found.rotary,
        "only_a": found.only_first,
        "only_b": found.only_second,
        "shapes": found.shapes,
        "dtypes": {
            name: [str(kind).removeprefix("torch.") for kind in pair]
            for name, pair in found.dtypes.items()
        },
        "compared": found.compared,
        "identical": found.identical,
        "differing": [{**asdict(one), "largest": finite(one.largest)} for one in found.differing],
    }


# Fields that say no more once others are worked out: what a width is derived from, and shorthands.
SPENT = (
    *(
        "multiple_of",
        "ffn_dim_multiplier",
        "nope_layer_interval",
        "use_scaled_rope",
        "rope_scaling_factor",
    ),
    *("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_max_seq_len"),
)
SPENT_OF_EXPERTS = (
    "ffn_exp",
    "capacity_factor",
    "auto_scale_F",
    "interleave_moe_layer_step",
    "first_dense_layers",
)


def resolved(args: ModelArgs) -> dict[str, Any]:
    """The fields as the model has them: what was left to a rule is worked out, and shorthands are
    spelled out.
    """
    out = {key: value for key, value in asdict(args).items() if key not in SPENT}
    dense = tuple(layer.index for layer in args.layers if layer.moe is None)
    out |= {"n_kv_heads": args.kv_heads, "head_dim": args.head_size}
    out["hidden_dim"] = args.dense_hidden_dim if dense else None
    out |= {"layer_pattern": args.pattern, "rope_scaling": args.scaling and asdict(args.scaling)}
    for name, default in (
        ("softmax_scale", args.head_size**-0.5),
        ("embedding_scale", 1.0),
        ("logit_scale", 1.0),
        # Of layers that see few keys; where there are none, or scaling sets them apart, no other
        # field says it.
        (
            "rope_local_theta",
            args.rope_theta if {"S", "C"} & set(args.pattern) and args.scaling is None else None,
        ),
    ):
        out[name] = default if out[name] is None else out[name]
    experts = next((layer.moe for layer in args.layers if layer.moe is not None), None)
    if experts is not None:
        moe = {key: value for key, value in asdict(experts).items() if key not in SPENT_OF_EXPERTS}
        moe["dense_layers"] = index_words(dense) or None
        if moe["shared_expert"] and moe["shared_hidden_dim"] is None:
            moe["shared_hidden_dim"] = moe["hidden_dim"]
        out["moe_args"] = moe
    return out


def finite(value: float) -> float | None:
    """A number, or None for one that JSON has no word for."""
    return value if math.isfinite(value) else None


def print_models(document: Mapping[str, Any]) -> None:
    """Fields, then names, shapes and dtypes that differ, then the tensors that are furthest
    apart.
    """
    print_names(document)
    print_fields("Config", document["config"])
    if document["config"] and document["same_layers"]:
        print("every layer is of the same kind and size all the same")
    heading("Weights")
    show(pairs(list(weight_lines(document))))
    if document["shapes"]:
        heading(f"Shapes: {len(document['shapes'])} differ")
        outlines = [
            (name, str(tuple(a)), str(tuple(b))) for name, (a, b) in shortened(document["shapes"])
        ]
        show(table(("tensor", "A", "B"), (), outlines))
    apart = document["differing"]
    if apart:
        heading(
            f"Values: {len(apart)} tensors differ"
            + (f", the first {MOST} are" if len(apart) > MOST else "")
        )
        rows = [
            (
                one["name"],
                str(tuple(one["shape"])),
                "not finite" if one["largest"] is None else f"{one['largest']:.3g}",
                f"{one['scale']:.3g}",
                f"{one['differing'] / one['count']:.1%}",
            )
            for one in apart[:MOST]
        ]
        show(table(("tensor", "shape"), ("max |A - B|", "max |A|", "numbers that differ"), rows))


def weight_lines(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(what, how many and which) of names and dtypes."""
    yield "identical", f"{document['identical']} of {document['compared']} tensors that both have"
    for side in ("a", "b"):
        names = document[f"only_{side}"]
        if names:
            yield f"only in {side.upper()}", few(names)
    apart = {one["name"] for one in document["differing"]} | set(document["shapes"])
    kinds: dict[tuple[str, str], list[str]] = {}
    for name, (first, second) in document["dtypes"].items():
        kinds.setdefault((first, second), []).append(name)
    for (first, second), names in kinds.items():
        equal = sum(name not in apart for name in names)
        yield (
            "dtype",
            f"{first} in A, {second} in B: {len(names)} tensors, {equal} of them equal in every "
            f"number",
        )
    if document["rotary"] == "turned":
        yield (
            "rotary",
            "the layouts differ: rows of B were turned into that of A before they were compared",
        )
    if document["rotary"] == "kept":
        yield (
            "rotary",
            "the layouts differ, and latent heads cannot be turned: their rows are compared as "
            "they are",
        )


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {amount(len(names) - MOST)} more" if len(names) > MOST else ""
    return f"{len(names)}: {', '.join(names[:MOST])}{more}"


def shortened(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The first entries."""
    return list(found.items())[:MOST]


def print_names(document: Mapping[str, Any]) -> None:
    """Which is A and which is B."""
    show(pairs([("A", document["a"]), ("B", document["b"])]))


def number(value: float | None) -> str:
    """A score, or a dash."""
    return ABSENT if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
