"""What the files of a model folder hold, counted key by key and read a second time.

The second reading finds a tensor's parameter by rules of its own that share nothing with
`checkpoints.families`: what reading and writing would both get wrong shows here, where a round trip
sees nothing.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from transom.base.errors import notice
from transom.base.files import read_json
from transom.checkpoints.families.registry import WEIGHT_NAMES
from transom.checkpoints.files.layout import CONFIG, Format, folder_format
from transom.checkpoints.files.lazy_tensors import LazyTensors
from transom.checkpoints.mapping import clean
from transom.checkpoints.state import open_files, parameter_shapes
from transom.config.layer_args import RopeLayout
from transom.config.model_args import ModelArgs
from transom.verify.findings import Finding, difference, same_bytes


@dataclass(frozen=True)
class Case:
    """A folder, and its weights as they stand in the files, without what is known and not read."""

    name: str
    folder: Path
    kind: Format
    args: ModelArgs
    raw: LazyTensors


def open_case(folder: Path, name: str, args: ModelArgs, *, whole: bool) -> Case:
    """A folder's weights, still in its files; not `whole`: without what is known and not read,
    which is said.
    """
    kind = folder_format(folder)
    files = open_files(folder, args)
    if not whole and kind != "native":
        files = clean(table(folder, kind), files, args, str(folder))
    return Case(name, folder, kind, args, files)


def table(folder: Path, kind: Format) -> str:
    """The names of `checkpoints.families` that a foreign folder is read by."""
    return str(read_json(folder / CONFIG)["model_type"]) if kind == "hf" else f"params_{kind}"


def accounted(case: Case) -> Iterator[Finding]:
    """Every key of the files and every parameter has exactly one other side."""
    parameters = parameter_shapes(case.args)
    used: Counter[str] = Counter()
    made: Counter[str] = Counter()
    if case.kind == "native":
        used.update(case.raw.keys() & parameters.keys())
        made.update(used)
    else:
        for move in WEIGHT_NAMES[table(case.folder, case.kind)].mappings_to_read(
            case.args, parameters
        ):
            if all(key in case.raw for key in move.foreign) and not any(
                made[name] for name in move.ours
            ):
                used.update(move.foreign)
                made.update(move.ours)
    for title, names, counts in (
        ("every key becomes a parameter", case.raw, used),
        ("every parameter has a key", parameters, made),
    ):
        for one in names:
            error = float(abs(counts[one] - 1))
            yield Finding(
                title, f"{case.name}, {one}", error, 0.0, f"{counts[one]} times" if error else ""
            )


def stored_twice(case: Case) -> Iterator[Finding]:
    """A tied output that stands in the files all the same is the embeddings."""
    if not case.args.tie_embeddings:
        return
    held = {_place(key)[0]: stored for key, stored in case.raw.items()}
    output, embeddings = held.get(("output.weight",)), held.get(("tok_embeddings.weight",))
    if output is not None and embeddings is not None:
        error = difference(output.read(), embeddings.read())
        detail = "the config ties them, and the files hold two" if error else ""
        yield Finding("tied output = embeddings", case.name, error, 0.0, detail)


_PLACES: dict[str, tuple[str, ...]] = {
    **{f"{letter}_proj": (f"attention.w{letter}",) for letter in "qkvo"},
    **{f"w{letter}": (f"attention.w{letter}",) for letter in "qkvo"},
    **{f"{part}_proj": (f"attention.w{part}",) for part in ("q_a", "q_b", "kv_b")},
    **{f"{part}_layernorm": (f"attention.{part}_norm",) for part in ("q_a", "kv_a")},
    **{f"{letter}_norm": (f"attention.{letter}_norm",) for letter in "qk"},
    **{f"{part}_norm": (f"{part}_norm",) for part in ("attention", "ffn")},
    "kv_a_proj_with_mqa": ("attention.wkv_a",),
    "qkv_proj": ("attention.wq", "attention.wk", "attention.wv"),
    "gate": ("feed_forward.router",),
    "router": ("feed_forward.router",),
    "input_layernorm": ("attention_norm",),
    "pre_feedforward_layernorm": ("ffn_norm",),
    "post_feedforward_layernorm": ("ffn_post_norm",),
}
_WIDTHS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gate_proj", "w1"), ("w_gate",)),
    **dict.fromkeys(("up_proj", "w3"), ("w_value",)),
    **dict.fromkeys(("down_proj", "w2"), ("w_out",)),
    "gate_up_proj": ("w_gate", "w_value"),
}
_OUTSIDE = {
    **dict.fromkeys(("embed_tokens", "tok_embeddings"), "tok_embeddings.weight"),
    **dict.fromkeys(("lm_head", "output"), "output.weight"),
    "norm": "norm.weight",
}


def _place(key: str, norms_behind: bool = False) -> tuple[tuple[str, ...], int | None]:
    """Our parameters that a foreign key holds, one below the other, and the expert; () if not known
    by hand.

    `norms_behind`: a norm called post_attention_layernorm stands behind attention, not before what
    follows.
    """
    outside = re.fullmatch(r"(?:\w+\.)*(\w+)\.weight", key)
    found = re.fullmatch(r"(?:\w+\.)*layers\.(\d+)\.(\w+\.)*?(?:(\d+)\.)?(\w+)\.(weight|bias)", key)
    if "vision" in key:
        return (), None
    if found is None:
        name = _OUTSIDE.get(outside[1]) if outside and "layers." not in key else None
        return (() if name is None else (name,)), None
    layer, _, expert, leaf, kind = found.groups()
    if leaf in _WIDTHS:
        inside = "experts." if expert else "shared_expert." if "shared_expert" in key else ""
        places = tuple(f"feed_forward.{inside}{one}" for one in _WIDTHS[leaf])
    elif leaf == "post_attention_layernorm":
        places = ("attention_post_norm" if norms_behind else "ffn_norm",)
    else:
        places = _PLACES.get(leaf, ())
    return tuple(
        f"layers.{layer}.{place}.{kind}" for place in places
    ), None if expert is None else int(expert)


def by_hand(case: Case, ours: LazyTensors) -> Iterator[Finding]:
    """Every tensor of the files, found by its name once more, is what its parameter is made of."""
    before = [key for key in case.raw if "input_layernorm" in key]
    behind = not before or any("pre_feedforward" in key for key in case.raw)
    readings = []
    for key in case.raw:
        names, expert = ((key,), None) if case.kind == "native" else _place(key, behind)
        if names:
            readings.append((names, expert, key))
    read: set[str] = set()
    for names, group in groupby(sorted(readings, key=lambda one: one[0]), key=lambda one: one[0]):
        read.update(names)
        missing = [name for name in names if name not in ours]
        mine = None if missing else torch.cat([ours[name].read() for name in names])
        for _, expert, key in group:
            where = f"{case.name}, {key}"
            if mine is None:
                yield Finding(
                    "read = read by hand", where, math.inf, 0.0, f"the model has no {missing[0]}"
                )
                continue
            same = same_bytes(mine if expert is None else mine[expert], case.raw[key].read())
            detail = "" if same else f"{' and '.join(names)} hold other numbers"
            yield Finding("read = read by hand", where, 0.0 if same else math.inf, 0.0, detail)
    if rest := len(ours.keys() - read):
        notice(
            f"{case.name}: {rest} of {len(ours)} parameters stand in tensors that are not read "
            f"by hand"
        )


def layout(case: Case) -> Iterator[Finding]:
    """Whose pairs of features turn together is what the makers of the files say."""
    if case.kind == "native":
        return  # its config says so itself
    expected: RopeLayout = "interleaved"
    if case.kind == "hf":
        config = read_json(case.folder / CONFIG)
        family = str(config["model_type"])
        turned = family.startswith("llama4") or (
            family == "deepseek_v3" and config.get("rope_interleave", True)
        )
        expected = "interleaved" if turned else "halves"
    wrong = case.args.rope_layout != expected
    detail = f"read as {case.args.rope_layout}, files of this kind are {expected}" if wrong else ""
    yield Finding("rotary layout", case.name, float(wrong), 0.0, detail)
