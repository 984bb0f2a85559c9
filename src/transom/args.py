"""Model arguments: what a model is, as frozen plain data.

`ModelArgs` holds what a person writes; `ModelArgs.layers` expands it once into one `LayerArgs` per layer,
which is all that the modules read. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from transom.errors import RequestError, require
from transom.fields import describe, read, write

RopeLayout = Literal["interleaved", "halves"]


@dataclass(frozen=True)
class LayerRule:
    """Which earlier keys a query of one layer may see: `causal`, `window` or `chunk` of `size`, or `full`."""

    kind: Literal["causal", "window", "chunk", "full"] = "causal"
    size: int = 0


@dataclass(frozen=True)
class RopeScaling:
    """The Llama 3 rule: long wavelengths are slowed by `factor`, short ones kept, the rest blended."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192


@dataclass(frozen=True)
class RopeArgs:
    """Rotary embedding of `dim` features per head; equal values share one table per forward."""

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
class MoeArgs:
    """Mixture of experts: how many, how tokens choose, and how wide each expert is."""

    num_experts: int = describe(8, "experts per layer")
    top_k: int = describe(2, "experts each token visits")
    routing: Literal["softmax", "sigmoid"] = describe(
        "softmax", "softmax weights the experts' output (Mixtral); sigmoid their input (Llama 4)"
    )
    normalize: bool = describe(True, "softmax weights of the chosen experts sum to one")
    hidden_dim: int | None = describe(None, "width of one expert; derived from the model's dim when absent")
    shared_expert: bool = describe(False, "add one expert that every token visits")
    interleave_moe_layer_step: int = describe(1, "every step-th layer is a mixture, the others are dense")
    aux_loss_coef: float = describe(0.01, "weight of the balancing loss in training")
    ffn_exp: float = describe(4.0, "Llama 4's expansion, used to derive hidden_dim")
    capacity_factor: float = describe(1.0, "Llama 4's divisor minus one, used to derive hidden_dim")
    auto_scale_F: bool = describe(True, "divide the derived hidden_dim by capacity_factor + 1")

    def __post_init__(self) -> None:
        require(self.num_experts >= 1, "moe_args.num_experts", self.num_experts, "accepted is 1 or more")
        fits = 1 <= self.top_k <= self.num_experts
        require(fits, "moe_args.top_k", self.top_k, f"accepted is 1 to num_experts = {self.num_experts}")
        step = self.interleave_moe_layer_step
        require(step >= 1, "moe_args.interleave_moe_layer_step", step, "accepted is 1 or more")
        if self.hidden_dim is not None:
            require(self.hidden_dim >= 1, "moe_args.hidden_dim", self.hidden_dim, "accepted is 1 or more")
        require(self.aux_loss_coef >= 0, "moe_args.aux_loss_coef", self.aux_loss_coef, "accepted is 0 or more")
        require(self.ffn_exp > 0, "moe_args.ffn_exp", self.ffn_exp, "accepted is more than 0")
        capacity = self.capacity_factor
        require(capacity >= 0, "moe_args.capacity_factor", capacity, "accepted is 0 or more")


@dataclass(frozen=True)
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
    use_qk_norm: bool
    temperature: TemperatureArgs | None
    moe: MoeArgs | None

    @property
    def kv_values_per_token(self) -> int:
        """Numbers cached per token: keys and values of every kv head."""
        return 2 * self.n_kv_heads * self.head_dim


# Upper case has rotary positions, the same letter in lower case has none (NoPE).
PATTERN_LETTERS: dict[str, Literal["causal", "window", "chunk", "full"]] = {
    "F": "causal",
    "S": "window",
    "C": "chunk",
    "B": "full",
}


@dataclass(frozen=True, kw_only=True)
class ModelArgs:
    """A decoder-only Transformer as plain data; an impossible value is a `RequestError` naming the field."""

    dim: int = describe(512, "width of the residual stream")
    n_layers: int = describe(8, "number of blocks")
    n_heads: int = describe(8, "query heads")
    n_kv_heads: int | None = describe(None, "key/value heads; n_heads when absent, 1 is MQA")
    head_dim: int | None = describe(None, "features per head; dim / n_heads when absent")
    hidden_dim: int | None = describe(None, "feed-forward width; by the Llama rule when absent")
    multiple_of: int = describe(256, "the derived feed-forward width is rounded up to a multiple of this")
    ffn_dim_multiplier: float | None = describe(None, "scales the derived feed-forward width")
    vocab_size: int = describe(32000, "tokens in the vocabulary; a run takes it from its tokenizer")
    max_seq_len: int = describe(2048, "longest sequence the model is meant for", "tokens")
    max_batch_size: int = describe(1, "rows of a cache when no batch size is given")
    norm_eps: float = describe(1e-5, "added to the mean square inside every norm")
    rope_theta: float = describe(10000.0, "base of the rotary wavelengths")
    rope_layout: RopeLayout = describe("interleaved", "how weights pair rotary features: Meta's or HF's way")
    use_scaled_rope: bool = describe(False, "apply Llama 3's scaling of rotary frequencies")
    rope_scaling_factor: float = describe(8.0, "how much the longest wavelengths are stretched")
    rope_low_freq_factor: float = describe(1.0, "wavelengths above original / this are stretched fully")
    rope_high_freq_factor: float = describe(4.0, "wavelengths below original / this are kept")
    rope_original_max_seq_len: int = describe(8192, "context before scaling", "tokens")
    sliding_window: int | None = describe(None, "keys a window layer sees, itself included", "tokens")
    attention_chunk_size: int | None = describe(None, "length of the chunks that chunk layers stay in", "tokens")
    nope_layer_interval: int | None = describe(None, "every n-th layer has no positions and sees all before it")
    layer_pattern: str | tuple[str, ...] | None = describe(
        None,
        "letters tiled over the layers: F causal, S window, C chunk, B both ways; small letters are NoPE",
    )
    use_qk_norm: bool = describe(False, "normalise queries and keys after rotation (Llama 4)")
    attn_temperature_tuning: bool = describe(False, "scale queries of NoPE layers by their position")
    floor_scale: float = describe(8192.0, "positions per step of the temperature", "tokens")
    attn_scale: float = describe(0.1, "strength of the temperature")
    tie_embeddings: bool = describe(False, "output shares the weights of the token embeddings")
    moe_args: MoeArgs | None = describe(None, "mixture of experts; absent is dense")

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
            require(getattr(self, name) >= 1, name, getattr(self, name), "accepted is 1 or more")
        for name in ("n_kv_heads", "head_dim", "hidden_dim", "sliding_window", "attention_chunk_size"):
            value = getattr(self, name)
            require(value is None or value >= 1, name, value, "accepted is 1 or more, or null")
        for name in ("norm_eps", "rope_theta", "floor_scale", "rope_scaling_factor", "rope_low_freq_factor"):
            require(getattr(self, name) > 0, name, getattr(self, name), "accepted is more than 0")
        self._check_heads()
        multiplier = self.ffn_dim_multiplier
        require(multiplier is None or multiplier > 0, "ffn_dim_multiplier", multiplier, "accepted is more than 0")
        high = self.rope_high_freq_factor
        require(high >= self.rope_low_freq_factor, "rope_high_freq_factor", high, "accepted is low or more")
        original = self.rope_original_max_seq_len
        require(original >= 1, "rope_original_max_seq_len", original, "accepted is 1 or more")
        self._check_pattern()

    def _check_heads(self) -> None:
        if self.head_dim is None:
            fits = self.dim % self.n_heads == 0
            accepted = f"accepted is a divisor of dim = {self.dim}, or an explicit head_dim"
            require(fits, "n_heads", self.n_heads, accepted)
        fits = self.n_heads % self.kv_heads == 0
        require(fits, "n_kv_heads", self.kv_heads, f"accepted is a divisor of n_heads = {self.n_heads}")
        accepted = "accepted is an even number, since rotary features turn in pairs"
        require(self.head_size % 2 == 0, "head_dim", self.head_size, accepted)

    def _check_pattern(self) -> None:
        interval = self.nope_layer_interval
        require(
            interval is None or interval >= 1,
            "nope_layer_interval",
            interval,
            "accepted is 1 or more, or null",
        )
        pattern = self.layer_pattern
        if pattern is None:
            both = self.sliding_window is not None and self.attention_chunk_size is not None
            accepted = "accepted together with sliding_window only when layer_pattern says which layer has which"
            require(not both, "attention_chunk_size", self.attention_chunk_size, accepted)
            return
        require(interval is None, "nope_layer_interval", interval, "layer_pattern says it with small letters")
        require(len(pattern) > 0, "layer_pattern", pattern, "accepted is one letter per layer or a tiling")
        for letter in pattern:
            if letter.upper() not in PATTERN_LETTERS:
                known = ", ".join(PATTERN_LETTERS)
                raise RequestError(f"layer_pattern has {letter!r}: accepted is {known} or a small one for NoPE")
        if isinstance(pattern, str):
            fits, accepted = (
                len(pattern) <= self.n_layers,
                f"a tiling has at most n_layers = {self.n_layers} letters",
            )
        else:
            fits, accepted = len(pattern) == self.n_layers, f"a list has one letter per layer ({self.n_layers})"
        require(fits, "layer_pattern", pattern if isinstance(pattern, str) else list(pattern), accepted)
        used = {letter.upper() for letter in self.pattern}
        for letter, field in (("S", "sliding_window"), ("C", "attention_chunk_size")):
            size = getattr(self, field)
            require(letter not in used or size is not None, field, size, f"layer_pattern has {letter} layers")
            require(letter in used or size is None, field, size, f"layer_pattern has no {letter} layer")

    @property
    def kv_heads(self) -> int:
        """Key/value heads, resolved."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Features per head, resolved."""
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def pattern(self) -> str:
        """One letter of `PATTERN_LETTERS` per layer."""
        if self.layer_pattern is not None:
            letters = "".join(self.layer_pattern)
            return (letters * -(-self.n_layers // len(letters)))[: self.n_layers]
        local = "S" if self.sliding_window else "C" if self.attention_chunk_size else "F"
        interval = self.nope_layer_interval
        return "".join("f" if interval and (i + 1) % interval == 0 else local for i in range(self.n_layers))

    @property
    def dense_hidden_dim(self) -> int:
        """Feed-forward width of dense layers (meta llama3/model.py): 8/3 dim, scaled, rounded up."""
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
        moe = self._moe(index)
        return LayerArgs(
            index=index,
            dim=self.dim,
            n_heads=self.n_heads,
            n_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            hidden_dim=self.dense_hidden_dim,
            norm_eps=self.norm_eps,
            rule=LayerRule(kind, size),
            rope=None if nope else self._rope(),
            use_qk_norm=self.use_qk_norm and not nope,
            temperature=TemperatureArgs(self.attn_scale, self.floor_scale) if tuned else None,
            moe=moe,
        )

    def _rope(self) -> RopeArgs:
        scaling = None
        if self.use_scaled_rope:
            scaling = RopeScaling(
                self.rope_scaling_factor,
                self.rope_low_freq_factor,
                self.rope_high_freq_factor,
                self.rope_original_max_seq_len,
            )
        return RopeArgs(self.head_size, self.rope_theta, self.rope_layout, scaling)

    def _moe(self, index: int) -> MoeArgs | None:
        moe = self.moe_args
        if moe is None or (index + 1) % moe.interleave_moe_layer_step != 0:
            return None
        if moe.hidden_dim is not None:
            return moe
        # meta llama4: int(ffn_exp * dim), two thirds, multiplier, then divided by capacity_factor + 1
        divisor = moe.capacity_factor + 1 if moe.auto_scale_F else None
        return replace(moe, hidden_dim=self._derive_hidden(int(2 * int(moe.ffn_exp * self.dim) / 3), divisor))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelArgs:
        """Strict: an unknown key or a wrong type is a `RequestError` that suggests the nearest key."""
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
