"""Model arguments: a model described by frozen plain data. No torch.

`ModelArgs` has the fields that a person writes. `ModelArgs.layers` expands them once into one
`LayerArgs` per layer, which is what the modules read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from transom.base.errors import expect
from transom.base.fields import read, write
from transom.config.layer_args import (
    LayerArgs,
    LayerRule,
    MoeArgs,
    RopeArgs,
    RopeScaling,
    TemperatureArgs,
)
from transom.config.model_fields import ModelFields

# Upper case letters have rotary positions, the same letters in lower case have none (NoPE).
PATTERN_LETTERS: dict[str, Literal["causal", "window", "chunk", "full"]] = {
    "F": "causal",
    "S": "window",
    "C": "chunk",
    "B": "full",
}
_LLAMA3_ROPE = ("rope_scaling_factor", "rope_low_freq_factor", "rope_high_freq_factor")


_rule = functools.cache(LayerRule)  # torch.compile guards by identity: equal rules are one object


@dataclass(frozen=True, kw_only=True)
class ModelArgs(ModelFields):
    """A decoder-only Transformer as plain data.

    Raises:
        RequestError: a value is impossible; the message names the field, the value and what is
            expected.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_heads()
        self._check_rope()
        self._check_pattern()
        self._check_parts()

    def _check(self, fits: bool, name: str, expected: str) -> None:
        value = getattr(self, name)
        expect(fits, name, list(value) if isinstance(value, tuple) else value, expected)

    def _check_heads(self) -> None:
        check = self._check
        if self.mla_args is None and self.head_dim is None:
            fits = self.dim % self.n_heads == 0
            check(fits, "n_heads", f"a divisor of dim = {self.dim}, or an explicit head_dim")
        fits = self.n_heads % self.kv_heads == 0
        check(fits, "n_kv_heads", f"a divisor of n_heads = {self.n_heads}")
        if self.mla_args is None:
            expected = "an even number, since rotary features turn in pairs"
            expect(self.head_size % 2 == 0, "head_dim", self.head_size, expected)
            return
        check(
            self.kv_heads == self.n_heads,
            "n_kv_heads",
            "null with mla_args: all heads share one latent",
        )
        for name in ("head_dim", "qk_norm", "attn_sinks", "use_qk_norm", "rotary_fraction"):
            plain = _DEFAULTS[name]
            words = json.dumps(plain) if plain is None or isinstance(plain, bool) else repr(plain)
            check(getattr(self, name) == plain, name, f"{words} with mla_args")

    def _check_rope(self) -> None:
        check, scaling = self._check, self.rope_scaling
        fits = self.rope_high_freq_factor >= self.rope_low_freq_factor
        check(fits, "rope_high_freq_factor", "rope_low_freq_factor or more")
        fits = self.rotary_dim >= 2 and self.rotary_dim % 2 == 0
        check(fits, "rotary_fraction", f"an even number of the {self.head_size} features of a head")
        for name in () if self.use_scaled_rope else _LLAMA3_ROPE:
            plain = _DEFAULTS[name]
            check(getattr(self, name) == plain, name, f"{plain} unless use_scaled_rope is true")
        both = scaling is not None and self.use_scaled_rope
        check(not both, "use_scaled_rope", "false with rope_scaling, which states the same")
        if scaling is not None:
            scaling.check(self.rotary_dim, self.rope_theta)

    def _check_pattern(self) -> None:
        check, pattern = self._check, self.layer_pattern
        if pattern is None:
            both = self.sliding_window is not None and self.attention_chunk_size is not None
            check(
                not both,
                "attention_chunk_size",
                "null with sliding_window, or a layer_pattern for both",
            )
            return
        fits = self.nope_layer_interval is None
        check(
            fits, "nope_layer_interval", "null with layer_pattern, whose lower case letters say it"
        )
        known = all(letter.upper() in PATTERN_LETTERS for letter in pattern)
        letters = ", ".join(PATTERN_LETTERS)
        check(
            len(pattern) > 0 and known,
            "layer_pattern",
            f"letters of {letters}, in lower case for NoPE",
        )
        if isinstance(pattern, str):
            check(
                len(pattern) <= self.n_layers,
                "layer_pattern",
                f"at most n_layers = {self.n_layers} letters",
            )
        else:
            check(
                len(pattern) == self.n_layers,
                "layer_pattern",
                f"one letter per layer ({self.n_layers})",
            )
        used = {letter.upper() for letter in self.pattern}
        for letter, name in (("S", "sliding_window"), ("C", "attention_chunk_size")):
            given = getattr(self, name) is not None
            check(
                given or letter not in used,
                name,
                f"a number, since layer_pattern has {letter} layers",
            )
            check(
                not given or letter in used,
                name,
                f"null, since layer_pattern has no {letter} layer",
            )

    def _check_parts(self) -> None:
        check, letters, moe = self._check, self.pattern, self.moe_args
        if self.vision_args is not None and self.vision_args.image_token is not None:
            token = self.vision_args.image_token
            expected = f"a token below vocab_size = {self.vocab_size}"
            expect(token < self.vocab_size, "vision_args.image_token", token, expected)
        fits = not self.attn_temperature_tuning or not letters.isupper()
        check(fits, "attn_temperature_tuning", "false without NoPE layers")
        check(self.qk_norm == "none" or not self.use_qk_norm, "qk_norm", "'none' with use_qk_norm")
        fits = self.rope_local_theta is None or bool({"S", "C"} & set(letters))
        check(fits, "rope_local_theta", "null without window and chunk layers")
        if self.head is not None:
            for name in ("logit_scale", "logit_softcap"):
                check(
                    getattr(self, name) is None, name, "null with a head, which has no such logits"
                )
            check(
                not self.tie_embeddings,
                "tie_embeddings",
                "false with a head, which has no vocabulary",
            )
        if moe is not None:
            fits = any(self._moe(index) is not None for index in range(self.n_layers))
            expect(fits, "moe_args", "no layer with experts", "one or more")
            fits = all(0 <= index < self.n_layers for index in moe.dense_layers)
            expected = f"indices below n_layers = {self.n_layers}"
            expect(fits, "moe_args.dense_layers", list(moe.dense_layers), expected)
            fits = self.ffn_gated or moe.expert_activation == "model"
            expected = "'model' unless ffn_gated is true"
            expect(fits, "moe_args.expert_activation", moe.expert_activation, expected)

    @property
    def kv_heads(self) -> int:
        """Key/value heads, with the default worked out."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_size(self) -> int:
        """Features per query head, with the default worked out."""
        if self.mla_args is not None:
            return self.mla_args.qk_nope_head_dim + self.mla_args.qk_rope_head_dim
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def logit_factor(self) -> float:
        """Factor on the raw logits: `logit_scale`, times muP's base width / width."""
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
        """Feed-forward width of dense layers; without `hidden_dim` by the rule of Meta's
        llama3/model.py.
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
            n_kv_heads=self.kv_heads,
            head_dim=self.head_size,
            hidden_dim=self.dense_hidden_dim,
            rule=_rule(kind, size),
            rope=None if nope else self._ropes[size > 0],
            use_qk_norm=self.use_qk_norm and not nope,
            temperature=TemperatureArgs(self.attn_scale, self.floor_scale) if tuned else None,
            moe=self._moe(index),
            mla=self.mla_args,
            **{name: getattr(self, name) for name in _SAME_IN_LAYERS},
        )

    @functools.cached_property
    def _ropes(self) -> tuple[RopeArgs, RopeArgs]:
        """Positions of layers that see all earlier keys, and of local ones; shared, as
        torch.compile guards by identity.
        """
        full = RopeArgs(self.rotary_dim, self.rope_theta, self.rope_layout, self.scaling)
        local = self.rope_local_theta
        return full, full if local is None else RopeArgs(self.rotary_dim, local, self.rope_layout)

    @property
    def scaling(self) -> RopeScaling | None:
        """The scaling of rotary frequencies, with the shorthand of Meta's code worked out."""
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
        # Meta's llama4: int(ffn_exp * dim), two thirds, multiplier, then divided by capacity_factor
        # + 1.
        divisor = moe.capacity_factor + 1 if moe.auto_scale_F else None
        return replace(
            moe, hidden_dim=self._derive_hidden(int(2 * int(moe.ffn_exp * self.dim) / 3), divisor)
        )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelArgs:
        """Return the arguments that a mapping of fields describes.

        Raises:
            RequestError: a key is unknown (the message suggests the nearest), or a value has the
                wrong type.
        """
        return read(cls, data)

    def to_dict(self) -> dict[str, Any]:
        """Return every field as it was given, shorthands unexpanded, as plain data that
        `from_dict` reads.
        """
        data = write(self)
        assert isinstance(data, dict)
        return data


_DEFAULTS = {field.name: field.default for field in fields(ModelArgs)}
# Fields of every layer that are the model's own: same name, same value.
_SAME_IN_LAYERS = (
    *(
        "dim",
        "n_heads",
        "norm_eps",
        "norm",
        "norm_placement",
        "qk_norm",
        "qkv_bias",
        "out_bias",
        "softmax_scale",
    ),
    *("attn_softcap", "attn_sinks", "context_dim", "activation", "ffn_gated", "ffn_bias"),
)
