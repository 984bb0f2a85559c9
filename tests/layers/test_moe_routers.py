"""Every router and expert against transformers' block of the family that has it, in outputs and
gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.gpt_oss.configuration_gpt_oss import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextMoe
from transformers.models.mixtral.configuration_mixtral import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from tests.helpers import tiny_args
from transom.layers.moe import MoE, Router

DIM, HIDDEN, EXPERTS = 16, 24, 8
Tensors = dict[str, Tensor]
Mapped = Callable[[Mapping[str, Tensor]], Tensors]


def fused(theirs: Mapping[str, Tensor]) -> Tensors:
    """Mixtral, Qwen and DeepSeek in memory: gate rows, then value rows."""
    gate, value = theirs["experts.gate_up_proj"].split(HIDDEN, 1)
    return {
        "router.weight": theirs["gate.weight"],
        "experts.w_gate.weight": gate,
        "experts.w_value.weight": value,
        "experts.w_out.weight": theirs["experts.down_proj"],
    }


def deepseek(theirs: Mapping[str, Tensor]) -> Tensors:
    return fused(theirs) | shared(theirs, "shared_experts")


def llama4(theirs: Mapping[str, Tensor]) -> Tensors:
    """Input-major, gate columns, then value columns."""
    gate, value = theirs["experts.gate_up_proj"].mT.split(HIDDEN, 1)
    return {
        "router.weight": theirs["router.weight"],
        "experts.w_gate.weight": gate,
        "experts.w_value.weight": value,
        "experts.w_out.weight": theirs["experts.down_proj"].mT,
    } | shared(theirs, "shared_expert")


def gpt_oss(theirs: Mapping[str, Tensor]) -> Tensors:
    """Input-major, gate and value columns in turn."""
    both, bias = theirs["experts.gate_up_proj"].mT, theirs["experts.gate_up_proj_bias"]
    return {
        "router.weight": theirs["router.weight"],
        "router.bias": theirs["router.bias"],
        "experts.w_gate.weight": both[:, ::2],
        "experts.w_gate.bias": bias[:, ::2],
        "experts.w_value.weight": both[:, 1::2],
        "experts.w_value.bias": bias[:, 1::2],
        "experts.w_out.weight": theirs["experts.down_proj"].mT,
        "experts.w_out.bias": theirs["experts.down_proj_bias"],
    }


def shared(theirs: Mapping[str, Tensor], name: str) -> Tensors:
    pairs = {"w_gate": "gate_proj", "w_value": "up_proj", "w_out": "down_proj"}
    return {
        f"shared_expert.{ours}.weight": theirs[f"{name}.{foreign}.weight"]
        for ours, foreign in pairs.items()
    }


def mixtral_block() -> nn.Module:
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN}
    return MixtralSparseMoeBlock(
        MixtralConfig(num_local_experts=EXPERTS, num_experts_per_tok=2, **sizes)
    )


def qwen_block(normalize: bool) -> nn.Module:
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "num_experts": EXPERTS}
    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(num_experts_per_tok=3, norm_topk_prob=normalize, **sizes)
    )


def llama4_block(top_k: int) -> nn.Module:
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
    return Llama4TextMoe(Llama4TextConfig(num_experts_per_tok=top_k, **sizes))


def deepseek_block(normalize: bool, groups: int, kept: int) -> nn.Module:
    sizes = {"hidden_size": DIM, "moe_intermediate_size": HIDDEN, "n_routed_experts": EXPERTS}
    choice = {
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": normalize,
        "routed_scaling_factor": 2.5,
    }
    return DeepseekV3MoE(
        DeepseekV3Config(n_shared_experts=2, num_experts_per_tok=3, **sizes, **choice)
    )


def gpt_oss_block() -> nn.Module:
    sizes = {"hidden_size": DIM, "intermediate_size": HIDDEN, "num_local_experts": EXPERTS}
    return GptOssMLP(GptOssConfig(num_experts_per_tok=2, swiglu_limit=1.5, **sizes))


BIASED = {
    "routing": "biased_sigmoid",
    "routed_scale": 2.5,
    "shared_expert": True,
    "shared_hidden_dim": 2 * HIDDEN,
}
CLAMPED = {
    "expert_activation": "clamped",
    "activation_limit": 1.5,
    "router_bias": True,
    "expert_bias": True,
}
# name: (their block, its weights under our names, our arguments)
CASES: dict[str, tuple[Callable[[], nn.Module], Mapped, dict[str, object]]] = {
    "mixtral": (mixtral_block, fused, {"top_k": 2}),
    "qwen3_moe": (lambda: qwen_block(False), fused, {"top_k": 3, "normalize": False}),
    "qwen3_moe, norm_topk_prob": (lambda: qwen_block(True), fused, {"top_k": 3}),
    "llama4": (
        lambda: llama4_block(1),
        llama4,
        {"top_k": 1, "routing": "sigmoid", "shared_expert": True},
    ),
    "llama4, top 2": (
        lambda: llama4_block(2),
        llama4,
        {"top_k": 2, "routing": "sigmoid", "shared_expert": True},
    ),
    "deepseek_v3": (
        lambda: deepseek_block(True, 4, 2),
        deepseek,
        {"top_k": 3, "num_groups": 4, "top_groups": 2, **BIASED},
    ),
    "deepseek_v3, one group, not normalised": (
        lambda: deepseek_block(False, 1, 1),
        deepseek,
        {"top_k": 3, "normalize": False, **BIASED},
    ),
    "gpt_oss": (gpt_oss_block, gpt_oss, {"top_k": 2, **CLAMPED}),
}


def first(output: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Some blocks return their router's scores too."""
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("family", CASES)
def test_block_equals_transformers_with_gradients(family):
    make, to_ours, fields = CASES[family]
    generator = torch.Generator().manual_seed(0)
    theirs = make().float()
    for weight in (*theirs.parameters(), *theirs.buffers()):
        weight.data = torch.randn(weight.shape, generator=generator) * 0.5
    ours = MoE(
        tiny_args(
            dim=DIM, moe_args={"num_experts": EXPERTS, "hidden_dim": HIDDEN, **fields}
        ).layers[0]
    )
    weights = to_ours({name: weight.data for name, weight in theirs.named_parameters()})
    if ours.router.choice_bias is not None:
        theirs.gate.e_score_correction_bias -= (
            3.0  # a group filled with 0 instead of -inf would now be the best
        )
        weights["router.choice_bias"] = theirs.gate.e_score_correction_bias
    ours.load_state_dict(weights)

    x = torch.randn(2, 7, DIM, generator=generator).requires_grad_()
    pull = torch.randn(2, 7, DIM, generator=generator)
    theirs_y = first(theirs(x)).view_as(x)
    (theirs_dx,) = torch.autograd.grad(theirs_y, x, pull, retain_graph=True)
    theirs_y.backward(pull)
    y = ours(x)[0]
    (dx,) = torch.autograd.grad(y, x, pull, retain_graph=True)
    y.backward(pull)

    expected = to_ours({name: weight.grad for name, weight in theirs.named_parameters()})
    got = {name: weight.grad for name, weight in ours.named_parameters() if weight.requires_grad}
    assert got.keys() == expected.keys(), "the choice bias alone has no gradient"
    for name, mine, wanted in [
        ("y", y, theirs_y),
        ("x", dx, theirs_dx),
        *((n, got[n], expected[n]) for n in got),
    ]:
        torch.testing.assert_close(
            mine, wanted, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def router(**fields: object) -> Router:
    module = Router(
        DIM,
        tiny_args(dim=DIM, moe_args={"num_experts": EXPERTS, "hidden_dim": 8, **fields}).moe_args,
    )
    torch.nn.init.normal_(module.weight, generator=torch.Generator().manual_seed(0))
    return module


@pytest.mark.parametrize("routing", ["softmax", "sigmoid"])
def test_a_choice_bias_decides_who_is_chosen_and_not_how_much_it_weighs(routing):
    plain = router(routing=routing, top_k=EXPERTS, normalize=False)
    biased = router(routing=routing, top_k=2, normalize=False, balance="bias")
    with torch.no_grad():
        biased.choice_bias[5] = 2.0
    x = torch.randn(9, DIM, generator=torch.Generator().manual_seed(1))
    all_ids, all_weights, _ = plain(x)
    weights = torch.empty_like(all_weights).scatter(1, all_ids, all_weights)
    ids, chosen, _ = biased(x)
    assert (ids[:, 0] == 5).all(), "its biased score is the best"
    torch.testing.assert_close(chosen, weights.gather(1, ids), rtol=0, atol=0)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_routing_is_float32_or_better(given, autocast):
    module, x = router().to(given), torch.randn(3, DIM).to(given)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, weights, logits = module(x)
    wide = torch.promote_types(given, torch.float32)
    assert (weights.dtype, logits.dtype) == (wide, wide)
    torch.testing.assert_close(logits, x.to(wide) @ module.weight.to(wide).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("best", "second"), [(3, 6), (6, 3)])
def test_saturated_sigmoids_are_told_apart_by_their_logits(best, second):
    module = router(routing="sigmoid", top_k=1)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[best, 0], module.weight[second, 0] = (
            60.0,
            40.0,
        )  # both are 1 after the sigmoid
    assert module(torch.ones(1, DIM))[0].item() == best
