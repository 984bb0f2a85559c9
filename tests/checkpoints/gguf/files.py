"""GGUF files of tiny transformers models, written by the package `gguf` with the changes to tensors
that the converters of llama.cpp make.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import PreTrainedModel

# model_type: the architecture in llama.cpp.
ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
    "gpt_oss": "gpt-oss",
}
_NAMED = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    folder: Path,
    *,
    kind: Type = Type.F32,
    merged: bool = True,
    split: int = 0,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a model to the Hugging Face folder `folder` and to the GGUF file `path`.

    Args:
        model: the model.
        path: the file.
        folder: the folder.
        kind: the type of matrices whose rows fill its blocks. Others have F32.
        merged: whether the experts of Mixtral are one tensor, as since April 2024.
        split: tensors of one part, if the file is split.
        metadata: further values, and None for those to leave out.
    """
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    arch = ARCHITECTURES.get(config["model_type"], config["model_type"])
    values = {f"{arch}.{key}": value for key, value in _values(config).items()} | (metadata or {})
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=split)
    for key, value in values.items():
        if value is not None:
            _add(writer, key, value)
    names = gguf.get_tensor_name_map(_NAMED[arch], config["num_hidden_layers"])
    block = gguf.GGML_QUANT_SIZES[kind][0]
    for key, tensor in _tensors(load_file(folder / "model.safetensors"), config, merged):
        stem, suffix = re.fullmatch(r"(.+?)(\.weight|\.bias|)", key).groups()
        name = stem if stem.startswith(("blk.", "rope_")) else names.get_name(stem)
        assert name is not None, key
        array = tensor.float().contiguous().numpy()
        matrix = array.ndim > 1 and "ffn_gate_inp" not in name and array.shape[-1] % block == 0
        stored = kind if matrix and suffix == ".weight" else Type.F32
        writer.add_tensor(name + (suffix or ".weight"), packed(array, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def packed(array: np.ndarray, kind: Type) -> np.ndarray:
    """The bytes of an array in a type; random ones in types that the package can only read."""
    try:
        return gguf.quants.quantize(array, kind)
    except NotImplementedError:
        return random_blocks(
            kind, (*array.shape[:-1], array.shape[-1] // gguf.GGML_QUANT_SIZES[kind][0])
        )


def random_blocks(kind: Type, blocks: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Random blocks of a type whose numbers are finite and of a usual size."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    out = np.random.default_rng(seed).integers(0, 256, (*blocks, size), dtype=np.uint8)
    scales = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,), Type.MXFP4: ()}
    for place in scales.get(kind, (0, 2) if kind in (Type.Q4_K, Type.Q5_K) else (0,)):
        half = np.float16(0.002).tobytes()
        out[..., place : place + 2] = np.frombuffer(half, np.uint8)
    if kind == Type.MXFP4:
        out[..., 0] = 124
    return out.reshape(*blocks[:-1], -1)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def _values(config: dict[str, Any]) -> dict[str, Any]:
    """What `set_gguf_parameters` of the converters writes, after the name of the architecture."""
    kind = config["model_type"]
    rope = config.get("rope_parameters") or {}
    full = rope.get("full_attention", rope)
    out = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(full["rope_theta"]),
        "vocab_size": config["vocab_size"],
    }
    if config.get("head_dim") is not None:
        out |= {f"attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    if full["rope_type"] in ("linear", "yarn"):
        out |= {"rope.scaling.type": full["rope_type"], "rope.scaling.factor": full["factor"]}
    if full["rope_type"] == "yarn":
        length = full["original_max_position_embeddings"]
        out |= {"rope.scaling.original_context_length": length}
        out |= {f"rope.scaling.yarn_{key}": full[key] for key in ("beta_fast", "beta_slow")}
    if "sliding_attention" in rope:
        out |= {"rope.freq_base_swa": float(rope["sliding_attention"]["rope_theta"])}
    if kind in ("gemma2", "gemma3_text", "gpt_oss", "phi3"):
        out |= {"attention.sliding_window": config["sliding_window"] or 0}
    if kind == "gemma2":
        out |= {
            key: config[name]
            for key, name in (
                ("attn_logit_softcapping", "attn_logit_softcapping"),
                ("final_logit_softcapping", "final_logit_softcapping"),
            )
        }
    experts = config.get("num_local_experts") or config.get("num_experts")
    if experts:
        out |= {"expert_count": experts, "expert_used_count": config["num_experts_per_tok"]}
    width = {"gpt_oss": "intermediate_size", "qwen3_moe": "moe_intermediate_size"}.get(kind)
    if width:
        out |= {"expert_feed_forward_length": config[width]}
    if kind == "phi3":
        heads = config["hidden_size"] // config["num_attention_heads"]
        out |= {
            "rope.dimension_count": int(full.get("partial_rotary_factor", 1.0) * heads),
            "rope.scaling.original_context_length": config["original_max_position_embeddings"],
        }
    if full["rope_type"] == "longrope":
        scale = config["max_position_embeddings"] / config["original_max_position_embeddings"]
        length = config["original_max_position_embeddings"]
        out |= {"rope.scaling.attn_factor": math.sqrt(1 + math.log(scale) / math.log(length))}
    return out


def _tensors(state: dict[str, torch.Tensor], config: dict[str, Any], merged: bool):
    """What `modify_tensors` and `generate_extra_tensors` of the converters make of a state."""
    kind = config["model_type"]
    rope = config.get("rope_parameters") or {}
    if rope.get("rope_type") == "llama3":
        yield "rope_freqs", _llama3_divisors(config, rope)
    if rope.get("rope_type") == "longrope":
        yield "rope_factors_long", torch.tensor(rope["long_factor"])
        yield "rope_factors_short", torch.tensor(rope["short_factor"])
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in state.items():
        expert = re.fullmatch(r"(.+\.experts)\.(\d+)\.(\w+)\.weight", key)
        if expert:
            where = f"{expert[1]}.{expert[3]}.weight"
            if kind == "mixtral":
                layer = re.search(r"layers\.(\d+)", key)[1]
                where = f"layers.{layer}.feed_forward.experts.{expert[3]}.weight"
            if kind == "mixtral" and not merged:
                theirs = {"w1": "gate", "w2": "down", "w3": "up"}[expert[3]]
                yield f"blk.{layer}.ffn_{theirs}.{expert[2]}.weight", tensor
            else:
                stacks.setdefault(where, {})[int(expert[2])] = tensor
        elif kind in ("llama", "mistral", "mixtral") and re.search(r"[qk]_proj\.", key):
            heads = config["num_attention_heads" if "q_proj" in key else "num_key_value_heads"]
            pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
            yield key, pairs.swapaxes(1, 2).reshape(tensor.shape)
        elif kind.startswith("gemma") and key.endswith("norm.weight"):
            yield key, tensor + 1
        elif "gate_up_proj" in key and kind == "gpt_oss":
            if key.endswith("_bias"):
                gate, up, last = tensor[..., ::2], tensor[..., 1::2], "bias"
            else:
                columns = tensor.transpose(-1, -2)
                gate, up, last = columns[:, ::2, :], columns[:, 1::2, :], "weight"
            stem = key.removesuffix("_bias")
            yield f"{stem.replace('gate_up_proj', 'gate_proj')}.{last}", gate
            yield f"{stem.replace('gate_up_proj', 'up_proj')}.{last}", up
        elif kind == "gpt_oss" and key.endswith("down_proj_bias"):
            yield key.replace("_bias", ".bias"), tensor
        elif kind == "gpt_oss" and key.endswith("experts.down_proj"):
            yield f"{key}.weight", tensor.transpose(-1, -2)
        else:
            yield key, tensor
    for key, experts in stacks.items():
        yield key, torch.stack([experts[index] for index in sorted(experts)])


def _llama3_divisors(config: dict[str, Any], rope: dict[str, Any]) -> torch.Tensor:
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    steps = torch.arange(0, size, 2, dtype=torch.float32) / size
    frequencies = 1.0 / (rope["rope_theta"] ** steps)
    low, high, factor = (rope[f"{name}factor"] for name in ("low_freq_", "high_freq_", ""))
    original = rope["original_max_position_embeddings"]
    out = []
    for frequency in frequencies.tolist():
        length = 2 * math.pi / frequency
        if length < original / high:
            out.append(1.0)
        elif length > original / low:
            out.append(factor)
        else:
            smooth = (original / length - low) / (high - low)
            out.append(1 / ((1 - smooth) / factor + smooth))
    return torch.tensor(out)
