"""Transom: one readable decoder-only Transformer, and everything a person does with it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from transom.base.version import __version__

if TYPE_CHECKING:
    from transom.attention.mask import create_chunked_attention_mask, positions_from_sizes
    from transom.attention.reference import repeat_kv
    from transom.attention.view import CacheView
    from transom.base.errors import RequestError, WorkError
    from transom.cache.model_cache import ModelCache
    from transom.cache.store import RotatingBufferCache, StaticCache
    from transom.chat.template import ChatTemplate
    from transom.checkpoints.adapters.read import load_adapter
    from transom.checkpoints.adapters.write import save_adapter
    from transom.checkpoints.convert import convert
    from transom.checkpoints.fingerprint import fingerprint
    from transom.checkpoints.load import load
    from transom.checkpoints.open_model import load_tokenizer, open_model
    from transom.checkpoints.save import save
    from transom.config.layer_args import HeadArgs, LayerArgs, MlaArgs, MoeArgs, RopeScaling
    from transom.config.model_args import ModelArgs
    from transom.config.presets import preset
    from transom.config.vision_args import VisionArgs
    from transom.evaluation.merging import merge_folders
    from transom.evaluation.quantizing import quantize_folder
    from transom.inference.decode_args import DecodeArgs
    from transom.inference.embedding import embed
    from transom.inference.loop import generate, stream
    from transom.inference.sampling import SamplingArgs
    from transom.inference.session import Session, open_session
    from transom.inference.weight_streaming import Offload
    from transom.layers.attention import Attention
    from transom.layers.block import TransformerBlock
    from transom.layers.feed_forward import FeedForward
    from transom.layers.inputs import MaskedEmbedding, TransformerInput, TransformerOutput
    from transom.layers.moe import MoE
    from transom.layers.norm import RMSNorm, rmsnorm
    from transom.layers.rope import (
        apply_rotary_emb,
        apply_scaling,
        precompute_freqs_cis,
        reshape_for_broadcast,
    )
    from transom.lora.adapters import activate_adapters, remove_adapter
    from transom.lora.apply import apply_lora
    from transom.lora.args import CombineArgs, LoraArgs
    from transom.lora.merge import merge_adapter, unmerge_adapter
    from transom.models.images import ImageTokenIds, image_tokens, prepare_image
    from transom.models.llm import LLM
    from transom.models.vision import VisionEmbeddings, merge_images
    from transom.quantize.args import QuantizeArgs
    from transom.quantize.leaves import dequantize_model
    from transom.quantize.methods import quantize_model
    from transom.tokenizers.tokenizer import Tokenizer

# Names resolve on first use (PEP 562): `import transom` and `transom --help` must not pay for
# torch.
_HOMES = {
    "transom.lora.adapters": ("activate_adapters", "remove_adapter"),
    "transom.lora.args": ("CombineArgs", "LoraArgs"),
    "transom.lora.merge": ("merge_adapter", "unmerge_adapter"),
    "transom.lora.apply": ("apply_lora",),
    "transom.checkpoints.adapters.read": ("load_adapter",),
    "transom.checkpoints.adapters.write": ("save_adapter",),
    "transom.config.layer_args": ("HeadArgs", "LayerArgs", "MlaArgs", "MoeArgs", "RopeScaling"),
    "transom.config.model_args": ("ModelArgs",),
    "transom.config.vision_args": ("VisionArgs",),
    "transom.attention.mask": ("create_chunked_attention_mask", "positions_from_sizes"),
    "transom.attention.reference": ("repeat_kv",),
    "transom.attention.view": ("CacheView",),
    "transom.cache.model_cache": ("ModelCache",),
    "transom.cache.store": ("RotatingBufferCache", "StaticCache"),
    "transom.chat.template": ("ChatTemplate",),
    "transom.checkpoints.convert": ("convert",),
    "transom.checkpoints.fingerprint": ("fingerprint",),
    "transom.checkpoints.load": ("load",),
    "transom.checkpoints.open_model": ("load_tokenizer", "open_model"),
    "transom.checkpoints.save": ("save",),
    "transom.base.errors": ("RequestError", "WorkError"),
    "transom.evaluation.merging": ("merge_folders",),
    "transom.evaluation.quantizing": ("quantize_folder",),
    "transom.inference.decode_args": ("DecodeArgs",),
    "transom.inference.embedding": ("embed",),
    "transom.inference.loop": ("generate", "stream"),
    "transom.inference.sampling": ("SamplingArgs",),
    "transom.inference.session": ("Session", "open_session"),
    "transom.inference.weight_streaming": ("Offload",),
    "transom.models.images": ("ImageTokenIds", "image_tokens", "prepare_image"),
    "transom.layers.attention": ("Attention",),
    "transom.layers.block": ("TransformerBlock",),
    "transom.layers.feed_forward": ("FeedForward",),
    "transom.layers.inputs": ("MaskedEmbedding", "TransformerInput", "TransformerOutput"),
    "transom.layers.moe": ("MoE",),
    "transom.layers.norm": ("RMSNorm", "rmsnorm"),
    "transom.layers.rope": (
        "apply_rotary_emb",
        "apply_scaling",
        "precompute_freqs_cis",
        "reshape_for_broadcast",
    ),
    "transom.models.llm": ("LLM",),
    "transom.config.presets": ("preset",),
    "transom.quantize.args": ("QuantizeArgs",),
    "transom.quantize.leaves": ("dequantize_model",),
    "transom.quantize.methods": ("quantize_model",),
    "transom.tokenizers.tokenizer": ("Tokenizer",),
    "transom.models.vision": ("VisionEmbeddings", "merge_images"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}
__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'transom' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
