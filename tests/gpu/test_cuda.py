"""What only a CUDA device can show; imports nothing but torch, transformers' dependencies and
transom.
"""

import json

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from tests.training.runs import losses
from tests.training.runs import tiny_args as tiny_run
from transom.attention.mask import Layout, MaskSpec
from transom.attention.reference import reference
from transom.attention.sdpa import sdpa
from transom.attention.view import CacheView, ScoreArgs
from transom.config.layer_args import LayerRule
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.training.loop.setup import open_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

FEATURES = {
    "full": {},
    "window": {"sliding_window": 7},
    "llama4": {
        "attention_chunk_size": 8,
        "nope_layer_interval": 2,
        "use_qk_norm": True,
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
    },
    "moe": {"moe_args": {"num_experts": 4, "top_k": 2, "hidden_dim": 64}},
}


@pytest.fixture(params=FEATURES)
def model(request):
    return random_model(tiny_args(**FEATURES[request.param]))


def test_float32_equals_the_cpu(model):
    tokens = random_tokens(2, 37)
    expected = model(TransformerInput(tokens), inference=True).logits
    torch.backends.cuda.matmul.allow_tf32 = False
    got = model.cuda()(TransformerInput(tokens.cuda()), inference=True).logits.cpu()
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)


def test_cached_decoding_equals_the_full_forward(model):
    tokens = random_tokens(2, 37).cuda()
    model.cuda()
    full = model(TransformerInput(tokens), inference=True).logits
    cache = model.make_cache(2, 64, slack=2)
    parts = [
        model(TransformerInput(part), cache=cache, inference=True).logits
        for part in tokens.split(5, 1)
    ]
    assert torch.allclose(torch.cat(parts, 1), full, atol=1e-3, rtol=1e-3)


def test_bfloat16_is_near_float32(model):
    tokens = random_tokens(2, 37).cuda()
    wide = model.cuda()(TransformerInput(tokens), inference=True).logits
    half = model.bfloat16()(TransformerInput(tokens), inference=True).logits.float()
    assert (half - wide).abs().mean() < 0.1 * wide.abs().mean()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rule", [LayerRule(), LayerRule("window", 100), LayerRule("chunk", 100)])
def test_sdpa_equals_the_reference(rule, dtype):
    shapes = ((2, 300, 8, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    q, k, v = (torch.randn(shape, device="cuda", dtype=torch.float64) for shape in shapes)
    positions = torch.arange(300, device="cuda").expand(2, -1)
    for layout in (Layout((300, 300)), None):
        spec = MaskSpec(rule, positions, layout=layout)
        exact = reference(q, CacheView((k, v), positions, new_at=0), spec, ScoreArgs())
        low = [x.to(dtype) for x in (q, k, v)]
        got = sdpa(low[0], CacheView((low[1], low[2]), positions, new_at=0), spec, ScoreArgs())
        assert (got.double() - exact).abs().max() < (1e-3 if dtype == torch.float32 else 5e-2)


def test_greedy_generation_equals_the_cpu(model):
    model.double()
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    expected = generate(model, prompts, max_new_tokens=24)
    assert generate(model.cuda(), prompts, max_new_tokens=24).cpu().tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_learns_in(tmp_path, dtype):
    trainer = open_run(tiny_run(tmp_path, "device=cuda", f"dtype={dtype}", "steps=120"), quiet=True)
    assert trainer.fit().bits_per_byte < 1.6
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    counted = [row["skipped_steps"] for row in rows if "skipped_steps" in row]
    assert bool(counted) == (
        dtype == "float16"
    )  # the loss scale starts too high, and each skip is counted


def test_resume_continues_the_losses(tmp_path):
    open_run(tiny_run(tmp_path, "device=cuda", f"out={tmp_path}/straight"), quiet=True).fit()
    first = open_run(tiny_run(tmp_path, "device=cuda"), quiet=True)
    while first.progress.step < 8:
        first.log(first.step(), 1.0)
    first.save(None)
    open_run(tiny_run(tmp_path, "device=cuda"), resume=True, quiet=True).fit()
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "straight"), rel=1e-4)
