"""Whether two descriptions are of the same model. No torch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from transom.config.layer_args import LayerArgs, MoeArgs
from transom.config.model_args import ModelArgs

_OUTSIDE_LAYERS = (
    *("vocab_size", "max_seq_len", "norm_eps", "tie_embeddings", "embedding_scale", "logit_factor"),
    *("logit_softcap", "vision_args", "head"),
)
# What of a mixture acts in training only, or is resolved in the layers.
_NOT_IN_FORWARD = (
    *(
        "interleave_moe_layer_step",
        "first_dense_layers",
        "dense_layers",
        "balance",
        "balance_scope",
    ),
    *("aux_loss_coef", "z_loss_coef", "bias_update_rate", "expert_capacity", "overflow", "jitter"),
    *("ffn_exp", "capacity_factor", "auto_scale_F"),
)


def same_model(first: ModelArgs, second: ModelArgs) -> bool:
    """Return whether the forward passes of two models are the same, however their arguments are
    written.
    """
    return _forward(first) == _forward(second)


def _forward(args: ModelArgs) -> list[Any]:
    outside = [getattr(args, name) for name in _OUTSIDE_LAYERS]
    return outside + [_layer(layer) for layer in args.layers]


def _layer(layer: LayerArgs) -> tuple[LayerArgs, bool]:
    if layer.moe is None:
        return layer, False
    defaults = MoeArgs()
    moe = replace(layer.moe, **{name: getattr(defaults, name) for name in _NOT_IN_FORWARD})
    # hidden_dim is the width of a dense feed-forward, which this layer does not have.
    return replace(layer, moe=moe, hidden_dim=0), layer.moe.has_choice_bias
