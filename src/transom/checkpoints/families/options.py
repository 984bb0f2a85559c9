"""Options that several Hugging Face families share. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transom.checkpoints.families.family import (
    Fields,
    Keys,
    Option,
    copied,
    resolved_experts,
    switches,
)
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.rope import ROPE
from transom.config.model_args import ModelArgs

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu": "relu",
}
_TYPES = {"causal": "full_attention", "window": "sliding_attention", "chunk": "chunked_attention"}


def _read_shape(config: ForeignConfig) -> Fields:
    return {
        "n_kv_heads": config.get("num_key_value_heads", config["num_attention_heads"]),
        "head_dim": config.get("head_dim"),
        "rope_layout": "halves",
        "tie_embeddings": config.get("tie_word_embeddings", False),
    }


def _write_shape(args: ModelArgs) -> Keys:
    return {
        "num_key_value_heads": args.kv_heads,
        "head_dim": args.head_size if args.mla_args is None else args.rotary_dim,
        "intermediate_size": args.dense_hidden_dim,
        "tie_word_embeddings": args.tie_embeddings,
        "torch_dtype": "float32",
        "pad_token_id": None,  # some classes have a default beyond a small vocabulary
    }


def activation(key: str = "hidden_act") -> Option:
    """Return an option for the activation of the feed-forward, which `key` names."""

    def read(config: ForeignConfig) -> Fields:
        config.expect(key, *_ACTIVATIONS)
        return {"activation": _ACTIVATIONS[config.get(key, "silu")]}

    def write(args: ModelArgs) -> Keys:
        return {key: "gelu_pytorch_tanh" if args.activation == "gelu_tanh" else args.activation}

    return Option(read, write)


SHAPE = (
    copied(
        hidden_size="dim",
        num_hidden_layers="n_layers",
        num_attention_heads="n_heads",
        intermediate_size="hidden_dim",
        vocab_size="vocab_size",
        max_position_embeddings="max_seq_len",
        rms_norm_eps="norm_eps",
    ),
    Option(_read_shape, _write_shape),
)
BIAS = switches(attention_bias=("qkv_bias", "out_bias"))
COMMON = (*SHAPE, activation(), ROPE)


def layer_types(args: ModelArgs) -> list[str]:
    """Return one word per layer for the keys that its queries see."""
    return [_TYPES.get(layer.rule.kind, layer.rule.kind) for layer in args.layers]


def uniform_window(switch: bool = False) -> Option:
    """Return an option for a window in all layers or in none.

    With `switch`, the key `use_sliding_window` turns the window on.
    """

    def read(config: ForeignConfig) -> Fields:
        window = config["sliding_window"]
        if switch and not config.get("use_sliding_window", False):
            window = None
        kind = "full_attention" if window is None else "sliding_attention"
        alike = all(one == kind for one in config.get("layer_types", []))
        config.check(alike, "layer_types", f"{kind} in all layers, as sliding_window = {window}")
        return {"sliding_window": window}

    def write(args: ModelArgs) -> Keys:
        on = {"use_sliding_window": args.sliding_window is not None} if switch else {}
        return {"sliding_window": args.sliding_window, **on}

    return Option(read, write)


def layer_letters(
    config: ForeignConfig, letters: Mapping[str, str], kind: Callable[[int], str]
) -> list[str]:
    """Return the letter of each layer; `kind` tells what a layer is in a file without a list."""
    kinds = config.get("layer_types") or map(kind, range(config["num_hidden_layers"]))
    kinds = list(kinds)
    expected = f"{' or '.join(letters)} in each layer"
    config.check(set(kinds) <= set(letters), "layer_types", expected)
    return [letters[one] for one in kinds]


def read_windows(config: ForeignConfig, is_full: Callable[[int], bool]) -> Fields:
    """Return the window, and the pattern of layers if only some have it.

    The pattern is that of `layer_types` if the file has it. Otherwise `is_full` tells which layers,
    by index, have no window.
    """
    letters = layer_letters(
        config,
        {"full_attention": "F", "sliding_attention": "S"},
        lambda index: "full_attention" if is_full(index) else "sliding_attention",
    )
    window = config["sliding_window"]
    fits = window is not None or "S" not in letters
    config.check(fits, "sliding_window", "a number, as layer_types has sliding layers")
    return window_fields(letters, window)


def window_fields(letters: Sequence[str], window: Any) -> Fields:
    """Return the fields of a window in the layers with the letter S."""
    if "S" not in letters:
        return {}
    return {"sliding_window": window, **({"layer_pattern": letters} if "F" in letters else {})}


def alternating_windows(every: int, *keys: str) -> Option:
    """Return an option for sliding layers of which each `every`-th is full.

    The first of `keys` that the file has overrides `every`.
    """

    def read(config: ForeignConfig) -> Fields:
        step = next((config.get(key) for key in keys if config.get(key)), every)
        return read_windows(config, lambda index: (index + 1) % step == 0)

    def write(args: ModelArgs) -> Keys:
        # These classes want a window even where no layer has one.
        return {
            "sliding_window": args.sliding_window or args.max_seq_len,
            "layer_types": layer_types(args),
        }

    return Option(read, write)


def experts(width: str) -> Option:
    """Return an option for a mixture of experts whose width is in the key `width`.

    `num_experts` and `num_local_experts` mean the same.
    """

    def read(config: ForeignConfig) -> Fields:
        other = config.get("num_experts")
        count = config.get("num_local_experts") or other
        config.check(count is not None, "num_local_experts", "a number of experts")
        return {
            "moe_args.num_experts": count,
            "moe_args.top_k": config["num_experts_per_tok"],
            "moe_args.hidden_dim": config[width],
            "moe_args.aux_loss_coef": config.get("router_aux_loss_coef", 0.001),
        }

    def write(args: ModelArgs) -> Keys:
        moe = resolved_experts(args)
        return {
            "num_local_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "router_aux_loss_coef": moe.aux_loss_coef,
            width: moe.hidden_dim,
        }

    return Option(read, write)


def dense_layers(args: ModelArgs, dense: bool = True) -> list[int]:
    """Return the indices of the layers without experts, or of those with them."""
    return [layer.index for layer in args.layers if (layer.moe is None) == dense]
