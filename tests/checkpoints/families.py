"""Tiny random `transformers` models, one per family and variant: what every import is compared
with.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

# `Llama4ForConditionalGeneration.forward` of this one release copies `image_outputs` from the
# output of the text model, whose class has no such field, so it fails with and without images,
# after every number is computed. A field that is None lets it return those numbers.
# `test_parity.py` notices when a release no longer needs this.
LLAMA4_FAILS = transformers.__version__ == "5.24.0"
if LLAMA4_FAILS:
    MoeCausalLMOutputWithPast.image_outputs = None

VOCAB = 99
_SMALL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "beta_fast": 4.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 32,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 2.5, 4.0],
}
_LLAMA4: dict[str, Any] = {
    "num_hidden_layers": 4,
    "intermediate_size_mlp": 40,
    "head_dim": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8,
    "floor_scale": 4,
    # Released files have no blend between the two wavelengths.
    "rope_parameters": {**_LLAMA3, "high_freq_factor": 1.0},
}
_LLAMA4_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "vision_output_dim": 24,
    "image_size": 24,
    "patch_size": 4,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 20,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12,
    "v_head_dim": 10,
}

# variant: (transformers.models module, class prefix, what its config has besides _SMALL)
_VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "llama",
        "Llama",
        {"rope_parameters": _LLAMA3, "attention_bias": True, "mlp_bias": True},
    ),
    "llama-tied": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama-linear": ("llama", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.0}}),
    "llama-dynamic": (
        "llama",
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 16},
    ),
    "mistral": ("mistral", "Mistral", {"sliding_window": 7, "head_dim": 10}),
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4, "sliding_window": 9}),
    "qwen2": (
        "qwen2",
        "Qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 5,
            "max_window_layers": 1,
            "rope_parameters": _YARN,
        },
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 12, "attention_bias": True, "num_key_value_heads": 1}),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3Moe",
        {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe-raw": (
        "qwen3_moe",
        "Qwen3Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 20,
            "head_dim": 8,
            "use_sliding_window": True,
            "sliding_window": 6,
        },
    ),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "attention_bias": True,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3_text": (
        "gemma3",
        "Gemma3",
        {
            "num_hidden_layers": 7,
            "head_dim": 12,
            "query_pre_attn_scalar": 20,
            "sliding_window": 6,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
            },
        },
    ),
    "olmo2": ("olmo2", "Olmo2", {"attention_bias": True}),
    "phi3": ("phi3", "Phi3", {"sliding_window": 9, "tie_word_embeddings": True}),
    "phi3-longrope": (
        "phi3",
        "Phi3",
        {
            "rope_parameters": _LONGROPE,
            "original_max_position_embeddings": 32,
            "max_position_embeddings": 256,
        },
    ),
    "llama4_text": ("llama4", "Llama4", _LLAMA4),
    "gpt_oss": (
        "gpt_oss",
        "GptOss",
        {
            "head_dim": 12,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "swiglu_limit": 0.7,
            "rope_parameters": {**_YARN, "truncate": False},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3",
        {**_DEEPSEEK, "rope_parameters": {**_YARN, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ),
    "deepseek_v3-plain": (
        "deepseek_v3",
        "DeepseekV3",
        {
            **_DEEPSEEK,
            "q_lora_rank": None,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "attention_bias": True,
        },
    ),
}
FAMILIES: tuple[str, ...] = (*_VARIANTS, "llama4")


def tiny_hf(family: str, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """The tiny model of one of `FAMILIES`, float32, in eval mode, every weight drawn.

    `fields` replace those of its config.
    """
    module, prefix, changes = _VARIANTS["llama4_text" if family == "llama4" else family]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    configuration = importlib.import_module(f"transformers.models.{module}.configuration_{module}")
    text = "Text" if module in ("gemma3", "llama4") else ""
    # Copies: transformers completes the mappings it is given in place.
    fields = {key: _copy(value) for key, value in {**_SMALL, **changes, **fields}.items()}
    config = getattr(configuration, f"{prefix}{text}Config")(**fields)
    kind = f"{prefix}ForCausalLM"
    if family == "llama4":
        vision = configuration.Llama4VisionConfig(**_copy(_LLAMA4_VISION))
        config = configuration.Llama4Config(
            vision_config=vision, text_config=config, image_token_index=VOCAB - 1
        )
        kind = "Llama4ForConditionalGeneration"
    # eager: transformers' sdpa knows neither soft caps nor sinks.
    config._attn_implementation = "eager"
    model: PreTrainedModel = getattr(modeling, kind)(config)
    randomise(model, seed)
    return model.eval()


def randomise(model: PreTrainedModel, seed: int = 0) -> None:
    """Draw every weight: zeros and ones of biases, norms, sinks and choices would hide a lost
    tensor.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            draw = torch.randn(weight.shape, generator=generator)
            plus_one = "gemma" in model.config.model_type
            centre = 1.0 if "norm" in name and name.endswith("weight") and not plus_one else 0.0
            # A wide draw for the router makes near-ties between experts rare.
            std = 0.5 if "router" in name or ".gate." in name else 0.2
            weight.copy_(centre + std * draw)
    model.tie_weights()


def random_ids(rows: int = 2, count: int = 21, seed: int = 1) -> torch.Tensor:
    """Token ids [rows, count] that every tiny model has; none stands for an image."""
    return torch.randint(1, VOCAB - 1, (rows, count), generator=torch.Generator().manual_seed(seed))


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value
