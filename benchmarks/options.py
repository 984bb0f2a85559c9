"""The cost of each option in training: forward and backward with it and without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import interleaved
from transom.attention.backends import backend
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.models.vision import merge_images
from transom.planning.counts import flops_per_token, parameters
from transom.training.losses.balance import router_losses
from transom.training.losses.cross_entropy import cross_entropy_sum
from transom.training.optim.args import OptimizerArgs
from transom.training.optim.ema import Ema
from transom.training.optim.optimizers import build_optimizer

BATCH, LENGTH = 2, 512
SHAPE: dict[str, Any] = {
    "dim": 512,
    "n_layers": 4,
    "n_heads": 8,
    "hidden_dim": 1408,
    "vocab_size": 4096,
    "max_seq_len": 2048,
}


@dataclass(frozen=True)
class Case:
    """How a step differs from that of `SHAPE`: model fields, documents per row, attention backend.

    With `optimizer` fields the weights move in every step, and with `ema_decay` their average does
    too.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    documents: int = 1
    backend: str = "auto"
    optimizer: Mapping[str, Any] | None = None
    ema_decay: float | None = None


def _scaling(kind: str, **fields: Any) -> Case:
    # The original length is below that of the rows: what depends on the length is then at work.
    return Case(
        {"rope_scaling": {"kind": kind, "factor": 4.0, "original_max_seq_len": 256, **fields}}
    )


def _experts(**fields: Any) -> Case:
    return Case(
        {"moe_args": {"num_experts": 8, "top_k": 2, "hidden_dim": 704, "balance": "none", **fields}}
    )


LATENT = {"kv_lora_rank": 128, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
GROUPED = {"num_groups": 4, "top_groups": 2, "routing": "biased_sigmoid"}
IMAGE = {
    "image_size": 112,
    "patch_size": 14,
    "dim": 256,
    "n_layers": 4,
    "n_heads": 4,
    "hidden_dim": 1024,
    "adapter_dim": 512,
    "output_dim": 512,
    "image_token": 0,
}
PAIRS = SHAPE["dim"] // SHAPE["n_heads"] // 2

# The first case of a group is what its others are compared with; a group is measured in turns.
GROUPS: tuple[dict[str, Case], ...] = (
    {
        "plain model": Case(),
        "rope_layout halves": Case({"rope_layout": "halves"}),
        "rotary_fraction 0.5": Case({"rotary_fraction": 0.5}),
        "no positions": Case({"layer_pattern": "f"}),
        "temperature on every 4th layer": Case(
            {"nope_layer_interval": 4, "attn_temperature_tuning": True}
        ),
    },
    {
        "plain model": Case(),
        "linear scaling": _scaling("linear"),
        "dynamic scaling": _scaling("dynamic"),
        "llama3 scaling": _scaling("llama3"),
        "yarn scaling": _scaling("yarn"),
        "longrope scaling": _scaling(
            "longrope", short_factor=[1.0] * PAIRS, long_factor=[4.0] * PAIRS
        ),
    },
    {
        "plain model": Case(),
        "GQA, 2 kv heads": Case({"n_kv_heads": 2}),
        "MQA, 1 kv head": Case({"n_kv_heads": 1}),
        "latent attention, 128 + 32": Case({"mla_args": LATENT}),
        "biases in attention": Case({"qkv_bias": True, "out_bias": True}),
        "cross-attention to 512 states": Case({"context_dim": 512}),
    },
    {
        "plain model": Case(),
        "window of 128": Case({"sliding_window": 128}),
        "chunks of 128": Case({"attention_chunk_size": 128}),
        "full attention": Case({"layer_pattern": "B"}),
        "4 packed documents": Case(documents=4),
        "blockwise backend": Case(backend="blockwise"),
        "reference backend": Case(backend="reference"),
    },
    {
        "plain model": Case(),
        "qk_norm head": Case({"qk_norm": "head"}),
        "qk_norm projection": Case({"qk_norm": "projection"}),
        "use_qk_norm": Case({"use_qk_norm": True}),
        "attn_softcap": Case({"attn_softcap": 50.0}),
        "attn_sinks": Case({"attn_sinks": True}),
    },
    {
        "plain model": Case(),
        "norm rms_wide": Case({"norm": "rms_wide"}),
        "norm rms_plus_one": Case({"norm": "rms_plus_one"}),
        "norm layer": Case({"norm": "layer"}),
        "norm_placement post": Case({"norm_placement": "post"}),
        "norm_placement both": Case({"norm_placement": "both"}),
    },
    {
        "plain model": Case(),
        "activation gelu": Case({"activation": "gelu"}),
        "activation gelu_tanh": Case({"activation": "gelu_tanh"}),
        "no gate, gelu, hidden_dim x 1.5": Case(
            {"ffn_gated": False, "activation": "gelu", "hidden_dim": 2112}
        ),
        "no gate, relu, hidden_dim x 1.5": Case(
            {"ffn_gated": False, "activation": "relu", "hidden_dim": 2112}
        ),
        "ffn_bias": Case({"ffn_bias": True}),
    },
    {
        "plain model": Case(),
        "embedding_scale": Case({"embedding_scale": 22.6}),
        "logit_softcap": Case({"logit_softcap": 30.0}),
        "mup_base_dim": Case({"mup_base_dim": 128}),
        "tie_embeddings": Case({"tie_embeddings": True}),
        "classification head": Case({"head": {"kind": "classification", "num_labels": 2}}),
        "embedding head": Case({"head": {"kind": "embedding", "pooling": "mean"}}),
        "64 of 512 tokens from images": Case({"vision_args": IMAGE}),
    },
    {
        "plain model": Case(),
        # As many products per token as the dense feed-forward has: what is left is routing and
        # small groups.
        "8 experts, top 2": _experts(),
    },
    {
        "8 experts, top 2": _experts(),
        "sigmoid, weight on the input": _experts(routing="sigmoid"),
        "biased sigmoid, 4 groups": _experts(**GROUPED),
        "balance mixtral, sequence": _experts(balance="mixtral"),
        "balance switch, batch": _experts(balance="switch", balance_scope="batch"),
        "expert_capacity 1.25, drop": _experts(expert_capacity=1.25),
        "expert_capacity 1.25, second choice": _experts(
            expert_capacity=1.25, overflow="second_choice"
        ),
        "jitter 0.01": _experts(jitter=0.01),
    },
    {
        "AdamW, with its step": Case(optimizer={}),
        "Muon": Case(optimizer={"name": "muon"}),
        "8-bit AdamW": Case(optimizer={"state_bits": 8}),
        "step in backward": Case(optimizer={"in_backward": True, "max_grad_norm": None}),
        "averaged weights": Case(optimizer={}, ema_decay=0.999),
    },
)
LOADING = "load_state_dict with fused names"


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per case: milliseconds of forward and backward, and the ratio to its peer."""
    out = []
    for group in GROUPS:
        seconds = interleaved(
            {name: make_step(case, device) for name, case in group.items()}, device, rounds=5
        )
        (peer, plain), *others = group.items()
        for name, case in others:
            row = {
                "benchmark": "options",
                "case": name,
                "peer": peer,
                "ms": round(1000 * seconds[name], 1),
                "peer_ms": round(1000 * seconds[peer], 1),
                "ratio": round(seconds[peer] / seconds[name], 2),
                "arithmetic_ratio": round(_flops(plain) / _flops(case), 2),
                "parameters_ratio": round(_parameters(plain) / _parameters(case), 2),
            }
            if "context_dim" in case.fields or "vision_args" in case.fields:
                del row["arithmetic_ratio"]  # the count leaves contexts and images out
            out.append(row)
    return [*out, _loading(device)]


def _loading(device: torch.device) -> dict[str, Any]:
    """Time of `load_state_dict` where weights come under the names of Meta's training code, against
    ours.
    """
    model = LLM(_args(Case())).to(device)
    state = {name: torch.zeros_like(weight) for name, weight in model.state_dict().items()}
    fused = dict(state)
    for index in range(len(model.layers)):
        at = f"layers.{index}"
        parts = [fused.pop(f"{at}.attention.{leaf}.weight") for leaf in ("wq", "wk", "wv")]
        fused[f"{at}.attention.wqkv.weight"] = torch.cat(parts)
        parts = [fused.pop(f"{at}.feed_forward.{leaf}.weight") for leaf in ("w_gate", "w_value")]
        fused[f"{at}.feed_forward.mlp.fc1_weight"] = torch.cat(parts)
        fused[f"{at}.feed_forward.mlp.fc2_weight"] = fused.pop(f"{at}.feed_forward.w_out.weight")
    cases = {
        "fused": lambda: model.load_state_dict(fused),
        "ours": lambda: model.load_state_dict(state),
    }
    seconds = interleaved(cases, device, rounds=9)
    return {
        "benchmark": "options",
        "case": LOADING,
        "peer": "our names",
        "ms": round(1000 * seconds["fused"], 2),
        "peer_ms": round(1000 * seconds["ours"], 2),
        "ratio": round(seconds["ours"] / seconds["fused"], 2),
    }


def _args(case: Case) -> ModelArgs:
    return ModelArgs.from_dict({**SHAPE, **case.fields})


def _flops(case: Case) -> float:
    return flops_per_token(_args(case), LENGTH // case.documents, training=True)


def _parameters(case: Case) -> int:
    return parameters(_args(case))


def make_step(case: Case, device: torch.device) -> Callable[[], None]:
    """Return a training step of a case; on CUDA with bfloat16 autocast and 16 times the rows."""
    torch.manual_seed(0)
    args = _args(case)
    model = LLM(args).train()
    model.init_weights(0)
    with torch.no_grad():
        for weight in model.parameters():  # as drawn, every block would be the identity
            weight.add_(torch.randn_like(weight) * 0.02)
    model.to(device).attend = backend(case.backend)
    optimizers, ema = None, None
    if case.optimizer is not None:
        optimizers = build_optimizer(
            model, OptimizerArgs(**case.optimizer), device_type=device.type
        )
    if case.ema_decay is not None:
        ema = Ema(model, case.ema_decay)
    batch = BATCH * (16 if device.type == "cuda" else 1)
    tokens = torch.randint(1, args.vocab_size, (batch, LENGTH + 1), device=device)
    fields = call_fields(case, args, tokens)
    targets = tokens[:, 1:].contiguous()

    def run() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss(
                model, TransformerInput(tokens[:, :-1].contiguous(), **fields(model)), targets
            ).backward()
        if optimizers is not None:
            optimizers.step()
        if ema is not None:
            ema.update(step=1000)
        model.zero_grad()

    return run


def call_fields(case: Case, args: ModelArgs, tokens: Tensor) -> Callable[[LLM], dict[str, Any]]:
    """Return further fields of a call; images are encoded inside the step, which is their cost."""
    batch, device = tokens.size(0), tokens.device
    fields: dict[str, Any] = {}
    if case.documents > 1:
        fields["sizes"] = [[LENGTH // case.documents] * case.documents] * batch
    if args.context_dim is not None:
        fields["context"] = torch.randn(batch, LENGTH, args.context_dim, device=device)
    images = args.vision_args
    if images is None:
        return lambda model: fields
    tiles = 64 // images.patches_per_tile
    size = (batch * tiles, images.num_channels, images.image_size, images.image_size)
    pixels = torch.randn(size, device=device)
    assert images.image_token is not None, "set above"
    tokens[:, : tiles * images.patches_per_tile] = images.image_token
    patch = images.image_token

    def encoded(model: LLM) -> dict[str, Any]:
        return {
            **fields,
            "image_embedding": merge_images(tokens[:, :-1], patch, model.encode_images(pixels)),
        }

    return encoded


def loss(model: LLM, inputs: TransformerInput, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of tokens or labels, or the mean square of an embedding."""
    out, moe = model(inputs), model.args.moe_args
    if model.args.head is None:
        mean = cross_entropy_sum(out.logits, targets) / targets.numel()
        return mean if moe is None else mean + router_losses(out.router, moe).weighted
    if out.logits is None:
        assert out.pooled_BD is not None, "a head pools"
        return out.pooled_BD.float().square().mean()
    return cross_entropy_sum(out.logits.unsqueeze(1), targets[:, 0] * 0) / len(targets)
