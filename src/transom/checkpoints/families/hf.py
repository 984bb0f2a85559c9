"""Hugging Face `config.json` to `ModelArgs` and back, in the spellings of transformers 4 and 5.
No torch.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from transom.base.errors import RequestError, require
from transom.checkpoints.families.foreign_config import ForeignConfig
from transom.checkpoints.families.registry import FAMILIES
from transom.checkpoints.quantized.config import read_quantization
from transom.config.layer_args import BASE_HEAD
from transom.config.model_args import ModelArgs

# Fields of which every family takes any value.
_ANY_VALUE = frozenset(
    [
        "dim",
        "n_layers",
        "n_heads",
        "n_kv_heads",
        "hidden_dim",
        "multiple_of",
        "ffn_dim_multiplier",
        "vocab_size",
        "max_seq_len",
        "max_batch_size",
        "norm_eps",
        "rope_theta",
        "tie_embeddings",
        "moe_args.num_experts",
        "moe_args.top_k",
    ]
)


def args_from_hf(config: dict[str, Any], where: str) -> ModelArgs:
    """Return the model that a Hugging Face config describes, and print what of it is not read.

    Raises:
        RequestError: a key is missing, or a value is not supported, also of `quantization_config`.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise RequestError(
            f"{where}: model_type: got {name!r}; expected transom, {', '.join(FAMILIES)}"
        )
    reader = ForeignConfig(config, where, FAMILIES[name].defaults)
    read_quantization(reader)
    args = FAMILIES[name].args_from(reader)
    reader.print_notes()
    return args


def args_to_hf(args: ModelArgs) -> dict[str, Any]:
    """Return the config of the first family whose config reads back as the same model.

    Raises:
        RequestError: no family can express the model.
    """
    if args.head == BASE_HEAD and not args.tie_embeddings and args.vision_args is None:
        config = args_to_hf(replace(args, head=None))
        text = "Text" if config["model_type"].endswith("_text") else ""
        (name,) = config["architectures"]
        return {**config, "architectures": [name.replace("ForCausalLM", f"{text}Model")]}
    whole = args.mla_args is not None or args.dim % args.n_heads == 0
    require(
        whole,
        "dim",
        args.dim,
        f"format hf: expected a multiple of n_heads = {args.n_heads}; save as native",
    )
    vision = args.vision_args
    named = vision is None or vision.image_token is not None
    require(
        named,
        "vision_args.image_token",
        None,
        "format hf: expected the id of a token; save as native",
    )
    written = next(filter(None, (family.config_of(args) for family in FAMILIES.values())), None)
    if written is not None:
        return written
    changed = ", ".join(_unusual(args))
    raise RequestError(
        f"format: got 'hf'; expected 'native', as no Hugging Face family has {changed}"
    )


def _unusual(part: Any, path: str = "") -> list[str]:
    """Return `field = value` for all fields that are not at their defaults, as far as they may
    be the reason.
    """
    out: list[str] = []
    for field in fields(part):
        value = getattr(part, field.name)
        if is_dataclass(value):
            out += _unusual(value, f"{path}{field.name}.") or [f"{path}{field.name}"]
        elif value != field.default and f"{path}{field.name}" not in _ANY_VALUE:
            out.append(f"{path}{field.name} = {value!r}")
    return out
