"""The numbers that modules hold before anybody fills them."""

import pytest
import torch

from tests.helpers import TINY_VISION, tiny_args
from transom.base.errors import RequestError
from transom.config.vision_args import VisionArgs
from transom.layers.block import TransformerBlock
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.layers.norm import make_norm
from transom.models.llm import LLM
from transom.models.vision import VisionEmbeddings
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model

MOE = {
    "num_experts": 4,
    "top_k": 2,
    "hidden_dim": 24,
    "router_bias": True,
    "expert_bias": True,
    "shared_expert": True,
}
MLA = {
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
CASES = {
    "mixture": {"moe_args": MOE},
    "latent": {"mla_args": MLA, "n_kv_heads": None},
    "vision": {"vision_args": TINY_VISION},
    "head": {"head": {"kind": "classification", "num_labels": 3}},
    "biases": {
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "attn_sinks": True,
        "tie_embeddings": True,
    },
    "gemma": {"norm": "rms_plus_one", "norm_placement": "both", "qk_norm": "head"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_constructor_initialises_every_weight(case, monkeypatch):
    args = tiny_args(**CASES[case])
    empty = torch.empty

    def full_of_nan(*shape, **options):
        out = empty(*shape, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", full_of_nan)
    torch.manual_seed(4)
    model = LLM(args)
    torch.manual_seed(4)
    again = LLM(args)
    monkeypatch.undo()
    seeded = LLM(args)
    seeded.init_weights(0)
    for (name, weight), other, drawn in zip(
        model.named_parameters(), again.parameters(), seeded.parameters(), strict=True
    ):
        assert torch.equal(weight, other), f"{name} does not follow torch's seed"
        # The same law as the seeded start: zeros and ones agree, draws have about the same spread.
        if drawn.unique().numel() == 1:
            assert torch.equal(weight, drawn), name
        else:
            assert weight.std().item() == pytest.approx(drawn.std().item(), rel=0.3), name


@pytest.mark.parametrize(
    "make",
    [
        lambda: Linear(6, 5, bias=True),
        lambda: Embedding(6, 5),
        lambda: GroupedLinear(3, 6, 5, bias=True),
        lambda: make_norm("rms", 6, 1e-6),
        lambda: make_norm("rms_plus_one", 6, 1e-6),
        lambda: make_norm("layer", 6, 1e-6),
        lambda: VisionEmbeddings(VisionArgs(**TINY_VISION), 32),
        lambda: TransformerBlock(tiny_args(**CASES["mixture"]).layers[-1]),
    ],
)
def test_modules_built_alone_are_initialised(make, monkeypatch):
    empty = torch.empty

    def full_of_nan(*shape, **options):
        return empty(*shape, **options).fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", full_of_nan)
    assert all(bool(weight.isfinite().all()) for weight in make().parameters())


def test_a_model_on_the_meta_device_draws_nothing():
    torch.manual_seed(0)
    with torch.device("meta"):
        LLM(tiny_args(**CASES["mixture"]))
    drawn = torch.rand(3)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(3))


def test_init_weights_refuses_a_quantized_model():
    model = quantize_model(
        LLM(tiny_args(dim=64, hidden_dim=64)), QuantizeArgs(kind="int4", group=32)
    )
    with pytest.raises(RequestError, match=r"init_weights: .*codes is torch\.uint8"):
        model.init_weights()
