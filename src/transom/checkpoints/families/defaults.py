"""Defaults of the Hugging Face config classes, for keys that files leave out; transformers 5 is the
source.
"""

from __future__ import annotations

from typing import Any

# Shapes of the text models have no defaults here: a config without them is incomplete.
LLAMA: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
OLMO2: dict[str, Any] = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-5}
WINDOW: dict[str, Any] = {"sliding_window": 4096}
MISTRAL: dict[str, Any] = {
    **WINDOW,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
}
MIXTRAL: dict[str, Any] = {
    **MISTRAL,
    "sliding_window": None,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "num_experts_per_tok": 2,
}
PHI3: dict[str, Any] = {
    "sliding_window": None,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
_QWEN: dict[str, Any] = {**WINDOW, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6}
QWEN: dict[str, Any] = {**_QWEN, "num_key_value_heads": 32, "max_window_layers": 28}
QWEN3: dict[str, Any] = {**QWEN, "head_dim": 128}
QWEN3_MOE: dict[str, Any] = {**_QWEN, "num_key_value_heads": 4, "num_experts_per_tok": 8}
GEMMA2: dict[str, Any] = {
    **WINDOW,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
}
# Parts of multimodal files leave out whatever their class says already, even the shape.
GEMMA3: dict[str, Any] = {
    **GEMMA2,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "vocab_size": 262208,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
}
LLAMA4: dict[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e5,
    "num_local_experts": 16,
    "num_experts_per_tok": 1,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
LLAMA4_VISION: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
}
GPT_OSS: dict[str, Any] = {
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 4,
    "head_dim": 64,
    "attention_bias": True,
    "rope_theta": 150000.0,
    "swiglu_limit": 7.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}
DEEPSEEK: dict[str, Any] = {
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "num_experts_per_tok": 8,
    "routed_scaling_factor": 2.5,
    "n_shared_experts": 1,
    "n_group": 8,
    "topk_group": 4,
    "first_k_dense_replace": 3,
    "q_lora_rank": 1536,
}
