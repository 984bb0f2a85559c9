"""The parts a model is described by, and `LayerArgs`: one block with every shorthand resolved. No
torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from transom.base.errors import require
from transom.base.fields import describe

RopeLayout = Literal["interleaved", "halves"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
# rms: cast, then multiply (Llama); rms_wide: multiply in float32, then cast (OLMo 2, gpt-oss);
# rms_plus_one: the same with 1 + weight (Gemma); layer: LayerNorm with bias.
NormKind = Literal["rms", "rms_wide", "rms_plus_one", "layer"]
NormPlacement = Literal["pre", "post", "both"]


@dataclass(frozen=True)
class LayerRule:
    """Which earlier keys a query of one layer may see: `causal`, `window` or `chunk` of `size`, or
    `full`.
    """

    kind: Literal["causal", "window", "chunk", "full"] = "causal"
    size: int = 0


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for sequences longer than the model was trained on.

    `linear` divides all; `dynamic` raises the base with the length (NTK); `llama3` slows long
    wavelengths, keeps short ones and blends between; `yarn` (arXiv 2309.00071) ramps by index;
    `longrope` (arXiv 2402.13753) has one factor per pair for short and one for long sequences.
    """

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = describe(
        "llama3", "which rule"
    )
    factor: float = describe(8.0, "how much longer than the original context")
    original_max_seq_len: int = describe(8192, "context before scaling", "tokens")
    low_freq_factor: float = describe(
        1.0, "llama3: wavelengths above original / this are stretched fully"
    )
    high_freq_factor: float = describe(4.0, "llama3: wavelengths below original / this are kept")
    beta_fast: float = describe(
        32.0, "yarn: pairs that turn more often than this in the original are kept"
    )
    beta_slow: float = describe(
        1.0, "yarn: pairs that turn less often than this are stretched fully"
    )
    truncate: bool = describe(True, "yarn: the ends of the ramp are whole indices")
    attention_factor: float | None = describe(
        None, "scale of cos and sin; by the rule of the kind when absent"
    )
    mscale: float | None = describe(None, "yarn: DeepSeek's numerator of the attention factor")
    mscale_all_dim: float | None = describe(
        None, "yarn: DeepSeek's denominator of the attention factor"
    )
    short_factor: tuple[float, ...] = describe((), "longrope: divisors up to the original length")
    long_factor: tuple[float, ...] = describe((), "longrope: divisors beyond it")

    def __post_init__(self) -> None:
        for name in ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
            value = getattr(self, name)
            require(value > 0, f"rope_scaling.{name}", value, "expected more than 0")
        high, original = self.high_freq_factor, self.original_max_seq_len
        require(
            high >= self.low_freq_factor,
            "rope_scaling.high_freq_factor",
            high,
            "expected low or more",
        )
        require(original >= 1, "rope_scaling.original_max_seq_len", original, "expected 1 or more")
        positive = self.attention_factor is None or self.attention_factor > 0
        require(
            positive,
            "rope_scaling.attention_factor",
            self.attention_factor,
            "expected more than 0",
        )
        for name, kinds in (("attention_factor", ("yarn", "longrope")), ("mscale", ("yarn",))):
            value = getattr(self, name)
            fits = value is None or self.kind in kinds
            require(
                fits, f"rope_scaling.{name}", value, f"valid only with kind {' or '.join(kinds)}"
            )
        both = (self.mscale is None) == (self.mscale_all_dim is None)
        require(both, "rope_scaling.mscale", self.mscale, "valid only together with mscale_all_dim")
        for name in ("short_factor", "long_factor"):
            value = tuple(getattr(self, name))
            object.__setattr__(self, name, value)  # a list could not be a key
            require(
                min(value, default=1.0) > 0,
                f"rope_scaling.{name}",
                list(value),
                "expected numbers above 0",
            )
            fits = (len(value) > 0) == (self.kind == "longrope")
            expected = "expected one number per rotary pair with kind longrope, and only then"
            require(fits, f"rope_scaling.{name}", list(value), expected)

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long the sequence is."""
        return self.kind in ("dynamic", "longrope")

    def check(self, rotary_dim: int, theta: float) -> None:
        """Refuse a rule that has no value for heads with that many rotary features, or for that
        base.
        """
        kind, original, pairs = self.kind, self.original_max_seq_len, rotary_dim // 2
        require(
            kind != "dynamic" or pairs > 1,
            "rope_scaling.kind",
            kind,
            "valid only with 4 rotary features or more",
        )
        require(kind != "yarn" or theta > 1, "rope_theta", theta, "expected more than 1 with yarn")
        fits = kind != "longrope" or original > 1
        require(
            fits,
            "rope_scaling.original_max_seq_len",
            original,
            "expected 2 or more with longrope",
        )
        for name in ("short_factor", "long_factor") if kind == "longrope" else ():
            count = len(getattr(self, name))
            expected = f"expected one per rotary pair, {pairs}"
            require(count == pairs, f"numbers in rope_scaling.{name}", count, expected)

    def chosen_by(self, length: int) -> int:
        """What of a length the frequencies depend on: sequences with the same number share them."""
        if self.kind == "dynamic":
            return max(length, self.original_max_seq_len)
        return int(self.kind == "longrope" and length > self.original_max_seq_len)


def yarn_mscale(factor: float, mscale: float) -> float:
    """0.1 mscale ln(factor) + 1, YaRN's temperature with DeepSeek's weight."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


@dataclass(frozen=True)
class RopeArgs:
    """Rotary embedding of the first `dim` features of a head; equal values share one table per
    forward.
    """

    dim: int
    theta: float = 10000.0
    layout: RopeLayout = "interleaved"
    scaling: RopeScaling | None = None


@dataclass(frozen=True)
class TemperatureArgs:
    """Llama 4's query scale 1 + attn_scale * ln(1 + floor((position + 1) / floor_scale))."""

    attn_scale: float = 0.1
    floor_scale: float = 8192.0


@dataclass(frozen=True)
class MlaArgs:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one small
    latent.
    """

    kv_lora_rank: int = describe(512, "width of the latent that is cached")
    q_lora_rank: int | None = describe(
        None, "width of the query's latent; none projects queries directly"
    )
    qk_nope_head_dim: int = describe(128, "features per head without rotation")
    qk_rope_head_dim: int = describe(64, "rotary features, one key head shared by all")
    v_head_dim: int = describe(128, "features per value head")
    norm_eps: float = describe(1e-6, "eps of the two inner norms, whatever the model's is")

    def __post_init__(self) -> None:
        for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
            require(
                getattr(self, name) >= 1,
                f"mla_args.{name}",
                getattr(self, name),
                "expected 1 or more",
            )
        rank, rotary = self.q_lora_rank, self.qk_rope_head_dim
        require(
            rank is None or rank >= 1,
            "mla_args.q_lora_rank",
            rank,
            "expected 1 or more, or null",
        )
        require(rotary % 2 == 0, "mla_args.qk_rope_head_dim", rotary, "expected an even number")


@dataclass(frozen=True)
class MoeArgs:
    """Mixture of experts: how many, how tokens choose, how wide each expert is, and how the load is
    balanced.
    """

    num_experts: int = describe(8, "experts per layer")
    top_k: int = describe(2, "experts each token visits")
    routing: Literal["softmax", "sigmoid", "biased_sigmoid"] = describe(
        "softmax",
        "softmax weights the output (Mixtral); sigmoid the input (Llama 4); biased_sigmoid the "
        "output, and a bias that is no part of the weight helps to choose (DeepSeek-V3)",
    )
    normalize: bool = describe(True, "weights of the chosen experts sum to one (not with sigmoid)")
    routed_scale: float = describe(1.0, "biased_sigmoid: factor on the weights")
    num_groups: int = describe(1, "biased_sigmoid: experts are split in as many groups")
    top_groups: int = describe(1, "biased_sigmoid: groups a token may choose from")
    router_bias: bool = describe(False, "the router has a bias (gpt-oss)")
    expert_bias: bool = describe(False, "the experts' linears have biases (gpt-oss)")
    expert_activation: Literal["model", "clamped"] = describe(
        "model",
        "the model's activation, or gpt-oss's clamped (value + 1) * gate * sigmoid(1.702 gate)",
    )
    activation_limit: float = describe(7.0, "clamped: largest gate and value")
    hidden_dim: int | None = describe(
        None, "width of one expert; derived from the model's dim when absent"
    )
    shared_expert: bool = describe(False, "add one expert that every token visits")
    shared_hidden_dim: int | None = describe(
        None, "width of the shared expert; that of the others when absent"
    )
    interleave_moe_layer_step: int = describe(
        1, "every step-th layer is a mixture, the others are dense"
    )
    first_dense_layers: int = describe(0, "this many layers at the bottom are dense")
    dense_layers: tuple[int, ...] = describe((), "indices of further dense layers")
    balance: Literal["mixtral", "switch", "bias", "none"] = describe(
        "mixtral",
        "balancing: Mixtral's or Switch's auxiliary loss, or a bias on the choice moved after "
        "each step",
    )
    balance_scope: Literal["batch", "sequence"] = describe(
        "sequence",
        "batch pools all tokens and layers of a micro-batch, as published; sequence takes each "
        "row alone",
    )
    aux_loss_coef: float = describe(0.01, "weight of the auxiliary loss in training")
    z_loss_coef: float = describe(
        0.0, "weight of the mean squared logsumexp of router logits (ST-MoE)"
    )
    bias_update_rate: float = describe(0.001, "balance bias: how far a step moves an expert's bias")
    expert_capacity: float | None = describe(
        None,
        "training only: an expert takes this times its even share of a row's tokens; absent is "
        "no limit",
    )
    overflow: Literal["drop", "second_choice"] = describe(
        "drop", "a token beyond the capacity skips the expert, or takes the best one with room"
    )
    jitter: float = describe(
        0.0, "training only: router inputs are multiplied by 1 +- this at random"
    )
    ffn_exp: float = describe(4.0, "Llama 4's expansion, used to derive hidden_dim")
    capacity_factor: float = describe(1.0, "Llama 4's divisor minus one, used to derive hidden_dim")
    auto_scale_F: bool = describe(True, "divide the derived hidden_dim by capacity_factor + 1")

    def __post_init__(self) -> None:
        def check(fits: bool, name: str, expected: str) -> None:
            require(fits, f"moe_args.{name}", getattr(self, name), expected)

        for name in ("num_experts", "interleave_moe_layer_step", "num_groups", "top_groups"):
            check(getattr(self, name) >= 1, name, "expected 1 or more")
        for name in ("hidden_dim", "shared_hidden_dim"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, "expected 1 or more")
        for name in (
            "aux_loss_coef",
            "z_loss_coef",
            "bias_update_rate",
            "capacity_factor",
            "first_dense_layers",
        ):
            check(getattr(self, name) >= 0, name, "expected 0 or more")
        for name in ("ffn_exp", "routed_scale", "activation_limit"):
            check(getattr(self, name) > 0, name, "expected more than 0")
        check(0 <= self.jitter < 1, "jitter", "expected at least 0 and less than 1")
        check(
            self.expert_capacity is None or self.expert_capacity > 0,
            "expert_capacity",
            "expected above 0",
        )
        fits = 1 <= self.top_k <= self.num_experts
        check(fits, "top_k", f"expected 1 to num_experts = {self.num_experts}")
        fits = self.num_experts % self.num_groups == 0
        check(fits, "num_groups", f"expected a divisor of num_experts = {self.num_experts}")
        grouped = self.num_groups == 1 or self.routing == "biased_sigmoid"
        check(grouped, "num_groups", "more than 1 is valid only with routing biased_sigmoid")
        chosen = self.num_experts // self.num_groups * self.top_groups
        fits = self.top_groups <= self.num_groups and chosen >= self.top_k
        check(
            fits,
            "top_groups",
            "expected at most num_groups, with at least top_k experts in them",
        )
        # A group's score is the sum of its two best, which one expert does not have.
        check(
            self.num_groups == 1 or self.num_experts // self.num_groups >= 2,
            "num_groups",
            "leaves one each",
        )
        check(
            self.shared_expert or self.shared_hidden_dim is None,
            "shared_hidden_dim",
            "needs shared_expert = true",
        )
        scaled = self.routed_scale == 1.0 or self.routing == "biased_sigmoid"
        check(scaled, "routed_scale", "other than 1 is valid only with routing biased_sigmoid")
        limited = self.activation_limit == 7.0 or self.expert_activation == "clamped"
        check(
            limited, "activation_limit", "other than 7 is valid only with expert_activation clamped"
        )
        check(
            self.overflow == "drop" or self.expert_capacity is not None,
            "overflow",
            "needs expert_capacity",
        )

    @property
    def has_choice_bias(self) -> bool:
        """Whether experts are chosen by score plus a bias that is no part of the weight."""
        return self.routing == "biased_sigmoid" or self.balance == "bias"


@dataclass(frozen=True)
class VisionArgs:
    """The image encoder of early fusion, as in Llama 4: patches, blocks, pixel shuffle, adapter."""

    image_size: int = describe(336, "side of one square tile", "pixels")
    patch_size: int = describe(14, "side of one square patch", "pixels")
    num_channels: int = describe(3, "colours")
    dim: int = describe(1408, "width of the encoder")
    n_layers: int = describe(34, "blocks of the encoder")
    n_heads: int = describe(16, "heads of the encoder")
    hidden_dim: int = describe(5632, "feed-forward width of the encoder")
    norm_eps: float = describe(1e-5, "eps of its layer norms")
    rope_theta: float = describe(10000.0, "base of the two-dimensional rotary wavelengths")
    pixel_shuffle_ratio: float = describe(
        0.5, "side of the patch grid after the shuffle, relative to before"
    )
    adapter_dim: int = describe(4096, "width inside the adapter")
    output_dim: int = describe(4096, "width the adapter hands to the projection")
    image_token: int | None = describe(None, "token id that stands for one image patch in a text")

    def __post_init__(self) -> None:
        def check(fits: bool, name: str, expected: str) -> None:
            require(fits, f"vision_args.{name}", getattr(self, name), expected)

        for name in (
            "image_size",
            "patch_size",
            "num_channels",
            "dim",
            "n_layers",
            "n_heads",
            "hidden_dim",
            "adapter_dim",
            "output_dim",
        ):
            check(getattr(self, name) >= 1, name, "expected 1 or more")
        for name in ("norm_eps", "rope_theta"):
            check(getattr(self, name) > 0, name, "expected more than 0")
        fits = self.image_size % self.patch_size == 0
        check(fits, "image_size", f"expected a multiple of patch_size = {self.patch_size}")
        fits = self.dim % (4 * self.n_heads) == 0
        expected = (
            f"expected a multiple of 4 * n_heads = {4 * self.n_heads}: rotary pairs of two "
            f"axes in each head"
        )
        check(fits, "dim", expected)
        ratio = self.pixel_shuffle_ratio
        fits = (
            0 < ratio <= 1
            and abs(ratio * self.shuffle - 1) < 1e-6
            and self.patch_grid % self.shuffle == 0
        )
        expected = f"expected 1 over a divisor of image_size / patch_size = {self.patch_grid}"
        check(fits, "pixel_shuffle_ratio", expected)
        token = self.image_token
        check(token is None or token >= 0, "image_token", "expected a token id, 0 or more, or null")

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def shuffle(self) -> int:
        """Patches along one side of the squares that the pixel shuffle makes one row of."""
        return round(1 / self.pixel_shuffle_ratio)

    @property
    def patches_per_tile(self) -> int:
        """Rows, and so patch tokens, that one tile becomes."""
        return (self.patch_grid // self.shuffle) ** 2

    @property
    def layers(self) -> tuple[LayerArgs, ...]:
        """The resolved arguments of every encoder block: LayerNorm, biases, all patches see each
        other.
        """
        head_dim = self.dim // self.n_heads
        first = LayerArgs(
            index=0,
            dim=self.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.n_heads,
            head_dim=head_dim,
            hidden_dim=self.hidden_dim,
            norm_eps=self.norm_eps,
            rule=LayerRule("full"),
            rope=RopeArgs(head_dim, self.rope_theta),
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            activation="gelu",
            ffn_gated=False,
            ffn_bias=True,
        )
        return tuple(replace(first, index=index) for index in range(self.n_layers))


@dataclass(frozen=True)
class HeadArgs:
    """What the model puts out instead of next-token logits: a label or an embedding per
    sequence.
    """

    kind: Literal["classification", "embedding"] = describe(
        "classification", "labels or a vector per sequence"
    )
    num_labels: int = describe(2, "classification: number of labels")
    pooling: Literal["mean", "last"] = describe("last", "mean over a row's tokens, or its last one")
    normalize: bool = describe(True, "embedding: scale vectors to length 1")

    def __post_init__(self) -> None:
        require(self.num_labels >= 1, "head.num_labels", self.num_labels, "expected 1 or more")

    @property
    def outputs(self) -> int:
        """Rows of the output matrix; an embedding has none."""
        return self.num_labels if self.kind == "classification" else 0


@dataclass(frozen=True, kw_only=True)
class LayerArgs:
    """Everything one `TransformerBlock` needs to know, with every shorthand resolved."""

    index: int
    dim: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rule: LayerRule
    rope: RopeArgs | None
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
        """Numbers cached per token: keys and values of every kv head, or the latent and its rotary
        key.
        """
        if self.mla is not None:
            return self.mla.kv_lora_rank + self.mla.qk_rope_head_dim
        return 2 * self.n_kv_heads * self.head_dim
