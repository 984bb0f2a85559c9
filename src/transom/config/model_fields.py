"""The fields of a model: what a person writes in a config. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transom.base.fields import check_bounds, describe
from transom.config.layer_args import (
    Activation,
    HeadArgs,
    MlaArgs,
    MoeArgs,
    NormKind,
    NormPlacement,
    RopeLayout,
    RopeScaling,
)
from transom.config.vision_args import VisionArgs


@dataclass(frozen=True, kw_only=True)
class ModelFields:
    """The fields of `ModelArgs`, with their meaning, defaults and bounds."""

    dim: int = describe(512, "width of the residual stream", at_least=1)
    n_layers: int = describe(8, "number of blocks", at_least=1)
    n_heads: int = describe(8, "query heads", at_least=1)
    n_kv_heads: int | None = describe(
        None, "key/value heads; absent means n_heads (MHA), 1 is MQA", at_least=1
    )
    head_dim: int | None = describe(
        None, "features per head; absent means dim / n_heads", at_least=1
    )
    hidden_dim: int | None = describe(
        None, "feed-forward width; absent means 8/3 dim, scaled and rounded up (Llama)", at_least=1
    )
    multiple_of: int = describe(
        256,
        "without hidden_dim: the feed-forward width is rounded up to a multiple of this",
        at_least=1,
    )
    ffn_dim_multiplier: float | None = describe(
        None, "without hidden_dim: factor on the feed-forward width; absent means 1", above=0
    )
    vocab_size: int = describe(
        32000, "tokens in the vocabulary; a run takes it from its tokenizer", at_least=1
    )
    max_seq_len: int = describe(
        2048, "longest sequence that the model is meant for", "tokens", at_least=1
    )
    max_batch_size: int = describe(
        1, "rows of a KV cache that is made without a batch size", at_least=1
    )
    norm_eps: float = describe(1e-5, "added to the mean square in every norm", above=0)
    rope_theta: float = describe(10000.0, "base of the rotary wavelengths", above=0)
    rope_layout: RopeLayout = describe(
        "interleaved",
        "how weights pair rotary features: interleaved (Meta) or halves (Hugging Face)",
    )
    rope_local_theta: float | None = describe(
        None,
        "base in window and chunk layers, which are then not scaled (Gemma 3); absent "
        "means rope_theta",
        above=0,
    )
    rotary_fraction: float = describe(
        1.0, "share of a head's features that rotate, counted from the first", above=0, at_most=1
    )
    rope_scaling: RopeScaling | None = describe(
        None, "how rotary frequencies are stretched for long sequences; absent means not at all"
    )
    use_scaled_rope: bool = describe(
        False, "shorthand of Meta's code for rope_scaling of kind llama3"
    )
    rope_scaling_factor: float = describe(
        8.0, "use_scaled_rope: factor by which the longest wavelengths are stretched", above=0
    )
    rope_low_freq_factor: float = describe(
        1.0,
        "use_scaled_rope: wavelengths above the original length / this are stretched by the factor",
        above=0,
    )
    rope_high_freq_factor: float = describe(
        4.0, "use_scaled_rope: wavelengths below the original length / this are kept", above=0
    )
    rope_original_max_seq_len: int = describe(
        8192, "use_scaled_rope: context length before scaling", "tokens", at_least=1
    )
    sliding_window: int | None = describe(
        None,
        "keys that a query of a window layer attends to, its own included",
        "tokens",
        at_least=1,
    )
    attention_chunk_size: int | None = describe(
        None, "length of the chunks that attention of chunk layers stays in", "tokens", at_least=1
    )
    nope_layer_interval: int | None = describe(
        None, "every n-th layer has no positions (NoPE) and attends to all earlier keys", at_least=1
    )
    layer_pattern: str | tuple[str, ...] | None = describe(
        None,
        "text of letters that is tiled over the layers, or a list of one letter per "
        "layer: F causal, S window, "
        "C chunk, B both directions; lower case letters have no positions (NoPE)",
    )
    use_qk_norm: bool = describe(
        False, "normalise queries and keys after rotation, without weights (Llama 4)"
    )
    qk_norm: Literal["none", "head", "projection"] = describe(
        "none",
        "learned norm of queries and keys before rotation, over each head (Qwen 3) or "
        "all heads (OLMo 2)",
    )
    qkv_bias: bool = describe(False, "wq, wk and wv have biases")
    out_bias: bool = describe(False, "wo has a bias")
    softmax_scale: float | None = describe(
        None, "factor on query-key products; absent means head_dim ** -0.5", above=0
    )
    attn_softcap: float | None = describe(
        None, "cap of scores: cap * tanh(score / cap) (Gemma 2); absent means none", above=0
    )
    attn_sinks: bool = describe(
        False, "one learned logit per head takes part in the softmax and has no value (gpt-oss)"
    )
    mla_args: MlaArgs | None = describe(
        None, "multi-head latent attention; absent means ordinary attention"
    )
    context_dim: int | None = describe(
        None,
        "width of a context that every block attends to; absent means no cross-attention",
        at_least=1,
    )
    attn_temperature_tuning: bool = describe(
        False, "scale queries of NoPE layers by their position (Llama 4)"
    )
    floor_scale: float = describe(
        8192.0, "attn_temperature_tuning: length of one step", "tokens", above=0
    )
    attn_scale: float = describe(
        0.1, "attn_temperature_tuning: factor on the logarithm of the step"
    )
    norm: NormKind = describe(
        "rms", "kind of norm: rms, rms_wide or rms_plus_one (how the weight is applied), or layer"
    )
    norm_placement: NormPlacement = describe(
        "pre", "norms before a sublayer (pre), after it (post) or both"
    )
    activation: Activation = describe("silu", "activation of the feed-forward")
    ffn_gated: bool = describe(
        True, "the feed-forward has a gate (SwiGLU); false means one product and activation"
    )
    ffn_bias: bool = describe(False, "the linear layers of the feed-forward have biases")
    embedding_scale: float | None = describe(
        None, "factor on token embeddings, rounded to their dtype (Gemma); absent means 1", above=0
    )
    logit_scale: float | None = describe(None, "factor on the logits; absent means 1", above=0)
    logit_softcap: float | None = describe(
        None, "cap of logits: cap * tanh(logit / cap) (Gemma 2); absent means none", above=0
    )
    mup_base_dim: int | None = describe(
        None,
        "muP: dim at which the learning rate was chosen (widen by heads, not by "
        "head_dim); absent means off",
        at_least=1,
    )
    tie_embeddings: bool = describe(False, "the output matrix is that of the token embeddings")
    moe_args: MoeArgs | None = describe(None, "mixture of experts; absent means dense layers")
    vision_args: VisionArgs | None = describe(None, "image encoder; absent means text only")
    head: HeadArgs | None = describe(
        None, "output in place of next-token logits; absent means a language model"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
