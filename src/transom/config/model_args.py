"""Model arguments: what a model is, as frozen plain data.

`ModelArgs` holds what a person writes; `ModelArgs.layers` expands it once into one `LayerArgs` per
layer, which is all that the modules read. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transom.base.errors import RequestError, require
from transom.base.fields import describe, read, write
from transom.config.layer_args import (
    Activation,
    HeadArgs,
    LayerArgs,
    LayerRule,
    MlaArgs,
    MoeArgs,
    NormKind,
    NormPlacement,
    RopeArgs,
    RopeLayout,
    RopeScaling,
    TemperatureArgs,
    VisionArgs,
)

# Upper case has rotary positions, the same letter in lower case has none (NoPE).
PATTERN_LETTERS: dict[str, Literal["causal", "window", "chunk", "full"]] = {
    "F": "causal",
    "S": "window",
    "C": "chunk",
    "B": "full",
}


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A decoder-only Transformer as plain data; an impossible value is a `RequestError` naming the
    field.
    """

    dim: int = describe(512, "width of the residual stream")
    n_layers: int = describe(8, "number of blocks")
    n_heads: int = describe(8, "query heads")
    n_kv_heads: int | None = describe(None, "key/value heads; n_heads when absent, 1 is MQA")
    head_dim: int | None = describe(None, "features per head; dim / n_heads when absent")
    hidden_dim: int | None = describe(None, "feed-forward width; by the Llama rule when absent")
    multiple_of: int = describe(
        256, "the derived feed-forward width is rounded up to a multiple of this"
    )
    ffn_dim_multiplier: float | None = describe(None, "scales the derived feed-forward width")
    vocab_size: int = describe(32000, "tokens in the vocabulary; a run takes it from its tokenizer")
    max_seq_len: int = describe(2048, "longest sequence the model is meant for", "tokens")
    max_batch_size: int = describe(1, "rows of a cache when no batch size is given")
    norm_eps: float = describe(1e-5, "added to the mean square inside every norm")
    rope_theta: float = describe(10000.0, "base of the rotary wavelengths")
    rope_layout: RopeLayout = describe(
        "interleaved", "how weights pair rotary features: Meta's or HF's way"
    )
    rope_local_theta: float | None = describe(
        None,
        "base in window and chunk layers, which are then not scaled (Gemma 3); rope_theta when "
        "absent",
    )
    rotary_fraction: float = describe(1.0, "share of a head's features that rotate, from the first")
    rope_scaling: RopeScaling | None = describe(
        None, "how rotary frequencies are stretched for long sequences"
    )
    use_scaled_rope: bool = describe(False, "Meta's shorthand for rope_scaling of kind llama3")
    rope_scaling_factor: float = describe(8.0, "how much the longest wavelengths are stretched")
    rope_low_freq_factor: float = describe(
        1.0, "wavelengths above original / this are stretched fully"
    )
    rope_high_freq_factor: float = describe(4.0, "wavelengths below original / this are kept")
    rope_original_max_seq_len: int = describe(8192, "context before scaling", "tokens")
    sliding_window: int | None = describe(
        None, "keys a window layer sees, itself included", "tokens"
    )
    attention_chunk_size: int | None = describe(
        None, "length of the chunks that chunk layers stay in", "tokens"
    )
    nope_layer_interval: int | None = describe(
        None, "every n-th layer has no positions and sees all before it"
    )
    layer_pattern: str | tuple[str, ...] | None = describe(
        None,
        "letters tiled over the layers: F causal, S window, C chunk, B both ways; small letters "
        "are NoPE",
    )
    use_qk_norm: bool = describe(
        False, "normalise queries and keys after rotation, without weights (Llama 4)"
    )
    qk_norm: Literal["none", "head", "projection"] = describe(
        "none",
        "learned norm of queries and keys before rotation: of each head (Qwen 3) or of all at "
        "once (OLMo 2)",
    )
    qkv_bias: bool = describe(False, "wq, wk and wv have biases")
    out_bias: bool = describe(False, "wo has a bias")
    softmax_scale: float | None = describe(
        None, "factor on query-key products; head_dim ** -0.5 when absent"
    )
    attn_softcap: float | None = describe(
        None, "scores go through cap * tanh(score / cap) (Gemma 2)"
    )
    attn_sinks: bool = describe(
        False, "one learned logit per head that takes attention and gives none (gpt-oss)"
    )
    mla_args: MlaArgs | None = describe(
        None, "multi-head latent attention; absent is ordinary attention"
    )
    context_dim: int | None = describe(
        None, "every block also attends to a context of this width; absent is none"
    )
    attn_temperature_tuning: bool = describe(
        False, "scale queries of NoPE layers by their position"
    )
    floor_scale: float = describe(8192.0, "positions per step of the temperature", "tokens")
    attn_scale: float = describe(0.1, "strength of the temperature")
    norm: NormKind = describe(
        "rms", "rms, rms_wide, rms_plus_one (how the weight is applied) or layer"
    )
    norm_placement: NormPlacement = describe(
        "pre", "norms before, behind (post) or on both sides of a sublayer"
    )
    activation: Activation = describe("silu", "of the feed-forward: silu, gelu, gelu_tanh or relu")
    ffn_gated: bool = describe(
        True, "feed-forward multiplies a gate (SwiGLU); else activation of one product"
    )
    ffn_bias: bool = describe(False, "the feed-forward's linears have biases")
    embedding_scale: float | None = describe(
        None, "factor on token embeddings, rounded to their dtype (Gemma)"
    )
    logit_scale: float | None = describe(None, "factor on the logits")
    logit_softcap: float | None = describe(
        None, "logits go through cap * tanh(logit / cap) (Gemma 2)"
    )
    mup_base_dim: int | None = describe(
        None,
        "muP: width at which learning rates were chosen (widen by heads, not head_dim); absent "
        "is off",
    )
    tie_embeddings: bool = describe(False, "output shares the weights of the token embeddings")
    moe_args: MoeArgs | None = describe(None, "mixture of experts; absent is dense")
    vision_args: VisionArgs | None = describe(None, "image encoder; absent is text only")
    head: HeadArgs | None = describe(
        None, "what comes out instead of next-token logits; absent is a language model"
    )

    def __post_init__(self) -> None:
        for name in (
            "dim",
            "n_layers",
            "n_heads",
            "vocab_size",
            "max_seq_len",
            "max_batch_size",
            "multiple_of",
        ):
            require(getattr(self, name) >= 1, name, getattr(self, name), "expected 1 or more")
        for name in (
            "n_kv_heads",
            "head_dim",
            "hidden_dim",
            "sliding_window",
            "attention_chunk_size",
            "context_dim",
            "mup_base_dim",
        ):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "expected 1 or more, or null")
        for name in (
            "norm_eps",
            "rope_theta",
            "floor_scale",
            "rope_scaling_factor",
            "rope_low_freq_factor",
        ):
            require(getattr(self, name) > 0, name, getattr(self, name), "expected more than 0")
        for name in (
            "ffn_dim_multiplier",
            "rope_local_theta",
            "softmax_scale",
            "attn_softcap",
            "embedding_scale",
            "logit_scale",
            "logit_softcap",
        ):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "expected more than 0, or null")
        self._check_heads()
        self._check_rope()
        self._check_pattern()
        self._check_parts()

    def _check_heads(self) -> None:
        if self.head_dim is None and self.mla_args is None:
            fits = self.dim % self.n_heads == 0
            expected = f"expected a divisor of dim = {self.dim}, or an explicit head_dim"
            require(fits, "n_heads", self.n_heads, expected)
        fits = self.n_heads % self.kv_heads == 0
        require(
            fits, "n_kv_heads", self.kv_heads, f"expected a divisor of n_heads = {self.n_heads}"
        )
        if self.mla_args is None:
            expected = "expected an even number, since rotary features turn in pairs"
            require(self.head_size % 2 == 0, "head_dim", self.head_size, expected)
            return
        for name, plain in (
            ("n_kv_heads", None),
            ("head_dim", None),
            ("qk_norm", "none"),
            ("attn_sinks", False),
        ):
            value = getattr(self, name)
            fits = value == plain or (name == "n_kv_heads" and value == self.n_heads)
            expected = (
                f"with mla_args expected {plain!r}: all heads share one latent, which has its "
                f"own norms"
            )
            require(fits, name, value, expected)
        expected = "with mla_args expected false: only a part of each head rotates"
        require(not self.use_qk_norm, "use_qk_norm", self.use_qk_norm, expected)
        expected = "with mla_args expected 1: qk_rope_head_dim says what rotates"
        require(self.rotary_fraction == 1.0, "rotary_fraction", self.rotary_fraction, expected)

    def _check_rope(self) -> None:
        high = self.rope_high_freq_factor
        require(
            high >= self.rope_low_freq_factor,
            "rope_high_freq_factor",
            high,
            "expected low or more",
        )
        original = self.rope_original_max_seq_len
        require(original >= 1, "rope_original_max_seq_len", original, "expected 1 or more")
        share, scaling = self.rotary_fraction, self.rope_scaling
        fits = 0 < share <= 1 and self.rotary_dim >= 2 and self.rotary_dim % 2 == 0
        require(
            fits,
            "rotary_fraction",
            share,
            f"accepted leaves an even part of head_dim = {self.head_size}",
        )
        if not self.use_scaled_rope:
            for name in ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor"):
                value, plain = getattr(self, name), type(self).__dataclass_fields__[name].default
                require(value == plain, name, value, "valid only with use_scaled_rope = true")
        both = scaling is not None and self.use_scaled_rope
        require(
            not both,
            "use_scaled_rope",
            self.use_scaled_rope,
            "rope_scaling says the same; give one of them",
        )
        if scaling is not None:
            scaling.check(self.rotary_dim, self.rope_theta)

    def _check_parts(self) -> None:
        if self.vision_args is not None and self.vision_args.image_token is not None:
            fits = 0 <= self.vision_args.image_token < self.vocab_size
            expected = f"expected a token below vocab_size = {self.vocab_size}"
            require(fits, "vision_args.image_token", self.vision_args.image_token, expected)
        tuned, letters = self.attn_temperature_tuning, self.pattern
        fits = not tuned or not letters.isupper()
        require(
            fits, "attn_temperature_tuning", tuned, "valid only with NoPE layers, and there is none"
        )
        both = self.use_qk_norm and self.qk_norm != "none"
        require(not both, "qk_norm", self.qk_norm, "use_qk_norm already normalises, after rotation")
        local = self.rope_local_theta
        fits = local is None or bool({"S", "C"} & set(letters))
        require(
            fits,
            "rope_local_theta",
            local,
            "valid only with window or chunk layers, and there is none",
        )
        moe, head = self.moe_args, self.head
        if head is not None:
            for name in ("logit_scale", "logit_softcap"):
                value = getattr(self, name)
                require(
                    value is None,
                    name,
                    value,
                    "expected null with a head, which has no such logits",
                )
        if moe is not None:
            fits = any(self._moe(index) is not None for index in range(self.n_layers))
            require(fits, "moe_args", "no layer", "accepted leaves a layer that is a mixture")
            fits = all(0 <= index < self.n_layers for index in moe.dense_layers)
            expected = f"expected indices below n_layers = {self.n_layers}"
            require(fits, "moe_args.dense_layers", list(moe.dense_layers), expected)
            fits = self.ffn_gated or moe.expert_activation == "model"
            require(
                fits,
                "moe_args.expert_activation",
                moe.expert_activation,
                "clamped is valid only with ffn_gated",
            )
        fits = head is None or not self.tie_embeddings
        require(
            fits,
            "tie_embeddings",
            self.tie_embeddings,
            "expected false with a head: it has no vocabulary",
        )

    def _check_pattern(self) -> None:
        interval = self.nope_layer_interval
        require(
            interval is None or interval >= 1,
            "nope_layer_interval",
            interval,
            "expected 1 or more, or null",
        )
        pattern = self.layer_pattern
        if pattern is None:
            both = self.sliding_window is not None and self.attention_chunk_size is not None
            expected = (
                "valid only together with sliding_window only when layer_pattern says which layer "
                "has which"
            )
            require(not both, "attention_chunk_size", self.attention_chunk_size, expected)
            return
        require(
            interval is None,
            "nope_layer_interval",
            interval,
            "layer_pattern says it with small letters",
        )
        require(
            len(pattern) > 0,
            "layer_pattern",
            pattern,
            "expected one letter per layer or a tiling",
        )
        for letter in pattern:
            if letter.upper() not in PATTERN_LETTERS:
                known = ", ".join(PATTERN_LETTERS)
                raise RequestError(
                    f"layer_pattern has {letter!r}: expected {known} or a small one for NoPE"
                )
        if isinstance(pattern, str):
            fits, expected = (
                len(pattern) <= self.n_layers,
                f"a tiling has at most n_layers = {self.n_layers} letters",
            )
        else:
            fits, expected = (
                len(pattern) == self.n_layers,
                f"a list has one letter per layer ({self.n_layers})",
            )
        require(
            fits, "layer_pattern", pattern if isinstance(pattern, str) else list(pattern), expected
        )
        used = {letter.upper() for letter in self.pattern}
        for letter, field in (("S", "sliding_window"), ("C", "attention_chunk_size")):
            size = getattr(self, field)
            require(
                letter not in used or size is not None,
                field,
                size,
                f"layer_pattern has {letter} layers",
            )
            require(
                letter in used or size is None, field, size, f"layer_pattern has no {letter} layer"
            )

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Features per query head, resolved."""
        if self.mla_args is not None:
            return self.mla_args.qk_nope_head_dim + self.mla_args.qk_rope_head_dim
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def logit_factor(self) -> float:
        """What raw logits are multiplied by: `logit_scale`, and muP's base width over width."""
        width = 1.0 if self.mup_base_dim is None else self.mup_base_dim / self.dim
        return width * (1.0 if self.logit_scale is None else self.logit_scale)

    @property
    def rotary_dim(self) -> int:
        """Features per head that rotate."""
        if self.mla_args is not None:
            return self.mla_args.qk_rope_head_dim
        return int(self.head_size * self.rotary_fraction)

    @property
    def pattern(self) -> str:
        """One letter of `PATTERN_LETTERS` per layer."""
        if self.layer_pattern is not None:
            letters = "".join(self.layer_pattern)
            return (letters * -(-self.n_layers // len(letters)))[: self.n_layers]
        local = "S" if self.sliding_window else "C" if self.attention_chunk_size else "F"
        interval = self.nope_layer_interval
        return "".join(
            "f" if interval and (i + 1) % interval == 0 else local for i in range(self.n_layers)
        )

    @property
    def dense_hidden_dim(self) -> int:
        """Feed-forward width of dense layers (meta llama3/model.py): 8/3 dim, scaled, rounded
        up.
        """
        if self.hidden_dim is not None:
            return self.hidden_dim
        return self._derive_hidden(int(2 * (4 * self.dim) / 3), divisor=None)

    def _derive_hidden(self, hidden: int, divisor: float | None) -> int:
        if self.ffn_dim_multiplier is not None:
            hidden = int(self.ffn_dim_multiplier * hidden)
        if divisor is not None:
            hidden = int(hidden / divisor)
        return self.multiple_of * -(-hidden // self.multiple_of)

    @functools.cached_property
    def layers(self) -> tuple[LayerArgs, ...]:
        """The resolved arguments of every layer; never stored in files."""
        return tuple(self._layer(index, letter) for index, letter in enumerate(self.pattern))

    def _layer(self, index: int, letter: str) -> LayerArgs:
        kind = PATTERN_LETTERS[letter.upper()]
        size = {"window": self.sliding_window, "chunk": self.attention_chunk_size}.get(kind) or 0
        nope = letter.islower()
        tuned = nope and self.attn_temperature_tuning
        return LayerArgs(
            index=index,
            dim=self.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            hidden_dim=self.dense_hidden_dim,
            norm_eps=self.norm_eps,
            rule=LayerRule(kind, size),
            rope=None if nope else self._ropes[size > 0],
            use_qk_norm=self.use_qk_norm and not nope,
            temperature=TemperatureArgs(self.attn_scale, self.floor_scale) if tuned else None,
            moe=self._moe(index),
            norm=self.norm,
            norm_placement=self.norm_placement,
            qk_norm=self.qk_norm,
            qkv_bias=self.qkv_bias,
            out_bias=self.out_bias,
            softmax_scale=self.softmax_scale,
            attn_softcap=self.attn_softcap,
            attn_sinks=self.attn_sinks,
            mla=self.mla_args,
            context_dim=self.context_dim,
            activation=self.activation,
            ffn_gated=self.ffn_gated,
            ffn_bias=self.ffn_bias,
        )

    @functools.cached_property
    def _ropes(self) -> tuple[RopeArgs, RopeArgs]:
        """Of layers that see everything, and of local ones; shared, since torch.compile guards by
        identity.
        """
        whole = RopeArgs(self.rotary_dim, self.rope_theta, self.rope_layout, self.scaling)
        local = self.rope_local_theta
        return whole, whole if local is None else RopeArgs(self.rotary_dim, local, self.rope_layout)

    @property
    def scaling(self) -> RopeScaling | None:
        """The scaling of rotary frequencies, Meta's shorthand resolved."""
        if not self.use_scaled_rope:
            return self.rope_scaling
        return RopeScaling(
            kind="llama3",
            factor=self.rope_scaling_factor,
            original_max_seq_len=self.rope_original_max_seq_len,
            low_freq_factor=self.rope_low_freq_factor,
            high_freq_factor=self.rope_high_freq_factor,
        )

    def _moe(self, index: int) -> MoeArgs | None:
        moe = self.moe_args
        if moe is None or index < moe.first_dense_layers or index in moe.dense_layers:
            return None
        if (index + 1) % moe.interleave_moe_layer_step != 0:
            return None
        if moe.hidden_dim is not None:
            return moe
        # meta llama4: int(ffn_exp * dim), two thirds, multiplier, then divided by capacity_factor +
        # 1
        divisor = moe.capacity_factor + 1 if moe.auto_scale_F else None
        return replace(
            moe, hidden_dim=self._derive_hidden(int(2 * int(moe.ffn_exp * self.dim) / 3), divisor)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelArgs:
        """Strict: an unknown key or a wrong type is a `RequestError` that suggests the nearest
        key.
        """
        return read(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Every field as given, shorthands unexpanded; `from_dict` takes it back."""
        data = write(self)
        assert isinstance(data, dict)
        return data

    @classmethod
    def from_json(cls, text: str) -> ModelArgs:
        """Read what `to_json` wrote."""
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise RequestError(f"model arguments: not JSON ({error})") from None

    def to_json(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)
