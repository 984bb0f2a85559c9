"""A dense training step against transformers' eager Llama of the same shape."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.common import interleaved
from transom.base.runtime import matmul_peak
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.counts import flops_per_token, parameters
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.optimizers import build_optimizer

SHAPES = {
    "10m": {
        "dim": 320,
        "n_layers": 6,
        "n_heads": 5,
        "hidden_dim": 864,
        "vocab_size": 8192,
        "tie_embeddings": True,
    },
    "110m": {
        "dim": 768,
        "n_layers": 12,
        "n_heads": 12,
        "n_kv_heads": 4,
        "hidden_dim": 2048,
        "vocab_size": 32000,
    },
}
BATCH, LENGTH = 2, 512


def transformers_twin(args: ModelArgs) -> LlamaForCausalLM:
    """Return a model of the same shape from transformers."""
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=args.dim,
            num_hidden_layers=args.n_layers,
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.kv_heads,
            intermediate_size=args.dense_hidden_dim,
            vocab_size=args.vocab_size,
            tie_word_embeddings=args.tie_embeddings,
            use_cache=False,
        )
    )


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per shape: the ratio of steps per second, and MFU."""
    return [_case(name, device) for name in SHAPES]


def _case(name: str, device: torch.device) -> dict[str, Any]:
    args = ModelArgs.from_dict({**SHAPES[name], "rope_layout": "halves"})
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    batch = BATCH * (16 if device.type == "cuda" else 1)
    tokens = torch.randint(args.vocab_size, (batch, LENGTH + 1), device=device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    ours = LLM(args)
    ours.init_weights()
    ours.to(device)
    theirs = transformers_twin(args).to(device)
    optimizers = build_optimizer(ours, OptimizerArgs(), device_type=device.type)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=3e-4, fused=True)
    cast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)

    def our_step() -> None:
        with cast:
            logits = ours(TransformerInput(inputs)).logits
        (cross_entropy_sum(logits, targets) / targets.numel()).backward()
        optimizers.step()
        optimizers.zero_grad()

    def their_step() -> None:
        with cast:
            logits = theirs(inputs).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten()
        ).backward()
        adamw.step()
        adamw.zero_grad()

    seconds = interleaved({"ours": our_step, "theirs": their_step}, device, rounds=9)
    rate = batch * LENGTH / seconds["ours"]
    peak = matmul_peak(device.type, dtype)
    return {
        "benchmark": "training step",
        "case": f"{name}, {batch} x {LENGTH}, {str(dtype).removeprefix('torch.')}",
        "peer": "transformers Llama, eager",
        "parameters": parameters(args),
        "tokens_per_second": round(rate, 1),
        "peer_tokens_per_second": round(batch * LENGTH / seconds["theirs"], 1),
        "ratio": round(seconds["theirs"] / seconds["ours"], 3),
        "target": 1.0,
        "mfu": round(rate * flops_per_token(args, LENGTH, training=True) / peak, 3),
        "peak_gflops": round(peak / 1e9, 1),
    }
