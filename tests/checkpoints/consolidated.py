"""Folders as Meta's and Mistral's codes have them, made from tiny `transformers` twins by inverting
the rules.
"""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.llama4.configuration_llama4 import (
    Llama4Config,
    Llama4TextConfig,
    Llama4VisionConfig,
)
from transformers.models.llama4.modeling_llama4 import (
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
)
from transformers.models.mistral.configuration_mistral import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralForCausalLM
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralForCausalLM

from tests.checkpoints.families import randomise

VOCAB = 96
State = dict[str, Tensor]
_NO_TOKENS: dict[str, Any] = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
_META: dict[str, Any] = {
    "dim": 32,
    "n_layers": 4,
    "n_heads": 8,
    "n_kv_heads": 4,
    "vocab_size": VOCAB,
    "multiple_of": 16,
    "norm_eps": 1e-5,
}
PARAMS: dict[str, dict[str, Any]] = {
    # Llama 2 says neither its vocabulary nor its theta, and repeats no heads.
    "llama2": {**_META, "n_kv_heads": 8, "vocab_size": -1},
    "llama3": {
        **_META,
        "n_kv_heads": 2,  # fewer than four ranks
        "ffn_dim_multiplier": 1.3,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "llama4": {
        **_META,
        "ffn_dim_multiplier": 1.2,
        "ffn_exp": 4.0,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
        "nope_layer_interval": 4,
        "attention_chunk_size": 8,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
        "moe_args": {"num_experts": 4, "capacity_factor": 1.0, "auto_scale_F": True, "top_k": 1,
                     "interleave_moe_layer_step": 2},
    },
}  # fmt: skip
PARAMS["llama4-vision"] = {
    **PARAMS["llama4"],
    "vision_args": {
        "image_size": {"height": 24, "width": 24},
        "patch_size": {"height": 4, "width": 4},
        "dim": 16,
        "n_layers": 2,
        "n_heads": 2,
        "mlp_ratio": 4.0,
        "output_dim": 24,
        "pixel_shuffle_ratio": 0.5,
    },
}
# Widths that the rules of the two codes make of these (reference: models/llama3/model.py,
# models/llama4/moe.py).
DENSE = {"llama2": 96, "llama3": 112, "llama4": 112, "llama4-vision": 112}
EXPERT = 64


def twin(kind: str) -> Any:
    """The same model in transformers, every weight drawn."""
    params = PARAMS[kind]
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": params["dim"],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params["n_kv_heads"],
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        **_NO_TOKENS,
    }
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": params.get("rope_theta", 10000.0)}
    if params.get("use_scaled_rope"):
        factor, high = (16.0, 1.0) if "moe_args" in params else (8.0, 4.0)
        rope |= {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": high,
                 "original_max_position_embeddings": 8192}  # fmt: skip
    common["rope_parameters"] = rope
    if "moe_args" not in params:
        model: Any = LlamaForCausalLM(LlamaConfig(**common, intermediate_size=DENSE[kind]))
        randomise(model)
        return model.eval()
    text = Llama4TextConfig(
        **common, head_dim=4, intermediate_size=EXPERT, intermediate_size_mlp=DENSE[kind], num_local_experts=4,
        num_experts_per_tok=1, interleave_moe_layer_step=2, no_rope_layer_interval=4, attention_chunk_size=8,
        use_qk_norm=True, attn_temperature_tuning=True, floor_scale=4, attn_scale=0.1,
    )  # fmt: skip
    if kind == "llama4":
        text._attn_implementation = "eager"
        model = Llama4ForCausalLM(text)
    else:
        vision = Llama4VisionConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, vision_output_dim=24,
            image_size=24, patch_size=4, projector_input_dim=24, projector_output_dim=24,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )  # fmt: skip
        config = Llama4Config(vision_config=vision, text_config=text, image_token_index=VOCAB - 1)
        config._attn_implementation = "eager"
        model = Llama4ForConditionalGeneration(config)
    randomise(model)
    return model.eval()


def to_pairs(weight: Tensor, heads: int) -> Tensor:
    """Rows per head from halves to interleaved pairs: the inverse of transformers' conversion."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


_TEXT = (
    (r"model\.embed_tokens", "tok_embeddings"),
    (r"lm_head", "output"),
    (r"model\.norm", "norm"),
    (r"model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj", r"layers.\1.attention.w\2"),
    (r"model\.layers\.(\d+)\.input_layernorm", r"layers.\1.attention_norm"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm", r"layers.\1.ffn_norm"),
    (r"model\.layers\.(\d+)\.(mlp|feed_forward)\.gate_proj", r"layers.\1.feed_forward.w1"),
    (r"model\.layers\.(\d+)\.(mlp|feed_forward)\.up_proj", r"layers.\1.feed_forward.w3"),
    (r"model\.layers\.(\d+)\.(mlp|feed_forward)\.down_proj", r"layers.\1.feed_forward.w2"),
    (
        r"model\.layers\.(\d+)\.feed_forward\.shared_expert\.gate_proj",
        r"layers.\1.feed_forward.w_in_shared_FD",
    ),
    (
        r"model\.layers\.(\d+)\.feed_forward\.shared_expert\.up_proj",
        r"layers.\1.feed_forward.w_swiglu_FD",
    ),
    (
        r"model\.layers\.(\d+)\.feed_forward\.shared_expert\.down_proj",
        r"layers.\1.feed_forward.w_out_shared_DF",
    ),
    (r"model\.layers\.(\d+)\.feed_forward\.router\.weight", r"layers.\1.feed_forward.router_DE"),
)
_BLOCK = "vision_embeddings.vision_encoder.transformer.resblocks"
_IMAGE = (
    (r"vision_model\.patch_embedding\.linear", "vision_embeddings.vision_encoder.conv1._linear"),
    (r"vision_model\.model\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj", rf"{_BLOCK}.\1.attn.w\2"),
    (r"vision_model\.model\.layers\.(\d+)\.input_layernorm", rf"{_BLOCK}.\1.ln_1"),
    (r"vision_model\.model\.layers\.(\d+)\.post_attention_layernorm", rf"{_BLOCK}.\1.ln_2"),
    (r"vision_model\.model\.layers\.(\d+)\.mlp\.fc1", rf"{_BLOCK}.\1.mlp.c_fc"),
    (r"vision_model\.model\.layers\.(\d+)\.mlp\.fc2", rf"{_BLOCK}.\1.mlp.c_proj"),
    (r"vision_model\.vision_adapter\.mlp\.fc1", "vision_embeddings.vision_adapter.mlp.c_fc"),
    (r"vision_model\.vision_adapter\.mlp\.fc2", "vision_embeddings.vision_adapter.mlp.c_proj"),
    (r"vision_model\.layernorm_(pre|post)", r"vision_embeddings.vision_encoder.ln_\1"),
    (r"vision_model\.", "vision_embeddings.vision_encoder."),
    (r"multi_modal_projector\.linear_1", "vision_projection"),
)


def meta_state(kind: str, model: Any) -> State:
    """Meta's whole tensors, released names, of a twin."""
    params, out = PARAMS[kind], {}
    for key, tensor in model.state_dict().items():
        name = key.removeprefix("language_model.")
        pattern = _IMAGE if name.startswith(("vision_model", "multi_modal")) else _TEXT
        if name.endswith("experts.gate_up_proj"):
            stem = re.sub(r".*layers\.(\d+)\..*", r"layers.\1.feed_forward.experts", name)
            gate, value = tensor.chunk(2, -1)
            out[f"{stem}.moe_w_in_eD_F"], out[f"{stem}.moe_w_swiglu_eD_F"] = (
                gate.flatten(0, 1),
                value.flatten(0, 1),
            )
            continue
        if name.endswith("experts.down_proj"):
            stem = re.sub(r".*layers\.(\d+)\..*", r"layers.\1.feed_forward.experts", name)
            out[f"{stem}.moe_w_out_eF_D"] = tensor.flatten(0, 1)
            continue
        for old, new in pattern:
            changed = re.sub(f"^{old}", new, name)
            if changed != name:
                name = changed
                break
        if "moe_args" not in params and name.endswith(
            ("attention.wq.weight", "attention.wk.weight")
        ):
            tensor = to_pairs(tensor, params["n_heads"] if "wq" in name else params["n_kv_heads"])
        out[name] = tensor.mT if name.endswith("router_DE") else tensor
    return {key: tensor.clone() for key, tensor in out.items()}


def cut(kind: str, state: State, ranks: int) -> list[State]:
    """What each of several model-parallel ranks holds of a state."""
    out: list[State] = [{} for _ in range(ranks)]
    for key, tensor in state.items():
        for rank, part in enumerate(_parts(kind, key, tensor, ranks)):
            out[rank][key] = part.clone()
    return out


def _parts(kind: str, key: str, tensor: Tensor, ranks: int) -> list[Tensor]:
    leaf = key.split(".")[-2] if key.endswith((".weight", ".bias")) else key.split(".")[-1]
    if (
        "norm" in key
        or ".ln_" in key
        or leaf in ("router_DE", "class_embedding", "positional_embedding_vlm")
    ):
        return [tensor] * ranks
    if leaf == "moe_w_out_eF_D":
        return [part.flatten(0, 1) for part in tensor.unflatten(0, (4, -1)).chunk(ranks, 1)]
    if leaf in ("moe_w_in_eD_F", "moe_w_swiglu_eD_F"):
        return list(tensor.chunk(ranks, -1))
    if leaf in ("wo", "w2", "c_proj", "w_out_shared_DF"):
        return [tensor] * ranks if key.endswith("bias") else list(tensor.chunk(ranks, -1))
    if leaf == "tok_embeddings" and kind == "llama2":
        return list(tensor.chunk(ranks, 1))
    heads = PARAMS[kind]["n_kv_heads"]
    if leaf in ("wk", "wv") and ".attention." in key and ranks > heads:
        return [part for part in tensor.chunk(heads) for _ in range(ranks // heads)]
    return list(tensor.chunk(ranks))


def fuse(state: State) -> State:
    """The training library's names in one rank: fused matrices, norms inside them, extra states, a
    rotary table.
    """
    out = dict(state)
    for i in range(4):
        at, ffn = f"layers.{i}.attention", f"layers.{i}.feed_forward"
        out[f"{at}.wqkv.weight"] = torch.cat(
            [out.pop(f"{at}.{leaf}.weight") for leaf in ("wq", "wk", "wv")]
        )
        out[f"{at}.wqkv.layer_norm_weight"] = out.pop(f"layers.{i}.attention_norm.weight")
        out[f"{at}.wo._extra_state"] = io.BytesIO(b"of a library")  # type: ignore[assignment]
        if f"{ffn}.w1.weight" not in out:
            out[f"{ffn}.norm.weight"] = out.pop(f"layers.{i}.ffn_norm.weight")
            out[f"{ffn}.global_gate_stats_3E"] = torch.ones(3, 4)
            continue
        out[f"{ffn}.mlp.fc1_weight"] = torch.cat(
            [out.pop(f"{ffn}.{leaf}.weight") for leaf in ("w1", "w3")]
        )
        out[f"{ffn}.mlp.fc2_weight"] = out.pop(f"{ffn}.w2.weight")
        out[f"{ffn}.mlp.layer_norm_weight"] = out.pop(f"layers.{i}.ffn_norm.weight")
    out["rope.freqs"] = torch.ones(2)
    return out


def write_meta(
    folder: Path, params: dict[str, Any], states: list[State], nested: bool = False
) -> Path:
    """A folder of one .pth per rank."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps({"model": params} if nested else params))
    for rank, state in enumerate(states):
        torch.save(state, folder / f"consolidated.{rank:02d}.pth")
    return folder


_MISTRAL: dict[str, Any] = {
    "dim": 32,
    "n_layers": 2,
    "head_dim": 10,
    "hidden_dim": 48,
    "n_heads": 4,
    "n_kv_heads": 2,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB,
}
MISTRAL_PARAMS: dict[str, dict[str, Any]] = {
    "dense": {**_MISTRAL, "rope_theta": 10000.0, "sliding_window": 7},
    "v0.1": {**_MISTRAL, "sliding_window": 7},
    "later": dict(_MISTRAL),
    "moe": {**_MISTRAL, "head_dim": 8, "moe": {"num_experts": 4, "num_experts_per_tok": 2}},
}


def mistral_twin(kind: str) -> Any:
    """The same model in transformers, every weight drawn; a silent file means theta 1e4 with a
    window, else 1e6.
    """
    params = MISTRAL_PARAMS[kind]
    theta = params.get("rope_theta", 1e4 if "sliding_window" in params else 1e6)
    fields: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": params["head_dim"],
        "rms_norm_eps": 1e-5,
        "sliding_window": params.get("sliding_window"),
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        **_NO_TOKENS,
    }
    if "moe" in params:
        config = MixtralConfig(**fields, num_local_experts=4, num_experts_per_tok=2)
        config._attn_implementation = "eager"
        model: Any = MixtralForCausalLM(config)
    else:
        config = MistralConfig(**fields)
        config._attn_implementation = "eager"
        model = MistralForCausalLM(config)
    randomise(model)
    return model.eval()


def mistral_state(kind: str, model: Any, folder: Path) -> State:
    """Mistral's tensors of a twin, by way of the file that transformers writes (experts one by
    one).
    """
    from safetensors.torch import load_file

    model.save_pretrained(folder)
    params, out = MISTRAL_PARAMS[kind], {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        name = key.replace("block_sparse_moe.gate", "feed_forward.gate")
        name = name.replace("block_sparse_moe.experts", "feed_forward.experts")
        for old, new in _TEXT:
            name = re.sub(f"^{old}", new, name)
        name = name.removeprefix("model.")
        if name.endswith(("attention.wq.weight", "attention.wk.weight")):
            tensor = to_pairs(tensor, params["n_heads"] if "wq" in name else params["n_kv_heads"])
        out[name] = tensor.contiguous()
    return out


def write_mistral(
    folder: Path, params: dict[str, Any], state: State, pickled: bool = False
) -> Path:
    """A folder of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    if pickled:
        torch.save(state, folder / "consolidated.00.pth")
    else:
        save_file(state, folder / "consolidated.safetensors")
    return folder
