"""Names of tensors in GGUF files. No torch.

llama.cpp has one name for a tensor in all architectures, and stores gate, value and experts as
separate tensors also where transformers does not. Source: `constants.py` and `tensor_mapping.py` of
the package `gguf`.
"""

from __future__ import annotations

from transom.checkpoints.families.weights import EXPERTS, WeightNames
from transom.names.tables import FEED_FORWARD, LAYER, QKV, pattern, with_bias

_BLOCK, _ATTENTION = "blk.{i}", f"{LAYER}.attention"
_MATRICES = (("gate", "w_gate"), ("up", "w_value"), ("down", "w_out"))
_SHARED = (
    pattern("token_embd.weight", "tok_embeddings.weight"),
    pattern("output_norm.weight", "norm.weight"),
    pattern("output.weight", "output.weight"),
    *with_bias(f"{_BLOCK}.attn_output", f"{_ATTENTION}.wo"),
    pattern(f"{_BLOCK}.attn_q_norm.weight", f"{_ATTENTION}.q_norm.weight"),
    pattern(f"{_BLOCK}.attn_k_norm.weight", f"{_ATTENTION}.k_norm.weight"),
    pattern(f"{_BLOCK}.attn_sinks.weight", f"{_ATTENTION}.sinks"),
    pattern(f"{_BLOCK}.attn_norm.weight", f"{LAYER}.attention_norm.weight"),
    pattern(f"{_BLOCK}.post_attention_norm.weight", f"{LAYER}.attention_post_norm.weight"),
    pattern(f"{_BLOCK}.post_ffw_norm.weight", f"{LAYER}.ffn_post_norm.weight"),
    *with_bias(f"{_BLOCK}.ffn_gate_inp", f"{FEED_FORWARD}.router"),
)
_SPLIT = tuple(
    row for one in "qkv" for row in with_bias(f"{_BLOCK}.attn_{one}", f"{_ATTENTION}.w{one}")
)
_MLP = tuple(
    row
    for theirs, ours in _MATRICES
    for row in (
        *with_bias(f"{_BLOCK}.ffn_{theirs}", f"{FEED_FORWARD}.{ours}"),
        *with_bias(f"{_BLOCK}.ffn_{theirs}_exps", f"{EXPERTS}.{ours}"),
    )
)
_NORM, _LATE_NORM = (
    pattern(f"{_BLOCK}.{theirs}.weight", f"{LAYER}.ffn_norm.weight")
    for theirs in ("ffn_norm", "post_attention_norm")
)
# Mixtral in files of the first months of 2024.
_SINGLE_EXPERTS = tuple(
    pattern(f"{_BLOCK}.ffn_{theirs}.{{e}}.weight", f"{EXPERTS}.{ours}.weight", transform="stack")
    for theirs, ours in _MATRICES
)
_FUSED = (
    pattern(f"{_BLOCK}.attn_qkv.weight", *QKV, transform="rows"),
    pattern(
        f"{_BLOCK}.ffn_up.weight",
        f"{FEED_FORWARD}.w_gate.weight",
        f"{FEED_FORWARD}.w_value.weight",
        transform="rows",
    ),
    pattern(f"{_BLOCK}.ffn_down.weight", f"{FEED_FORWARD}.w_out.weight"),
)
_REST = (*_SHARED, *_SPLIT, *_MLP)
# By architecture, and for all others. The norm before the feed-forward of gpt-oss has the name that
# it has in transformers.
NAMES = {
    "phi3": WeightNames((*_SHARED, _NORM, *_FUSED), also_read=_SPLIT),
    "gpt-oss": WeightNames((*_REST, _LATE_NORM)),
}
GGUF_NAMES = WeightNames((*_REST, _NORM), also_read=_SINGLE_EXPERTS)
