"""The parts that describe a model, and `LayerArgs`: one block with every shorthand worked out.
No torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transom.base.errors import expect
from transom.base.fields import check_bounds, describe

RopeLayout = Literal["interleaved", "halves"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
# rms: cast, then multiply by the weight (Llama); rms_wide: multiply in float32, then cast (OLMo 2,
# gpt-oss); rms_plus_one: the same with 1 + weight (Gemma); layer: LayerNorm with bias.
NormKind = Literal["rms", "rms_wide", "rms_plus_one", "layer"]
NormPlacement = Literal["pre", "post", "both"]


@dataclass(frozen=True)
class LayerRule:
    """Which keys a query of one layer may attend to.

    Attributes:
        kind: `causal` (itself and all earlier keys), `window` (the last `size` of them), `chunk`
            (those in the same chunk of `size` tokens) or `full` (later keys too).
        size: length of the window or chunk in tokens; 0 for the other kinds.
    """

    kind: Literal["causal", "window", "chunk", "full"] = "causal"
    size: int = 0


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than those of training.

    `linear` divides all frequencies. `dynamic` raises the base with the sequence length (NTK).
    `llama3` stretches long wavelengths, keeps short ones and blends between them. `yarn` (arXiv
    2309.00071) blends by index. `longrope` (arXiv 2402.13753) has one factor per rotary pair for
    short sequences and one for long sequences.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = describe(
        "llama3", "kind of scaling"
    )
    factor: float = describe(8.0, "context length after scaling / before", above=0)
    original_max_seq_len: int = describe(
        8192, "context length before scaling", "tokens", at_least=1
    )
    low_freq_factor: float = describe(
        1.0,
        "llama3: wavelengths above original_max_seq_len / this are stretched by the factor",
        above=0,
    )
    high_freq_factor: float = describe(
        4.0, "llama3: wavelengths below original_max_seq_len / this are kept", above=0
    )
    beta_fast: float = describe(
        32.0, "yarn: pairs that turn more often than this in the original context are kept", above=0
    )
    beta_slow: float = describe(
        1.0, "yarn: pairs that turn less often than this are stretched by the factor", above=0
    )
    truncate: bool = describe(True, "yarn: round the ends of the blend to whole indices")
    attention_factor: float | None = describe(
        None, "yarn, longrope: factor on cos and sin; absent means by the rule of the kind", above=0
    )
    mscale: float | None = describe(
        None, "yarn: numerator of DeepSeek's attention factor; absent means off"
    )
    mscale_all_dim: float | None = describe(
        None, "yarn: denominator of it, given together with mscale"
    )
    short_factor: tuple[float, ...] = describe(
        (),
        "longrope: divisors of the frequencies up to the original length, one per rotary pair",
        above=0,
    )
    long_factor: tuple[float, ...] = describe(
        (), "longrope: divisors beyond the original length", above=0
    )

    def __post_init__(self) -> None:
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # a list could not be a key
        check_bounds(self)
        high = self.high_freq_factor
        expect(
            high >= self.low_freq_factor,
            "high_freq_factor",
            high,
            "low_freq_factor or more",
        )
        for name, kinds in (("attention_factor", ("yarn", "longrope")), ("mscale", ("yarn",))):
            value = getattr(self, name)
            fits = value is None or self.kind in kinds
            expect(fits, name, value, f"none unless kind is {' or '.join(kinds)}")
        both = (self.mscale is None) == (self.mscale_all_dim is None)
        expect(both, "mscale", self.mscale, "mscale and mscale_all_dim together, or neither")
        for name in ("short_factor", "long_factor"):
            value = getattr(self, name)
            fits = (len(value) > 0) == (self.kind == "longrope")
            expected = "one number per rotary pair with kind longrope, none with other kinds"
            expect(fits, name, list(value), expected)

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on the sequence length."""
        return self.kind in ("dynamic", "longrope")

    def check(self, rotary_dim: int, theta: float) -> None:
        """Raise `RequestError` if the rule is undefined for `rotary_dim` features per head or
        for the base `theta`.
        """
        kind, original, pairs = self.kind, self.original_max_seq_len, rotary_dim // 2
        fits = kind != "dynamic" or pairs > 1
        expect(fits, "rope_scaling.kind", kind, "another kind, or 4 rotary features or more")
        expect(kind != "yarn" or theta > 1, "rope_theta", theta, "more than 1 with yarn")
        fits = kind != "longrope" or original > 1
        expect(fits, "rope_scaling.original_max_seq_len", original, "2 or more with longrope")
        for name in ("short_factor", "long_factor") if kind == "longrope" else ():
            value = getattr(self, name)
            expected = f"one number per rotary pair, {pairs}"
            expect(len(value) == pairs, f"rope_scaling.{name}", f"{len(value)} numbers", expected)

    def chosen_by(self, length: int) -> int:
        """Return what the frequencies depend on for a sequence length in tokens.

        Sequences with the same result share their frequencies.
        """
        if self.kind == "dynamic":
            return max(length, self.original_max_seq_len)
        return int(self.kind == "longrope" and length > self.original_max_seq_len)


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's temperature with DeepSeek's weight: 0.1 mscale ln(factor) + 1, or 1 for a
    factor up to 1.
    """
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class RopeArgs:
    """Rotary embedding of the first `dim` features of a head. Layers with equal values share
    one table per forward.
    """

    dim: int
    theta: float = 10000.0
    layout: RopeLayout = "interleaved"
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class TemperatureArgs:
    """Llama 4's factor on queries: 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))."""

    attn_scale: float = 0.1
    floor_scale: float = 8192.0


@dataclass(frozen=True)
class MlaArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values come from
    one small latent.
    """

    kv_lora_rank: int = describe(512, "width of the latent, which is cached", at_least=1)
    q_lora_rank: int | None = describe(
        None, "width of the latent of queries; absent means that queries have no latent", at_least=1
    )
    qk_nope_head_dim: int = describe(
        128, "features of a query or key head without rotation", at_least=1
    )
    qk_rope_head_dim: int = describe(
        64, "rotary features of a head; all heads share one rotary key", at_least=1
    )
    v_head_dim: int = describe(128, "features of a value head", at_least=1)
    norm_eps: float = describe(1e-6, "eps of the norms of both latents")

    def __post_init__(self) -> None:
        check_bounds(self)
        rotary = self.qk_rope_head_dim
        expect(rotary % 2 == 0, "qk_rope_head_dim", rotary, "an even number")


@dataclass(frozen=True)
class MoeArgs:
    """A mixture of experts: their number and width, how tokens choose them, and how the load is
    balanced.
    """

    num_experts: int = describe(8, "experts per layer", at_least=1)
    top_k: int = describe(2, "experts that each token visits", at_least=1)
    routing: Literal["softmax", "sigmoid", "biased_sigmoid"] = describe(
        "softmax",
        "softmax weights the output of experts (Mixtral), sigmoid their input (Llama "
        "4); biased_sigmoid weights the "
        "output, and a bias that is not part of the weight acts on the choice (DeepSeek-V3)",
    )
    normalize: bool = describe(
        True, "make the weights of the chosen experts sum to 1 (not with sigmoid)"
    )
    routed_scale: float = describe(1.0, "biased_sigmoid: factor on the weights", above=0)
    num_groups: int = describe(
        1, "biased_sigmoid: groups that the experts are split into", at_least=1
    )
    top_groups: int = describe(1, "biased_sigmoid: groups that a token may choose from", at_least=1)
    router_bias: bool = describe(False, "the router has a bias (gpt-oss)")
    expert_bias: bool = describe(False, "the linear layers of experts have biases (gpt-oss)")
    expert_activation: Literal["model", "clamped"] = describe(
        "model",
        "the activation of the model, or gpt-oss's clamped (value + 1) * gate * "
        "sigmoid(1.702 gate)",
    )
    activation_limit: float = describe(7.0, "clamped: largest gate and value", above=0)
    hidden_dim: int | None = describe(
        None, "width of one expert; absent means by Llama 4's rule from dim", at_least=1
    )
    shared_expert: bool = describe(False, "add one expert that every token visits")
    shared_hidden_dim: int | None = describe(
        None, "width of the shared expert; absent means that of the others", at_least=1
    )
    interleave_moe_layer_step: int = describe(
        1, "every n-th layer has experts, the other layers are dense", at_least=1
    )
    first_dense_layers: int = describe(0, "number of dense layers at the bottom", at_least=0)
    dense_layers: tuple[int, ...] = describe((), "indices of further dense layers")
    balance: Literal["mixtral", "switch", "bias", "none"] = describe(
        "mixtral",
        "how the load is balanced: the auxiliary loss of Mixtral or Switch, or a bias "
        "on the choice that moves after "
        "each step",
    )
    balance_scope: Literal["batch", "sequence"] = describe(
        "sequence",
        "what the auxiliary loss counts over: each row alone, or all tokens and "
        "layers of a micro-batch, as published",
    )
    aux_loss_coef: float = describe(0.01, "weight of the auxiliary loss in training", at_least=0)
    z_loss_coef: float = describe(
        0.0,
        "weight of the mean squared logsumexp of router logits (ST-MoE) in training",
        at_least=0,
    )
    bias_update_rate: float = describe(
        0.001, "balance bias: how far a step moves an expert's bias", at_least=0
    )
    expert_capacity: float | None = describe(
        None,
        "training: tokens that an expert takes, relative to its even share of a row's "
        "tokens; absent means no limit",
        above=0,
    )
    overflow: Literal["drop", "second_choice"] = describe(
        "drop",
        "what a token beyond the capacity does: skip the expert, or visit the best "
        "expert with room",
    )
    jitter: float = describe(
        0.0,
        "training: router inputs are multiplied by a random number in 1 +- this",
        at_least=0,
        below=1,
    )
    ffn_exp: float = describe(4.0, "Llama 4's rule for hidden_dim: expansion of dim", above=0)
    capacity_factor: float = describe(
        1.0, "Llama 4's rule for hidden_dim: divisor minus 1", at_least=0
    )
    auto_scale_F: bool = describe(
        True, "Llama 4's rule for hidden_dim: divide by capacity_factor + 1"
    )

    def __post_init__(self) -> None:
        def check(fits: bool, name: str, expected: str) -> None:
            expect(fits, name, getattr(self, name), expected)

        check_bounds(self)
        check(self.top_k <= self.num_experts, "top_k", f"at most num_experts = {self.num_experts}")
        size, rest = divmod(self.num_experts, self.num_groups)
        check(rest == 0, "num_groups", f"a divisor of num_experts = {self.num_experts}")
        biased = self.routing == "biased_sigmoid"
        check(biased or self.num_groups == 1, "num_groups", "1 unless routing is biased_sigmoid")
        fits = self.top_groups <= self.num_groups and size * self.top_groups >= self.top_k
        check(
            fits,
            "top_groups",
            f"at most num_groups = {self.num_groups}, with top_k experts or more in them",
        )
        # The score of a group is the sum of its two best experts.
        check(self.num_groups == 1 or size >= 2, "num_groups", "2 experts or more in each group")
        fits = self.shared_expert or self.shared_hidden_dim is None
        check(fits, "shared_hidden_dim", "null unless shared_expert is true")
        check(
            biased or self.routed_scale == 1.0, "routed_scale", "1 unless routing is biased_sigmoid"
        )
        fits = self.expert_activation == "clamped" or self.activation_limit == 7.0
        check(fits, "activation_limit", "7 unless expert_activation is clamped")
        fits = self.overflow == "drop" or self.expert_capacity is not None
        check(fits, "overflow", "drop unless expert_capacity is given")

    @property
    def has_choice_bias(self) -> bool:
        """Whether experts are chosen by score plus a bias that is not part of the weight."""
        return self.routing == "biased_sigmoid" or self.balance == "bias"


@dataclass(frozen=True)
class HeadArgs:
    """The output of a model that does not predict tokens: a label or an embedding per sequence."""

    kind: Literal["classification", "embedding"] = describe(
        "classification", "labels, or one vector per sequence"
    )
    num_labels: int = describe(2, "classification: number of labels", at_least=1)
    pooling: Literal["mean", "last"] = describe(
        "last", "mean over the tokens of a row, or its last token"
    )
    normalize: bool = describe(True, "embedding: scale vectors to length 1")

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def outputs(self) -> int:
        """Rows of the output matrix; an embedding has none."""
        return self.num_labels if self.kind == "classification" else 0


# The head of a base model, whose files have no output matrix: vectors as the last norm leaves them.
BASE_HEAD = HeadArgs(kind="embedding", pooling="mean", normalize=False)


@dataclass(frozen=True, kw_only=True)
class LayerArgs:
    """The arguments of one `TransformerBlock`, with every shorthand of `ModelArgs` worked out.
    It is never stored.
    """

    index: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rule: LayerRule
    rope: RopeArgs | None  # None: no positions (NoPE)
    use_qk_norm: bool = False
    temperature: TemperatureArgs | None = None
    moe: MoeArgs | None = None
    norm: NormKind = "rms"
    norm_placement: NormPlacement = "pre"
    qk_norm: Literal["none", "head", "projection"] = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    softmax_scale: float | None = None
    attn_softcap: float | None = None
    attn_sinks: bool = False
    mla: MlaArgs | None = None
    context_dim: int | None = None
    activation: Activation = "silu"
    ffn_gated: bool = True
    ffn_bias: bool = False

    @property
    def kv_values_per_token(self) -> int:
        """Numbers cached per token: keys and values of every kv head, or the latent and its
        rotary key.
        """
        if self.mla is not None:
            return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        return 2 * self.n_kv_heads * self.head_dim
