"""Bytes per token in the KV cache and time of decoding: MHA, GQA, MQA, latent attention, 8 bits."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import interleaved
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning.counts import kv_bytes_per_token

CACHED = 4096  # tokens in the cache when one more is decoded
SHAPE: dict[str, Any] = {
    "dim": 1024,
    "n_layers": 4,
    "n_heads": 16,
    "hidden_dim": 2048,
    "vocab_size": 1024,
    "max_seq_len": CACHED + 64,
}
LATENT = {"kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
CASES: dict[str, dict[str, Any]] = {
    "MHA, 16 kv heads": {},
    "GQA, 4 kv heads": {"n_kv_heads": 4},
    "MQA, 1 kv head": {"n_kv_heads": 1},
    "MLA, latent 256 + 32": {"mla_args": LATENT},
    "MHA in 8 bits": {"kv_bits": 8},
    "GQA in 8 bits": {"n_kv_heads": 4, "kv_bits": 8},
}


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per form: bytes per token and layer, and the time of one decoding step."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    calls, sizes = {}, {}
    for name, changes in CASES.items():
        kv_bits = changes.get("kv_bits", 16)
        fields = {key: value for key, value in changes.items() if key != "kv_bits"}
        args = ModelArgs.from_dict({**SHAPE, **fields})
        model = LLM(args)
        model.init_weights(0)
        model.to(device, dtype).eval()
        cache = model.make_cache(1, kv_bits=kv_bits)
        prompt = torch.randint(1024, (1, CACHED), device=device)
        model(TransformerInput(prompt, logits="none"), cache, inference=True)
        one = prompt[:, :1].contiguous()

        def decode(model: LLM = model, cache: Any = cache, one: torch.Tensor = one) -> None:
            model(TransformerInput(one, logits="last"), cache, inference=True)
            cache.rollback(1, at_most=1)

        calls[name] = decode
        sizes[name] = kv_bytes_per_token(args.layers[0], 1 if kv_bits == 8 else dtype.itemsize)
    seconds = interleaved(calls, device, rounds=9, warmup=2)
    first = next(iter(CASES))
    return [
        {
            "benchmark": "kv cache",
            "case": name,
            "peer": first,
            "bytes_per_token_and_layer": sizes[name],
            "decode_ms": round(1000 * seconds[name], 2),
            "bytes_ratio": round(sizes[first] / sizes[name], 2),
            "ratio": round(seconds[first] / seconds[name], 2),
        }
        for name in CASES
    ]
