"""Names of weights in Hugging Face files: the groups of patterns that families share. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from transom.config.model_args import ModelArgs
from transom.names.tables import (
    FEED_FORWARD,
    LAYER,
    REFERENCE_NAMES,
    KeyMapping,
    KeyPattern,
    expand,
    pattern,
    with_bias,
)

MODEL_LAYER = f"model.{LAYER}"
MLP = f"{MODEL_LAYER}.mlp"
EXPERTS = f"{FEED_FORWARD}.experts"
_ATTENTION, _OUR_ATTENTION = f"{MODEL_LAYER}.self_attn", f"{LAYER}.attention"
# Keys of a base model without its head, as `AutoModel` saves it: they lack the prefix `model.`.
_BASE_MODEL = re.compile(r"^(language_model\.)?(?=(embed_tokens|layers|norm)\.)")


@dataclass(frozen=True)
class WeightNames:
    """How the files of one family name its weights.

    Attributes:
        patterns: one way to write every parameter; without any, the keys are our own names.
        aliases: other beginnings of keys, and what stands for them in `patterns`; the first that
            fits counts.
        unread: regular expressions for keys that are not read, and the reason, which is printed;
            `{n}` is the number of layers.
        fused_experts: whether transformers has the experts in two parameters in memory, unlike
            files.
        reference_code: whether these are files of Meta's or Mistral's code, with all its names for
            a weight.
        also_read: other ways in which files have had the same parameters.
    """

    patterns: tuple[KeyPattern, ...]
    aliases: tuple[tuple[str, str], ...] = ()
    unread: tuple[tuple[str, str], ...] = ()
    fused_experts: bool = False
    reference_code: bool = False
    also_read: tuple[KeyPattern, ...] = ()

    def mappings(self, args: ModelArgs, parameters: Collection[str]) -> list[KeyMapping]:
        """Return one way to write every parameter of a model."""
        if not self.patterns:
            return [KeyMapping((name,), (name,), "copy") for name in parameters]
        return expand(self.patterns, args, parameters)

    def mappings_to_read(self, args: ModelArgs, parameters: Collection[str]) -> list[KeyMapping]:
        """Return `mappings`, then all other names that such files have had for the same
        parameters.
        """
        others = REFERENCE_NAMES if self.reference_code else self.also_read
        return self.mappings(args, parameters) + expand(others, args, parameters)

    def key_of(self, parameter: str) -> str:
        """Return the key of a parameter outside the layers, also of one that a model ties."""
        rows = self.patterns
        return next((row.foreign for row in rows if row.ours == (parameter,)), parameter)

    def known_key(self, key: str) -> str:
        """Return the key in `patterns` for one that a file may spell differently."""
        alias, prefix = next((pair for pair in self.aliases if key.startswith(pair[0])), ("", ""))
        key = prefix + key[len(alias) :]
        return key if self.reference_code else _BASE_MODEL.sub(r"\1model.", key, count=1)

    def in_memory(self, key: str) -> str:
        """Return a key of `patterns` as transformers 5 has it in memory."""
        alias, prefix = next((pair for pair in self.aliases if key.startswith(pair[1])), ("", ""))
        return alias + key[len(prefix) :]

    def unread_reason(self, key: str, n_layers: int) -> str | None:
        """Return why a key (as `known_key` has it) is not read, or None if it is."""
        for regex, reason in (*_NEVER_READ, *self.unread):
            if re.fullmatch(regex.replace("{n}", str(n_layers)), key):
                return reason
        return None


# The names of our own folders.
OUR_NAMES = WeightNames((), reference_code=True)
_NEVER_READ = (
    (r".*\.rotary_emb\.inv_freq", "tables of rotary frequencies, which are computed here"),
)


def under(prefix: str, patterns: Iterable[KeyPattern]) -> tuple[KeyPattern, ...]:
    """Return the patterns with `prefix` before every foreign key."""
    return tuple(replace(row, foreign=prefix + row.foreign) for row in patterns)


def gated(foreign: str, ours: str) -> tuple[KeyPattern, ...]:
    """Return the patterns of a feed-forward with a gate."""
    return (
        *with_bias(f"{foreign}.gate_proj", f"{ours}.w_gate"),
        *with_bias(f"{foreign}.up_proj", f"{ours}.w_value"),
        *with_bias(f"{foreign}.down_proj", f"{ours}.w_out"),
    )


def experts(foreign: str, gate: str, value: str, out: str) -> tuple[KeyPattern, ...]:
    """Return the patterns of a router named `gate` and of three matrices for each expert."""
    return (
        pattern(f"{foreign}.gate.weight", f"{FEED_FORWARD}.router.weight"),
        *(
            pattern(
                f"{foreign}.experts.{{e}}.{theirs}.weight",
                f"{EXPERTS}.{ours}.weight",
                transform="stack",
            )
            for theirs, ours in ((gate, "w_gate"), (value, "w_value"), (out, "w_out"))
        ),
    )


def gate_and_value(last: str) -> tuple[str, str]:
    """Return our names of the experts' gate and value; `last` is `weight` or `bias`."""
    return f"{EXPERTS}.w_gate.{last}", f"{EXPERTS}.w_value.{last}"


OUTSIDE = (
    pattern("model.embed_tokens.weight", "tok_embeddings.weight"),
    pattern("model.norm.weight", "norm.weight"),
    pattern("lm_head.weight", "output.weight"),
)
ATTENTION = (
    *with_bias(f"{_ATTENTION}.q_proj", f"{_OUR_ATTENTION}.wq"),
    *with_bias(f"{_ATTENTION}.k_proj", f"{_OUR_ATTENTION}.wk"),
    *with_bias(f"{_ATTENTION}.v_proj", f"{_OUR_ATTENTION}.wv"),
    *with_bias(f"{_ATTENTION}.o_proj", f"{_OUR_ATTENTION}.wo"),
    pattern(f"{_ATTENTION}.q_norm.weight", f"{_OUR_ATTENTION}.q_norm.weight"),
    pattern(f"{_ATTENTION}.k_norm.weight", f"{_OUR_ATTENTION}.k_norm.weight"),
    pattern(f"{_ATTENTION}.sinks", f"{_OUR_ATTENTION}.sinks"),
)
# `post_attention_layernorm` is the norm before the feed-forward in some families, and the one after
# attention in others.
PRE_NORMS = (
    pattern(f"{MODEL_LAYER}.input_layernorm.weight", f"{LAYER}.attention_norm.weight"),
    pattern(f"{MODEL_LAYER}.post_attention_layernorm.weight", f"{LAYER}.ffn_norm.weight"),
)
POST_NORMS = (
    pattern(
        f"{MODEL_LAYER}.post_attention_layernorm.weight", f"{LAYER}.attention_post_norm.weight"
    ),
    pattern(f"{MODEL_LAYER}.post_feedforward_layernorm.weight", f"{LAYER}.ffn_post_norm.weight"),
)
PRE = (*OUTSIDE, *ATTENTION, *PRE_NORMS)
DENSE = gated(MLP, FEED_FORWARD)
LLAMA = WeightNames((*PRE, *DENSE))
SPLIT_EXPERTS = experts(MLP, "gate_proj", "up_proj", "down_proj")

# In memory, transformers 5 holds the experts of some families (`WeightNames.fused_experts`) in two
# parameters that no file has, and their router under another name. The files of PEFT's adapters
# have these names.
EXPERTS_IN_MEMORY = (
    pattern(f"{MLP}.experts.gate_up_proj", *gate_and_value("weight"), transform="rows"),
    pattern(f"{MLP}.experts.down_proj", f"{EXPERTS}.w_out.weight"),
)
ROUTER_IN_MEMORY = pattern(f"{MLP}.gate.weight", f"{FEED_FORWARD}.router.weight")
