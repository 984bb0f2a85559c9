"""Rotary positions against transformers' own functions, and in float32 whatever the model's
dtype.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.llama4 import modeling_llama4

from tests.helpers import random_model, random_tokens, tiny_args
from transom.config.layer_args import RopeArgs, RopeScaling
from transom.layers.inputs import TransformerInput
from transom.layers.rope import (
    apply_rotary_emb,
    apply_scaling,
    base_frequencies,
    frequencies,
    precompute_freqs_cis,
    reshape_for_broadcast,
    rotary_table,
    rotate,
)

LLAMA31 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def hf_config(**rope: object) -> LlamaConfig:
    return LlamaConfig(hidden_size=64, num_attention_heads=1, head_dim=64, rope_parameters=rope)


def heads(seed: int) -> torch.Tensor:
    return torch.randn(2, 9, 3, 64, generator=torch.Generator().manual_seed(seed))


def test_halves_turn_as_transformers_llama_does():
    q, k = heads(0), heads(1)
    # Its angles are float32, so they are wrong by more than 1e-5 from some hundred positions on.
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8], [10, 11, 12, 90, 91, 92, 120, 121, 122]])
    cos, sin = LlamaRotaryEmbedding(hf_config(rope_type="default", rope_theta=10000.0))(
        q, positions
    )
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    table = rotary_table(positions, RopeArgs(64, 10000.0, "halves"))
    torch.testing.assert_close(rotate(q, table, "halves"), expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(k, table, "halves"), expected[1], rtol=1e-5, atol=1e-5)


def test_interleaved_turns_as_transformers_llama4_does():
    """Its complex product, our complex twin and the real-valued table are one rotation."""
    q, k = heads(0), heads(1)
    angles = torch.outer(
        torch.arange(9).double(), 500000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    )
    turns = torch.polar(torch.ones_like(angles), angles).to(torch.complex64)
    torch.testing.assert_close(precompute_freqs_cis(64, 9, 500000.0), turns)
    expected = modeling_llama4.apply_rotary_emb(q, k, turns[None])
    for mine, theirs in zip(apply_rotary_emb(q, k, turns), expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    table = rotary_table(torch.arange(9)[None], RopeArgs(64, 500000.0))
    torch.testing.assert_close(rotate(q, table, "interleaved"), expected[0], rtol=1e-5, atol=1e-5)


def test_reshape_for_broadcast_refuses_a_table_of_another_length():
    with pytest.raises(ValueError, match=r"\(8, 32\)"):
        reshape_for_broadcast(torch.zeros(8, 32), torch.zeros(2, 9, 3, 32))


def test_llama3_scaling_is_transformers():
    expected, attention_factor = ROPE_INIT_FUNCTIONS["llama3"](hf_config(**LLAMA31), "cpu")
    assert attention_factor == 1.0
    plain = base_frequencies(64, 500000.0)
    assert 0 < (expected != plain).sum() < 32, "the case must have scaled and kept frequencies"
    torch.testing.assert_close(apply_scaling(plain, 8.0, 4.0), expected)
    rope = RopeArgs(64, 500000.0, "halves", RopeScaling(factor=8.0))
    torch.testing.assert_close(frequencies(rope), expected)
    scaled = precompute_freqs_cis(64, 2, 500000.0, use_scaled=True)
    torch.testing.assert_close(scaled[1].angle(), expected)


@pytest.mark.parametrize("factor", [1.0, 2.3])
def test_equal_low_and_high_factor_keep_or_stretch_and_never_blend(factor):
    border = [
        torch.tensor([2 * torch.pi * factor / 8192])
    ]  # wavelengths on the border, and next to it
    for _ in range(4):
        border.append(border[-1].nextafter(torch.ones(1)))
    freqs = torch.cat((base_frequencies(128, 500000.0), *border))
    scaled = apply_scaling(freqs, 16.0, factor, low_freq_factor=factor)
    assert ((scaled == freqs) | (scaled == freqs / 16.0))[:64].all()
    assert ((scaled >= freqs / 16.0) & (scaled <= freqs)).all(), (
        "0 / 0 is on this border, and rounding makes it any number"
    )


def test_a_rotation_of_the_millionth_position_is_exact():
    """Turning from position p - d to p is a rotation by d, wherever p is."""
    rope = RopeArgs(64, 10000.0)
    positions = torch.arange(999_000, 1_000_000)[None]
    angles = positions[0, :, None, None].double() * frequencies(rope).double()
    cos, sin = rotary_table(positions, rope)
    torch.testing.assert_close(cos[0].double(), angles.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0].double(), angles.sin(), rtol=0, atol=1e-7)


def test_bfloat16_model_still_tells_far_positions_apart():
    """bfloat16 has 8 bits of mantissa: 70000 and its neighbours are one number there."""
    model = random_model(tiny_args(rope_theta=500000.0)).to(torch.bfloat16)
    tokens = random_tokens(1, 12)
    near, far = (
        model(TransformerInput(tokens, tokens_position=at)).logits.float() for at in (0, 70000)
    )
    collapsed = model(
        TransformerInput(tokens, tokens_position=torch.full((12,), 70000))
    ).logits.float()
    # Only distances count, so a shift changes nothing but rounding.
    assert (far - near).norm() < 0.1 * (collapsed - near).norm()
