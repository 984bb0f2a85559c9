"""Names of weights in files and in other code, and what happens to a tensor on the way to ours.
Data only, no torch.

A table is a tuple of `KeyPattern`. In a pattern `{i}` stands for the index of a layer, `{v}` for
that of a layer of the vision encoder and `{e}` for that of an expert. `expand` fills them in for
one model and keeps the patterns whose parameters the model has. Reading and writing use the same
patterns, so no name is known in one direction only.

The names here are those of Meta's and Mistral's reference code, which `load_state_dict` accepts
beside ours. The names of Hugging Face files are in `checkpoints.families`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from transom.config.model_args import ModelArgs

# How the foreign tensors of a pattern become ours; writing does the inverse.
#   copy            one to one
#   stack           one foreign tensor per expert -> ours [E, out, in]
#   transpose       [E, in, out] -> ours [E, out, in]
#   flat            [E in, out] -> ours [E, out, in]
#   halves          [E, in, 2 out] -> two of ours [E, out, in]: gate first, then value
#   rows            [sum of out, ...] or [E, sum of out, in] -> several of ours [out, ...] or
#                   [E, out, in], one below the other
# alternate       [E, in, 2 out] or [E, 2 out] -> two of ours [E, out, in] or [E, out]: even
# columns, odd columns
Transform = Literal["copy", "stack", "transpose", "flat", "halves", "rows", "alternate"]


@dataclass(frozen=True)
class KeyPattern:
    """A pattern of foreign keys, the patterns of our keys, and the transform between their
    tensors.
    """

    foreign: str
    ours: tuple[str, ...]
    transform: Transform = "copy"


@dataclass(frozen=True)
class KeyMapping:
    """A `KeyPattern` with all indices filled in: these foreign keys become these of ours."""

    foreign: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform


def pattern(foreign: str, *ours: str, transform: Transform = "copy") -> KeyPattern:
    """Return the pattern of one foreign key that becomes `ours`."""
    return KeyPattern(foreign, ours, transform)


def with_bias(foreign: str, ours: str) -> tuple[KeyPattern, KeyPattern]:
    """Return the patterns of a module's `weight` and `bias`."""
    return pattern(f"{foreign}.weight", f"{ours}.weight"), pattern(
        f"{foreign}.bias", f"{ours}.bias"
    )


LAYER = "layers.{i}"
FEED_FORWARD = f"{LAYER}.feed_forward"
VISION_LAYER = "vision.layers.{v}"
_EXPERTS, _SHARED = f"{FEED_FORWARD}.experts", f"{FEED_FORWARD}.shared_expert"
# Names of the three matrices of a feed-forward in the reference code, and here.
_MATRICES = (("w1", "w_gate"), ("w3", "w_value"), ("w2", "w_out"))

QKV = tuple(f"{LAYER}.attention.{leaf}.weight" for leaf in ("wq", "wk", "wv"))
DENSE_NAMES = tuple(
    pattern(f"{FEED_FORWARD}.{theirs}.weight", f"{FEED_FORWARD}.{ours}.weight")
    for theirs, ours in _MATRICES
)
MISTRAL_EXPERTS = (
    pattern(f"{FEED_FORWARD}.gate.weight", f"{FEED_FORWARD}.router.weight"),
    *(
        pattern(f"{_EXPERTS}.{{e}}.{theirs}.weight", f"{_EXPERTS}.{ours}.weight", transform="stack")
        for theirs, ours in _MATRICES
    ),
)
LLAMA4_EXPERTS = (
    pattern(f"{FEED_FORWARD}.router_DE", f"{FEED_FORWARD}.router.weight", transform="transpose"),
    *(
        pattern(f"{_EXPERTS}.{theirs}", f"{_EXPERTS}.{ours}.weight", transform="flat")
        for theirs, ours in (
            ("moe_w_in_eD_F", "w_gate"),
            ("moe_w_swiglu_eD_F", "w_value"),
            ("moe_w_out_eF_D", "w_out"),
        )
    ),
    *(
        pattern(f"{FEED_FORWARD}.{theirs}.weight", f"{_SHARED}.{ours}.weight")
        for theirs, ours in (
            ("w_in_shared_FD", "w_gate"),
            ("w_swiglu_FD", "w_value"),
            ("w_out_shared_DF", "w_out"),
        )
    ),
)
# All names that `load_state_dict` and folders with a params.json accept. Where a key could be read
# in two ways, the first pattern whose parameters the model has counts.
REFERENCE_NAMES: tuple[KeyPattern, ...] = (
    pattern(f"{LAYER}.attention.wqkv.weight", *QKV, transform="rows"),
    pattern(f"{LAYER}.attention.wqkv.layer_norm_weight", f"{LAYER}.attention_norm.weight"),
    pattern(
        f"{FEED_FORWARD}.mlp.fc1_weight",
        f"{FEED_FORWARD}.w_gate.weight",
        f"{FEED_FORWARD}.w_value.weight",
        transform="rows",
    ),
    pattern(f"{FEED_FORWARD}.mlp.fc2_weight", f"{FEED_FORWARD}.w_out.weight"),
    pattern(f"{FEED_FORWARD}.mlp.layer_norm_weight", f"{LAYER}.ffn_norm.weight"),
    pattern(f"{FEED_FORWARD}.norm.weight", f"{LAYER}.ffn_norm.weight"),
    *DENSE_NAMES,
    *MISTRAL_EXPERTS,
    *LLAMA4_EXPERTS,
    *(
        pattern(f"{_EXPERTS}.{theirs}", f"{_EXPERTS}.{ours}.weight", transform="transpose")
        for theirs, ours in _MATRICES
    ),
    *(
        pattern(f"{_SHARED}.{theirs}.weight", f"{_SHARED}.{ours}.weight")
        for theirs, ours in _MATRICES
    ),
)
# Endings of keys that hold nothing a model needs: rotary tables are computed, extra states belong
# to a library.
IGNORED_ENDINGS = ("rope.freqs", "._extra_state")


def expand(
    patterns: Iterable[KeyPattern], args: ModelArgs, parameters: Collection[str]
) -> list[KeyMapping]:
    """Fill in every layer and expert, and keep the mappings whose parameters the model has.

    Args:
        patterns: the table.
        args: the model, for the numbers of its layers and experts.
        parameters: the names of its parameters.
    """
    experts = range(args.moe_args.num_experts if args.moe_args else 0)
    vision = args.vision_args.n_layers if args.vision_args else 0
    layers = {"{i}": args.n_layers, "{v}": vision, "": 1}  # how often a row with this mark stands
    out = []
    for row in patterns:
        mark = next(mark for mark in layers if mark in row.foreign)
        for index in map(str, range(layers[mark])):
            names = [row.foreign, *row.ours]
            foreign, *ours = (name.replace(mark, index) if mark else name for name in names)
            if all(name in parameters for name in ours):
                each = [foreign.replace("{e}", str(expert)) for expert in experts]
                each = each if "{e}" in foreign else [foreign]
                out.append(KeyMapping(tuple(each), tuple(ours), row.transform))
    return out
