"""Tiny PEFT models over the tiny `transformers` twins: what every adapter is compared with."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.checkpoints.families import random_ids, tiny_hf
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# name: (family of tests/checkpoints/families.py, what LoraConfig has besides r and lora_alpha)
ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": "all-linear"}),
    "patterns": (
        "qwen2",
        {
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {r"layers\.1\..*v_proj": 5},
            "layers_to_transform": [1],
        },
    ),
    "embeddings and output": ("mistral", {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
    "tied embeddings": ("llama-tied", {"target_modules": ["embed_tokens", "v_proj"]}),
    "fused": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj", "o_proj"]}),
    "fused DoRA": ("phi3-longrope", {"target_modules": "all-linear", "use_dora": True}),
    "DoRA with biases": (
        "qwen2",
        {"target_modules": ["q_proj", "k_proj", "up_proj"], "use_dora": True},
    ),
    "DoRA on scaled embeddings": (
        "gemma2",
        {"target_modules": ["embed_tokens", "gate_proj"], "use_dora": True},
    ),
    "whole modules": (
        "qwen3",
        {"target_modules": ["k_proj"], "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "whole mixture": ("mixtral", {"target_modules": ["o_proj"], "modules_to_save": ["mlp"]}),
    "some experts": ("qwen3_moe", {"target_modules": ["q_proj"], "target_parameters": EXPERTS[1:]}),
    "experts, inputs first": (
        "llama4_text",
        {
            "target_modules": ["q_proj", "k_proj", "shared_expert.up_proj"],
            "target_parameters": EXPERTS,
        },
    ),
    "images too": ("llama4", {"target_modules": ["q_proj", "fc1"]}),
    "beside images": (
        "llama4",
        {"target_modules": r".*language_model.*k_proj", "target_parameters": EXPERTS[:1]},
    ),
    "experts, columns by turns": (
        "gpt_oss",
        {"target_modules": ["v_proj"], "target_parameters": EXPERTS},
    ),
    "latent attention": (
        "deepseek_v3",
        {"target_modules": ["kv_b_proj", "q_a_proj", "o_proj"], "target_parameters": EXPERTS[1:]},
    ),
}


def twin(name: str, folder: Path) -> PeftModel:
    """The PEFT model of one of `ADAPTERS`, every part drawn; base and adapter are saved in
    `folder`.
    """
    family, changes = ADAPTERS[name]
    base = tiny_hf(family)
    base.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base, LoraConfig(r=3, lora_alpha=7, **changes))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "magnitude" in key or "modules_to_save" in key:
                weight.mul_(1.1 + 0.2 * torch.rand(weight.shape, generator=generator))
            elif "lora_" in key:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    save(model, folder / "adapter")
    return model.eval()


def save(model: PeftModel, folder: Path) -> None:
    """PEFT's own saving, without what it warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder)


def read_back(name: str, folder: Path) -> PeftModel:
    """The adapter in `folder`, as PEFT reads it onto the base of one of `ADAPTERS`; a key unread is
    an error.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return PeftModel.from_pretrained(tiny_hf(ADAPTERS[name][0]), folder).eval()


def logits_of(model: LLM, ids: Tensor | None = None) -> Tensor:
    """Logits [2, 12, V] without a cache."""
    logits = model(TransformerInput(random_ids(2, 12) if ids is None else ids)).logits
    assert logits is not None
    return logits


def far(a: Tensor, b: Tensor) -> float:
    """The largest difference."""
    return float((a - b).detach().abs().max())
