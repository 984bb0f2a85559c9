"""Every foreign weight name we know, its own name here, and what happens to the tensor in between. Data only.

A table is a tuple of `Row`s. `{i}` stands for a layer, `{e}` for an expert; `moves` expands a table for one
model. Reading and writing use the same rows, so a name cannot be known in one direction only.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from transom.args import ModelArgs

# What turns the foreign tensors of a row into ours; writing does the inverse.
#   copy            one to one
#   stack           one foreign tensor per expert -> ours [E, out, in]
#   transpose       [E, in, out] -> ours [E, out, in]
#   halves          [E, in, 2 out] -> two of ours [E, out, in]: gate first, then value
Transform = Literal["copy", "stack", "transpose", "halves"]


@dataclass(frozen=True)
class Row:
    """One pattern of foreign keys, the pattern of our key or keys, and the transform between them."""

    foreign: str
    ours: tuple[str, ...]
    transform: Transform = "copy"


@dataclass(frozen=True)
class Move:
    """A row for concrete layers and experts: these foreign keys become these of ours."""

    foreign: tuple[str, ...]
    ours: tuple[str, ...]
    transform: Transform


def _row(foreign: str, *ours: str, transform: Transform = "copy") -> Row:
    return Row(foreign, ours, transform)


_HF_COMMON = (
    _row("model.embed_tokens.weight", "tok_embeddings.weight"),
    _row("model.norm.weight", "norm.weight"),
    _row("lm_head.weight", "output.weight"),
    _row("model.layers.{i}.self_attn.q_proj.weight", "layers.{i}.attention.wq.weight"),
    _row("model.layers.{i}.self_attn.k_proj.weight", "layers.{i}.attention.wk.weight"),
    _row("model.layers.{i}.self_attn.v_proj.weight", "layers.{i}.attention.wv.weight"),
    _row("model.layers.{i}.self_attn.o_proj.weight", "layers.{i}.attention.wo.weight"),
    _row("model.layers.{i}.input_layernorm.weight", "layers.{i}.attention_norm.weight"),
    # In these families the name means the norm in front of the feed-forward, not one behind attention.
    _row("model.layers.{i}.post_attention_layernorm.weight", "layers.{i}.ffn_norm.weight"),
)


def _hf_dense(foreign: str, ours: str) -> tuple[Row, ...]:
    return (
        _row(f"{foreign}.gate_proj.weight", f"{ours}.w_gate.weight"),
        _row(f"{foreign}.up_proj.weight", f"{ours}.w_value.weight"),
        _row(f"{foreign}.down_proj.weight", f"{ours}.w_out.weight"),
    )


_OURS_FFN = "layers.{i}.feed_forward"
_HF_LLAMA = (*_HF_COMMON, *_hf_dense("model.layers.{i}.mlp", _OURS_FFN))
_MIXTRAL = "model.layers.{i}.block_sparse_moe"
_LLAMA4 = "model.layers.{i}.feed_forward"

TABLES: dict[str, tuple[Row, ...]] = {
    "llama": _HF_LLAMA,
    "mistral": _HF_LLAMA,
    "mixtral": (
        *_HF_COMMON,
        _row(f"{_MIXTRAL}.gate.weight", f"{_OURS_FFN}.router.weight"),
        _row(_MIXTRAL + ".experts.{e}.w1.weight", f"{_OURS_FFN}.experts.w_gate.weight", transform="stack"),
        _row(_MIXTRAL + ".experts.{e}.w3.weight", f"{_OURS_FFN}.experts.w_value.weight", transform="stack"),
        _row(_MIXTRAL + ".experts.{e}.w2.weight", f"{_OURS_FFN}.experts.w_out.weight", transform="stack"),
    ),
    "llama4_text": (
        *_HF_COMMON,
        *_hf_dense(_LLAMA4, _OURS_FFN),
        *_hf_dense(f"{_LLAMA4}.shared_expert", f"{_OURS_FFN}.shared_expert"),
        _row(f"{_LLAMA4}.router.weight", f"{_OURS_FFN}.router.weight"),
        _row(
            f"{_LLAMA4}.experts.gate_up_proj",
            f"{_OURS_FFN}.experts.w_gate.weight",
            f"{_OURS_FFN}.experts.w_value.weight",
            transform="halves",
        ),
        _row(f"{_LLAMA4}.experts.down_proj", f"{_OURS_FFN}.experts.w_out.weight", transform="transpose"),
    ),
}


def moves(table: str, args: ModelArgs, parameters: Collection[str]) -> list[Move]:
    """The rows of a table expanded over layers and experts, kept where the model has the parameters."""
    experts = range(args.moe_args.num_experts if args.moe_args else 0)
    out = []
    for row in TABLES[table]:
        for i in range(args.n_layers) if "{i}" in row.foreign else (0,):
            ours = tuple(name.replace("{i}", str(i)) for name in row.ours)
            if not all(name in parameters for name in ours):
                continue
            foreign = row.foreign.replace("{i}", str(i))
            each = tuple(foreign.replace("{e}", str(e)) for e in experts) if "{e}" in foreign else (foreign,)
            out.append(Move(each, ours, row.transform))
    return out
