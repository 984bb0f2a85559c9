"""Forward and backward of a mixture of experts against transformers' Mixtral block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from benchmarks.common import interleaved
from transom.config.model_args import ModelArgs
from transom.layers.moe import MoE

EXPERTS, TOP_K = 8, 2
# (dim, hidden_dim, tokens of a call, aim of the ratio to the eager block). That block makes a
# full-size gradient of all experts for each of them, so the fewer tokens share this cost, the
# larger the ratio.
SHAPES = ((768, 2048, 512, 2.5), (768, 2048, 2048, None))
GPU_SHAPES = ((768, 2048, 512, 2.5), (2048, 7168, 8192, None))
PEERS = ("eager", "grouped_mm")


def rows(device: torch.device) -> list[dict[str, Any]]:
    """Return one row per shape and peer; the eager block is the main peer."""
    shapes = SHAPES if device.type == "cpu" else GPU_SHAPES
    return [row for shape in shapes for row in _case(device, *shape)]


def _case(
    device: torch.device, dim: int, hidden_dim: int, tokens: int, target: float | None
) -> list[dict[str, Any]]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    moe = {"num_experts": EXPERTS, "top_k": TOP_K, "hidden_dim": hidden_dim}
    args = ModelArgs.from_dict(
        {"dim": dim, "n_heads": 8, "vocab_size": 64, "n_layers": 1, "moe_args": moe}
    )
    generator = torch.Generator().manual_seed(0)
    ours = MoE(args.layers[0])
    for weight in ours.parameters():
        nn.init.normal_(weight, std=0.02, generator=generator)
    blocks: dict[str, nn.Module] = {
        "ours": ours,
        **{peer: _mixtral(ours, args, peer) for peer in PEERS},
    }
    x = torch.randn(2, tokens // 2, dim, generator=generator).to(device, dtype).requires_grad_()
    pull = torch.randn(2, tokens // 2, dim, generator=generator).to(device, dtype)
    cases = {
        name: _step(block.to(device, dtype).train(), x, pull) for name, block in blocks.items()
    }
    expected = cases["eager"]()
    for name, case in cases.items():  # a comparison of different work would mean nothing
        torch.testing.assert_close(
            case(), expected, rtol=0.05, atol=0.05, msg=f"{name} computes something else"
        )
    seconds = interleaved(cases, device, rounds=7)
    return [
        {
            "benchmark": "moe",
            "case": f"{EXPERTS} experts top {TOP_K}, {tokens} x {dim}, hidden {hidden_dim}, "
            f"{_name(dtype)}",
            "peer": f"transformers Mixtral block, {peer}",
            "milliseconds": round(1e3 * seconds["ours"], 2),
            "peer_milliseconds": round(1e3 * seconds[peer], 2),
            "ratio": round(seconds[peer] / seconds["ours"], 3),
            "target": target if peer == "eager" else None,
        }
        for peer in PEERS
    ]


def _mixtral(ours: MoE, args: ModelArgs, implementation: str) -> nn.Module:
    """Return the block of transformers with the same weights."""
    config = MixtralConfig(
        hidden_size=args.dim,
        intermediate_size=ours.experts.w_out.weight.size(2),
        num_local_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation=implementation,
    )
    block = MixtralSparseMoeBlock(config)
    gate_up = torch.cat((ours.experts.w_gate.weight, ours.experts.w_value.weight), 1)
    down, gate = ours.experts.w_out.weight, ours.router.weight
    weights = {"experts.gate_up_proj": gate_up, "experts.down_proj": down, "gate.weight": gate}
    block.load_state_dict({name: weight.detach() for name, weight in weights.items()})
    return block


def _step(block: nn.Module, x: Tensor, pull: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        output = block(x)
        y: Tensor = output[0] if isinstance(output, tuple) else output
        y.backward(pull)
        grad = x.grad
        assert grad is not None
        x.grad = None
        block.zero_grad()
        return grad

    return step


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
