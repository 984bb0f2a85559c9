"""Every foreign weight name we know, its own name here, and what happens to the tensor in between.
Data only.

A table is a tuple of `Row`s. `{i}` stands for a layer, `{v}` for one of the vision encoder, `{e}`
for an expert; `moves` expands a table for one model, and keeps the rows whose parameters it has.
Reading and writing use the same rows, so a name cannot be known in one direction only.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal

from transom.config.model_args import ModelArgs

# What turns the foreign tensors of a row into ours; writing does the inverse.
#   copy            one to one
#   stack           one foreign tensor per expert -> ours [E, out, in]
#   transpose       [E, in, out] -> ours [E, out, in]
#   flat            [E in, out] -> ours [E, out, in]
#   halves          [E, in, 2 out] -> two of ours [E, out, in]: gate first, then value
#   rows            [sum of out, ...] -> several of ours [out, ...], one below the other
# alternate       [E, in, 2 out] or [E, 2 out] -> two of ours [E, out, in] or [E, out]: even
# columns, odd columns
Transform = Literal["copy", "stack", "transpose", "flat", "halves", "rows", "alternate"]


@dataclass(frozen=True)
class Row:
    """One pattern of foreign keys, the pattern of our key or keys, and the transform between
    them.
    """

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


def _under(prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(replace(row, foreign=prefix + row.foreign) for row in rows)


def _with_bias(foreign: str, ours: str) -> tuple[Row, ...]:
    return _row(f"{foreign}.weight", f"{ours}.weight"), _row(f"{foreign}.bias", f"{ours}.bias")


_LAYER, _OURS = "model.layers.{i}", "layers.{i}"
_OURS_FFN = f"{_OURS}.feed_forward"

_HF_OUTSIDE = (
    _row("model.embed_tokens.weight", "tok_embeddings.weight"),
    _row("model.norm.weight", "norm.weight"),
    _row("lm_head.weight", "output.weight"),
)
_HF_ATTENTION = (
    *_with_bias(f"{_LAYER}.self_attn.q_proj", f"{_OURS}.attention.wq"),
    *_with_bias(f"{_LAYER}.self_attn.k_proj", f"{_OURS}.attention.wk"),
    *_with_bias(f"{_LAYER}.self_attn.v_proj", f"{_OURS}.attention.wv"),
    *_with_bias(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.wo"),
    _row(f"{_LAYER}.self_attn.q_norm.weight", f"{_OURS}.attention.q_norm.weight"),
    _row(f"{_LAYER}.self_attn.k_norm.weight", f"{_OURS}.attention.k_norm.weight"),
    _row(f"{_LAYER}.self_attn.sinks", f"{_OURS}.attention.sinks"),
)
_HF_LATENT = (
    _row(f"{_LAYER}.self_attn.q_proj.weight", f"{_OURS}.attention.wq.weight"),
    *_with_bias(f"{_LAYER}.self_attn.q_a_proj", f"{_OURS}.attention.wq_a"),
    _row(f"{_LAYER}.self_attn.q_a_layernorm.weight", f"{_OURS}.attention.q_a_norm.weight"),
    _row(f"{_LAYER}.self_attn.q_b_proj.weight", f"{_OURS}.attention.wq_b.weight"),
    *_with_bias(f"{_LAYER}.self_attn.kv_a_proj_with_mqa", f"{_OURS}.attention.wkv_a"),
    _row(f"{_LAYER}.self_attn.kv_a_layernorm.weight", f"{_OURS}.attention.kv_a_norm.weight"),
    _row(f"{_LAYER}.self_attn.kv_b_proj.weight", f"{_OURS}.attention.wkv_b.weight"),
    *_with_bias(f"{_LAYER}.self_attn.o_proj", f"{_OURS}.attention.wo"),
)
# The same foreign name means the norm in front of the feed-forward here, and the one behind
# attention below.
_HF_PRE_NORMS = (
    _row(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.attention_norm.weight"),
    _row(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.ffn_norm.weight"),
)
_HF_POST_NORMS = (
    _row(f"{_LAYER}.post_attention_layernorm.weight", f"{_OURS}.attention_post_norm.weight"),
    _row(f"{_LAYER}.post_feedforward_layernorm.weight", f"{_OURS}.ffn_post_norm.weight"),
)
_HF_BOTH_NORMS = (
    _row(f"{_LAYER}.input_layernorm.weight", f"{_OURS}.attention_norm.weight"),
    _row(f"{_LAYER}.pre_feedforward_layernorm.weight", f"{_OURS}.ffn_norm.weight"),
    *_HF_POST_NORMS,
)


def _hf_dense(foreign: str, ours: str) -> tuple[Row, ...]:
    return (
        *_with_bias(f"{foreign}.gate_proj", f"{ours}.w_gate"),
        *_with_bias(f"{foreign}.up_proj", f"{ours}.w_value"),
        *_with_bias(f"{foreign}.down_proj", f"{ours}.w_out"),
    )


def _hf_experts(foreign: str, gate: str, value: str, out: str) -> tuple[Row, ...]:
    """A router named `gate` and one set of three matrices per expert."""
    experts = f"{_OURS_FFN}.experts"
    return (
        _row(f"{foreign}.gate.weight", f"{_OURS_FFN}.router.weight"),
        _row(
            f"{foreign}.experts.{{e}}.{gate}.weight", f"{experts}.w_gate.weight", transform="stack"
        ),
        _row(
            f"{foreign}.experts.{{e}}.{value}.weight",
            f"{experts}.w_value.weight",
            transform="stack",
        ),
        _row(f"{foreign}.experts.{{e}}.{out}.weight", f"{experts}.w_out.weight", transform="stack"),
    )


def _pair(last: str) -> tuple[str, str]:
    return f"{_OURS_FFN}.experts.w_gate.{last}", f"{_OURS_FFN}.experts.w_value.{last}"


_HF_MLP = _hf_dense(f"{_LAYER}.mlp", _OURS_FFN)
_HF_PRE = (*_HF_OUTSIDE, *_HF_ATTENTION, *_HF_PRE_NORMS)
_HF_LLAMA = (*_HF_PRE, *_HF_MLP)
_HF_GEMMA = (*_HF_OUTSIDE, *_HF_ATTENTION, *_HF_BOTH_NORMS, *_HF_MLP)
_HF_QWEN_EXPERTS = _hf_experts(f"{_LAYER}.mlp", "gate_proj", "up_proj", "down_proj")
_LLAMA4, _GPT_OSS = f"{_LAYER}.feed_forward", f"{_LAYER}.mlp"
_HF_LLAMA4 = (
    *_HF_PRE,
    *_hf_dense(_LLAMA4, _OURS_FFN),
    *_hf_dense(f"{_LLAMA4}.shared_expert", f"{_OURS_FFN}.shared_expert"),
    _row(f"{_LLAMA4}.router.weight", f"{_OURS_FFN}.router.weight"),
    _row(f"{_LLAMA4}.experts.gate_up_proj", *_pair("weight"), transform="halves"),
    _row(
        f"{_LLAMA4}.experts.down_proj", f"{_OURS_FFN}.experts.w_out.weight", transform="transpose"
    ),
)
_VISION, _OURS_VISION = "vision_model.model.layers.{v}", "vision.layers.{v}"
_HF_LLAMA4_VISION = (
    _row("vision_model.patch_embedding.linear.weight", "vision.patch_embedding.weight"),
    _row("vision_model.class_embedding", "vision.class_embedding"),
    _row("vision_model.positional_embedding_vlm", "vision.position_embedding"),
    *_with_bias("vision_model.layernorm_pre", "vision.norm_pre"),
    *_with_bias("vision_model.layernorm_post", "vision.norm_post"),
    *_with_bias(f"{_VISION}.self_attn.q_proj", f"{_OURS_VISION}.attention.wq"),
    *_with_bias(f"{_VISION}.self_attn.k_proj", f"{_OURS_VISION}.attention.wk"),
    *_with_bias(f"{_VISION}.self_attn.v_proj", f"{_OURS_VISION}.attention.wv"),
    *_with_bias(f"{_VISION}.self_attn.o_proj", f"{_OURS_VISION}.attention.wo"),
    *_with_bias(f"{_VISION}.input_layernorm", f"{_OURS_VISION}.attention_norm"),
    *_with_bias(f"{_VISION}.post_attention_layernorm", f"{_OURS_VISION}.ffn_norm"),
    *_with_bias(f"{_VISION}.mlp.fc1", f"{_OURS_VISION}.feed_forward.w_value"),
    *_with_bias(f"{_VISION}.mlp.fc2", f"{_OURS_VISION}.feed_forward.w_out"),
    _row("vision_model.vision_adapter.mlp.fc1.weight", "vision.adapter.fc1.weight"),
    _row("vision_model.vision_adapter.mlp.fc2.weight", "vision.adapter.fc2.weight"),
    _row("multi_modal_projector.linear_1.weight", "vision.projection.weight"),
)

# Names that weights of the same model have had in the reference codes of Meta and Mistral:
# `load_state_dict` takes them beside ours, and so do their folders. Where a key could be read in
# two ways, the first row whose parameters the model has counts.
_META_FFN = f"{_OURS}.feed_forward"
_META_EXPERTS = f"{_META_FFN}.experts"
_META_SHARED = f"{_META_FFN}.shared_expert"
_META_DENSE = (
    _row(f"{_META_FFN}.w1.weight", f"{_META_FFN}.w_gate.weight"),
    _row(f"{_META_FFN}.w3.weight", f"{_META_FFN}.w_value.weight"),
    _row(f"{_META_FFN}.w2.weight", f"{_META_FFN}.w_out.weight"),
)
_MISTRAL_EXPERTS = (
    _row(f"{_META_FFN}.gate.weight", f"{_META_FFN}.router.weight"),
    *(
        _row(
            f"{_META_EXPERTS}.{{e}}.{theirs}.weight",
            f"{_META_EXPERTS}.{ours}.weight",
            transform="stack",
        )
        for theirs, ours in (("w1", "w_gate"), ("w3", "w_value"), ("w2", "w_out"))
    ),
)
_LLAMA4_EXPERTS = (
    _row(f"{_META_FFN}.router_DE", f"{_META_FFN}.router.weight", transform="transpose"),
    *(
        row
        for ours, flat, shared in (
            ("w_gate", "moe_w_in_eD_F", "w_in_shared_FD"),
            ("w_value", "moe_w_swiglu_eD_F", "w_swiglu_FD"),
            ("w_out", "moe_w_out_eF_D", "w_out_shared_DF"),
        )
        for row in (
            _row(f"{_META_EXPERTS}.{flat}", f"{_META_EXPERTS}.{ours}.weight", transform="flat"),
            _row(f"{_META_FFN}.{shared}.weight", f"{_META_SHARED}.{ours}.weight"),
        )
    ),
)
OLD_NAMES: tuple[Row, ...] = (
    _row(
        f"{_OURS}.attention.wqkv.weight",
        *(f"{_OURS}.attention.{leaf}.weight" for leaf in ("wq", "wk", "wv")),
        transform="rows",
    ),
    _row(f"{_OURS}.attention.wqkv.layer_norm_weight", f"{_OURS}.attention_norm.weight"),
    _row(
        f"{_META_FFN}.mlp.fc1_weight",
        f"{_META_FFN}.w_gate.weight",
        f"{_META_FFN}.w_value.weight",
        transform="rows",
    ),
    _row(f"{_META_FFN}.mlp.fc2_weight", f"{_META_FFN}.w_out.weight"),
    _row(f"{_META_FFN}.mlp.layer_norm_weight", f"{_OURS}.ffn_norm.weight"),
    _row(f"{_META_FFN}.norm.weight", f"{_OURS}.ffn_norm.weight"),
    *_META_DENSE,
    *_MISTRAL_EXPERTS,
    *_LLAMA4_EXPERTS,
    *(
        row
        for theirs, ours in (("w1", "w_gate"), ("w3", "w_value"), ("w2", "w_out"))
        for row in (
            _row(
                f"{_META_EXPERTS}.{theirs}", f"{_META_EXPERTS}.{ours}.weight", transform="transpose"
            ),
            _row(f"{_META_SHARED}.{theirs}.weight", f"{_META_SHARED}.{ours}.weight"),
        )
    ),
)
_META = (
    *(_row(name, name) for name in ("tok_embeddings.weight", "norm.weight", "output.weight")),
    *(
        _row(name, name)
        for name in (f"{_OURS}.attention.{leaf}.weight" for leaf in ("wq", "wk", "wv", "wo"))
    ),
    *(_row(name, name) for name in (f"{_OURS}.attention_norm.weight", f"{_OURS}.ffn_norm.weight")),
    *_META_DENSE,
)
_ENCODER = "vision_embeddings.vision_encoder"
_META_BLOCK = f"{_ENCODER}.transformer.resblocks.{{v}}"
_META_VISION = (
    _row(f"{_ENCODER}.conv1._linear.weight", "vision.patch_embedding.weight"),
    _row(f"{_ENCODER}.class_embedding", "vision.class_embedding"),
    _row(f"{_ENCODER}.positional_embedding_vlm", "vision.position_embedding"),
    *_with_bias(f"{_ENCODER}.ln_pre", "vision.norm_pre"),
    *_with_bias(f"{_ENCODER}.ln_post", "vision.norm_post"),
    *(
        row
        for leaf in ("wq", "wk", "wv", "wo")
        for row in _with_bias(f"{_META_BLOCK}.attn.{leaf}", f"{_OURS_VISION}.attention.{leaf}")
    ),
    *_with_bias(f"{_META_BLOCK}.ln_1", f"{_OURS_VISION}.attention_norm"),
    *_with_bias(f"{_META_BLOCK}.ln_2", f"{_OURS_VISION}.ffn_norm"),
    *_with_bias(f"{_META_BLOCK}.mlp.c_fc", f"{_OURS_VISION}.feed_forward.w_value"),
    *_with_bias(f"{_META_BLOCK}.mlp.c_proj", f"{_OURS_VISION}.feed_forward.w_out"),
    _row("vision_embeddings.vision_adapter.mlp.c_fc.weight", "vision.adapter.fc1.weight"),
    _row("vision_embeddings.vision_adapter.mlp.c_proj.weight", "vision.adapter.fc2.weight"),
    _row("vision_projection.weight", "vision.projection.weight"),
)
TABLES: dict[str, tuple[Row, ...]] = {
    "llama": _HF_LLAMA,
    "mistral": _HF_LLAMA,
    "mixtral": (*_HF_PRE, *_hf_experts(f"{_LAYER}.block_sparse_moe", "w1", "w3", "w2")),
    "qwen2": _HF_LLAMA,
    "qwen3": _HF_LLAMA,
    "qwen3_moe": (*_HF_LLAMA, *_HF_QWEN_EXPERTS),
    "gemma2": _HF_GEMMA,
    "gemma3_text": _HF_GEMMA,
    "gemma3": _under("language_model.", _HF_GEMMA),
    "olmo2": (*_HF_OUTSIDE, *_HF_ATTENTION, *_HF_POST_NORMS, *_HF_MLP),
    "phi3": (
        *_HF_OUTSIDE,
        *_HF_PRE_NORMS,
        _row(
            f"{_LAYER}.self_attn.qkv_proj.weight",
            *(f"{_OURS}.attention.{leaf}.weight" for leaf in ("wq", "wk", "wv")),
            transform="rows",
        ),
        _row(f"{_LAYER}.self_attn.o_proj.weight", f"{_OURS}.attention.wo.weight"),
        _row(
            f"{_LAYER}.mlp.gate_up_proj.weight",
            f"{_OURS_FFN}.w_gate.weight",
            f"{_OURS_FFN}.w_value.weight",
            transform="rows",
        ),
        _row(f"{_LAYER}.mlp.down_proj.weight", f"{_OURS_FFN}.w_out.weight"),
    ),
    "llama4_text": _HF_LLAMA4,
    "llama4": (*_under("language_model.", _HF_LLAMA4), *_HF_LLAMA4_VISION),
    "gpt_oss": (
        *_HF_PRE,
        *_with_bias(f"{_GPT_OSS}.router", f"{_OURS_FFN}.router"),
        _row(f"{_GPT_OSS}.experts.gate_up_proj", *_pair("weight"), transform="alternate"),
        _row(f"{_GPT_OSS}.experts.gate_up_proj_bias", *_pair("bias"), transform="alternate"),
        _row(
            f"{_GPT_OSS}.experts.down_proj",
            f"{_OURS_FFN}.experts.w_out.weight",
            transform="transpose",
        ),
        _row(f"{_GPT_OSS}.experts.down_proj_bias", f"{_OURS_FFN}.experts.w_out.bias"),
    ),
    "deepseek_v3": (
        *_HF_OUTSIDE,
        *_HF_LATENT,
        *_HF_PRE_NORMS,
        *_HF_MLP,
        *_HF_QWEN_EXPERTS,
        _row(f"{_LAYER}.mlp.gate.e_score_correction_bias", f"{_OURS_FFN}.router.choice_bias"),
        *_hf_dense(f"{_LAYER}.mlp.shared_experts", f"{_OURS_FFN}.shared_expert"),
    ),
}
# transformers 5 holds the experts of these families in two parameters that no file has, and their
# router under another name; PEFT names what it holds.
HELD_IN_MEMORY = ("mixtral", "qwen3_moe", "deepseek_v3")
IN_MEMORY = (
    _row(f"{_LAYER}.mlp.experts.gate_up_proj", *_pair("weight"), transform="halves"),
    _row(
        f"{_LAYER}.mlp.experts.down_proj",
        f"{_OURS_FFN}.experts.w_out.weight",
        transform="transpose",
    ),
)
ROUTER_IN_MEMORY = _row(f"{_LAYER}.mlp.gate.weight", f"{_OURS_FFN}.router.weight")
# Folders with a params.json, of Meta's code and of Mistral's, whatever family their model is of.
PARAMS_TABLES: dict[str, tuple[Row, ...]] = {
    "params_meta": (*_META, *_LLAMA4_EXPERTS, *_META_VISION),
    "params_mistral": (*_META, *_MISTRAL_EXPERTS),
}

# Other beginnings that the keys of a table have had, and what they are here; the first that fits
# counts.
PREFIXES: dict[str, tuple[tuple[str, str], ...]] = {
    "gemma3": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
}
# Keys of a base model without its head, as `AutoModel` saves it: they lack the prefix `model.`.
_OF_A_BASE = re.compile(r"(language_model\.)?(?=(embed_tokens|layers|norm)\.)")


def known_key(table: str, key: str) -> str:
    """Return the key in a table for `key`, which a file may spell differently."""
    old, new = next((pair for pair in PREFIXES.get(table, ()) if key.startswith(pair[0])), ("", ""))
    key = new + key[len(old) :]
    return (
        _OF_A_BASE.sub(r"\1model.", key, count=1)
        if table in TABLES and _OF_A_BASE.match(key)
        else key
    )


# Regular expressions for keys that are left in the file, and what they are: said in one line when
# they are met.
# `{n}` is the number of layers.
UNREAD: dict[str, tuple[tuple[str, str], ...]] = {
    "": ((r".*\.rotary_emb\.inv_freq", "tables of rotary frequencies, computed here"),),
    "gemma3": (
        (
            r"(vision_tower|multi_modal_projector)\..*",
            "the image encoder, which is not read: text only",
        ),
    ),
    "deepseek_v3": (
        (r"model\.layers\.{n}\..*", "the layer that predicts further tokens, which is not read"),
    ),
    "params_meta": (
        (r"rope\.freqs|freqs_cis", "tables of rotary frequencies, computed here"),
        (r".*\._extra_state", "extra states of a library, which hold no weights"),
        (r".*\.(global_gate_stats_3E|expert_activation_DE)", "statistics of training"),
    ),
    "params_mistral": (
        (r"rope\.freqs", "tables of rotary frequencies, computed here"),
        (
            r"(vision_encoder|vision_language_adapter|patch_merger|pre_mm_projector_norm)\..*",
            "the image encoder, which is not read: text only",
        ),
    ),
}

# Endings of keys that hold nothing a model needs: rotary tables are computed, extra states are a
# library's own.
IGNORED_ENDINGS = ("rope.freqs", "._extra_state")


def moves(table: str, args: ModelArgs, parameters: Collection[str]) -> list[Move]:
    """The rows of a table, of a family or of `PARAMS_TABLES`, expanded: one way to write every
    parameter.
    """
    return expand(PARAMS_TABLES.get(table) or TABLES[table], args, parameters)


def moves_to_read(table: str, args: ModelArgs, parameters: Collection[str]) -> list[Move]:
    """`moves`, and behind them all other ways in which files of this table have spelled the same
    parameters.
    """
    older = expand(OLD_NAMES, args, parameters) if table in PARAMS_TABLES else []
    return moves(table, args, parameters) + older


def expand(rows: Iterable[Row], args: ModelArgs, parameters: Collection[str]) -> list[Move]:
    """Rows for every layer and expert, kept where the model has the parameters."""
    experts = range(args.moe_args.num_experts if args.moe_args else 0)
    layers = {"{i}": args.n_layers, "{v}": args.vision_args.n_layers if args.vision_args else 0}
    out = []
    for row in rows:
        mark = next((mark for mark in layers if mark in row.foreign), "")
        for i in range(layers[mark]) if mark else (0,):
            ours = tuple(name.replace(mark, str(i)) if mark else name for name in row.ours)
            if not all(name in parameters for name in ours):
                continue
            foreign = row.foreign.replace(mark, str(i)) if mark else row.foreign
            each = (
                tuple(foreign.replace("{e}", str(e)) for e in experts)
                if "{e}" in foreign
                else (foreign,)
            )
            out.append(Move(each, ours, row.transform))
    return out
