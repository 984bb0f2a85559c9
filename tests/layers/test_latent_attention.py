"""Latent attention: its two forms are twins, with a cache, in output and in gradients."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from transom.layers import latent_attention
from transom.layers.inputs import TransformerInput
from transom.layers.latent_attention import LatentAttention

MLA = {
    "kv_lora_rank": 24,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
}
SHAPES = {
    "low-rank queries": {"mla_args": MLA},
    "direct queries": {"mla_args": {**MLA, "q_lora_rank": None}},
    "window": {"mla_args": MLA, "sliding_window": 5},
    "scaled": {"mla_args": MLA, "softmax_scale": 0.5, "attn_softcap": 3.0},
    "tuned": {
        "mla_args": MLA,
        "layer_pattern": "Ff",
        "attn_temperature_tuning": True,
        "floor_scale": 4.0,
    },
}


def model_of(shape: str):
    return random_model(tiny_args(n_kv_heads=None, **SHAPES[shape])).double()


def force(monkeypatch, absorbed: bool) -> None:
    monkeypatch.setattr(latent_attention, "absorbing_is_cheaper", lambda *_: absorbed)


@pytest.mark.parametrize("shape", SHAPES)
def test_expanded_and_absorbed_are_twins(shape, monkeypatch):
    model, tokens, results = model_of(shape), random_tokens(2, 11), []
    for absorbed in (False, True):
        force(monkeypatch, absorbed)
        model.zero_grad()
        logits = model(TransformerInput(tokens, lengths=torch.tensor([11, 7]))).logits
        logits[0].sin().sum().backward()
        results.append((logits, *(p.grad for p in model.parameters())))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_equals_uncached(shape, absorbed, monkeypatch):
    model, tokens = model_of(shape), random_tokens(2, 14)
    whole = model(TransformerInput(tokens)).logits
    force(monkeypatch, absorbed)
    cache = model.make_cache(2)
    parts = [
        model(TransformerInput(piece), cache).logits for piece in tokens.split([6, 3, 1, 1, 3], 1)
    ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-9, atol=1e-9)


def test_the_cache_holds_the_latent_and_one_rotary_key_per_token():
    model = model_of("direct queries")
    cache = model.make_cache(1, 10)
    model(TransformerInput(random_tokens(1, 3)), cache)
    (state,) = cache.layers[0].states
    assert state.shape == (1, 11, 1, 24 + 4)
    assert model.args.layers[0].kv_values_per_token == 28


def test_prefill_expands_and_decoding_absorbs(monkeypatch):
    called = []
    for form in ("expanded", "absorbed"):
        plain = getattr(LatentAttention, form)
        monkeypatch.setattr(
            LatentAttention,
            form,
            lambda *a, form=form, plain=plain: called.append(form) or plain(*a),
        )
    model = model_of("low-rank queries")
    cache = model.make_cache(1)
    model(TransformerInput(random_tokens(1, 40)), cache)
    assert called == ["expanded"] * 2
    model(TransformerInput(random_tokens(1, 1)), cache)
    assert called[2:] == ["absorbed"] * 2
