"""Transom: one readable decoder-only Transformer, and everything a person does with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from transom.adapt.combine_args import CombineArgs
    from transom.adapt.lora import activate_adapters, remove_adapter
    from transom.adapt.lora_args import LoraArgs
    from transom.adapt.merge import merge_adapter, unmerge_adapter
    from transom.adapt.new import apply_lora
    from transom.adapt.read import load_adapter
    from transom.adapt.write import save_adapter
    from transom.args import HeadArgs, LayerArgs, MlaArgs, ModelArgs, MoeArgs, RopeScaling, VisionArgs
    from transom.attend.mask import create_chunked_attention_mask, positions_from_sizes
    from transom.attend.reference import repeat_kv
    from transom.attend.view import CacheView
    from transom.cache.model_cache import ModelCache
    from transom.cache.store import RotatingBufferCache, StaticCache
    from transom.chat.template import ChatTemplate
    from transom.checkpoints.convert import convert
    from transom.checkpoints.fingerprint import fingerprint
    from transom.checkpoints.load import load, load_tokenizer, save
    from transom.errors import RequestError, WorkError
    from transom.evaluation.merging import merge_folders
    from transom.generation.loop import generate, stream
    from transom.generation.sampling import SamplingArgs
    from transom.images import ImageTokenIds, image_tokens, prepare_image
    from transom.layers.attention import Attention
    from transom.layers.feed_forward import FeedForward
    from transom.layers.moe import MoE
    from transom.layers.norm import RMSNorm, rmsnorm
    from transom.layers.rope import (
        apply_rotary_emb,
        apply_scaling,
        precompute_freqs_cis,
        reshape_for_broadcast,
    )
    from transom.model import LLM, MaskedEmbedding, TransformerBlock, TransformerInput, TransformerOutput
    from transom.presets import preset
    from transom.quantize.args import QuantizeArgs
    from transom.quantize.leaves import dequantize_model, quantize_model
    from transom.tokenizer import Tokenizer
    from transom.vision import VisionEmbeddings, merge_images

# Names resolve on first use (PEP 562): `import transom` and `transom --help` must not pay for torch.
_HOMES = {
    "transom.adapt.combine_args": ("CombineArgs",),
    "transom.adapt.lora": ("activate_adapters", "remove_adapter"),
    "transom.adapt.lora_args": ("LoraArgs",),
    "transom.adapt.merge": ("merge_adapter", "unmerge_adapter"),
    "transom.adapt.new": ("apply_lora",),
    "transom.adapt.read": ("load_adapter",),
    "transom.adapt.write": ("save_adapter",),
    "transom.args": ("HeadArgs", "LayerArgs", "MlaArgs", "ModelArgs", "MoeArgs", "RopeScaling", "VisionArgs"),
    "transom.attend.mask": ("create_chunked_attention_mask", "positions_from_sizes"),
    "transom.attend.reference": ("repeat_kv",),
    "transom.attend.view": ("CacheView",),
    "transom.cache.model_cache": ("ModelCache",),
    "transom.cache.store": ("RotatingBufferCache", "StaticCache"),
    "transom.chat.template": ("ChatTemplate",),
    "transom.checkpoints.convert": ("convert",),
    "transom.checkpoints.fingerprint": ("fingerprint",),
    "transom.checkpoints.load": ("load", "load_tokenizer", "save"),
    "transom.errors": ("RequestError", "WorkError"),
    "transom.evaluation.merging": ("merge_folders",),
    "transom.generation.loop": ("generate", "stream"),
    "transom.generation.sampling": ("SamplingArgs",),
    "transom.images": ("ImageTokenIds", "image_tokens", "prepare_image"),
    "transom.layers.attention": ("Attention",),
    "transom.layers.feed_forward": ("FeedForward",),
    "transom.layers.moe": ("MoE",),
    "transom.layers.norm": ("RMSNorm", "rmsnorm"),
    "transom.layers.rope": (
        "apply_rotary_emb",
        "apply_scaling",
        "precompute_freqs_cis",
        "reshape_for_broadcast",
    ),
    "transom.model": ("LLM", "MaskedEmbedding", "TransformerBlock", "TransformerInput", "TransformerOutput"),
    "transom.presets": ("preset",),
    "transom.quantize.args": ("QuantizeArgs",),
    "transom.quantize.leaves": ("dequantize_model", "quantize_model"),
    "transom.tokenizer": ("Tokenizer",),
    "transom.vision": ("VisionEmbeddings", "merge_images"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'transom' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
