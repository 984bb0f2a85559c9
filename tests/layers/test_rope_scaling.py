"""Every rotary scaling against transformers' own functions, and the choice by length that the model
makes.
"""

from __future__ import annotations

import re

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.configuration_llama import LlamaConfig

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.config.layer_args import RopeArgs, RopeScaling
from transom.inference.loop import generate as transom_generate
from transom.layers.inputs import TransformerInput
from transom.layers.rope import attention_factor, frequencies, rotary_table, rotate

ORIGINAL = 64
SHORT, LONG = tuple(1.0 + 0.1 * i for i in range(16)), tuple(2.0 + 0.3 * i for i in range(16))
YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
CASES = {
    "linear": ({"rope_type": "linear", "factor": 4.0}, {"kind": "linear", "factor": 4.0}),
    "dynamic": (
        {"rope_type": "dynamic", "factor": 2.0},
        {"kind": "dynamic", "factor": 2.0, "original_max_seq_len": 4 * ORIGINAL},
    ),
    "yarn": ({"rope_type": "yarn", **YARN}, {"kind": "yarn", "factor": 4.0}),
    "yarn ends": (
        {"rope_type": "yarn", **YARN, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
        {"kind": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 8.0, "beta_slow": 2.0},
    ),
    "yarn mscale": (
        {"rope_type": "yarn", **YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
        {"kind": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3},
    ),
    "yarn factor": (
        {"rope_type": "yarn", **YARN, "attention_factor": 1.7},
        {"kind": "yarn", "factor": 4.0, "attention_factor": 1.7},
    ),
    "longrope": (
        {
            "rope_type": "longrope",
            "original_max_position_embeddings": ORIGINAL,
            "short_factor": list(SHORT),
            "long_factor": list(LONG),
        },
        {"kind": "longrope", "factor": 4.0, "short_factor": SHORT, "long_factor": LONG},
    ),
}


@pytest.mark.parametrize("length", [8, ORIGINAL, ORIGINAL + 1, 4 * ORIGINAL, 10 * ORIGINAL])
@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_attention_factor_are_transformers(case, length):
    theirs, ours = CASES[case]
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=4,
        max_position_embeddings=4 * ORIGINAL,
        rope_parameters={"rope_theta": 10000.0, **theirs},
    )
    expected, factor = ROPE_INIT_FUNCTIONS[theirs["rope_type"]](config, "cpu", seq_len=length)
    scaling = RopeScaling(**{"original_max_seq_len": ORIGINAL, **ours})
    torch.testing.assert_close(
        frequencies(RopeArgs(32, 10000.0, "halves", scaling), length), expected
    )
    assert attention_factor(scaling) == pytest.approx(factor, abs=1e-12)
    cos, sin = rotary_table(torch.tensor([[3]]), RopeArgs(32, 10000.0, "halves", scaling), length)
    torch.testing.assert_close(cos.flatten(), (3 * expected).cos() * factor)
    torch.testing.assert_close(sin.flatten(), (3 * expected).sin() * factor)


@pytest.mark.parametrize("layout", ["interleaved", "halves"])
def test_partial_rotary_turns_the_first_features_and_passes_the_rest(layout):
    x = torch.randn(1, 5, 2, 12, generator=torch.Generator().manual_seed(0))
    table = rotary_table(torch.arange(5)[None], RopeArgs(8))
    turned = rotate(x, table, layout)
    assert torch.equal(turned[..., 8:], x[..., 8:])
    torch.testing.assert_close(turned[..., :8], rotate(x[..., :8].contiguous(), table, layout))


def by_length(kind: str) -> dict:
    factors = {"short_factor": [1.0, 2.0, 1.5, 3.0], "long_factor": [4.0, 1.0, 2.5, 6.0]}
    scaling = {"kind": kind, "factor": 2.0, "original_max_seq_len": 16}
    return {"rope_scaling": {**scaling, **(factors if kind == "longrope" else {})}}


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("count", [16, 17, 24])
def test_a_cache_chooses_by_its_capacity_and_equals_a_call_of_that_length(kind, count):
    model, tokens = random_model(tiny_args(**by_length(kind))), random_tokens(2, count)
    whole = model(TransformerInput(tokens)).logits
    cache = model.make_cache(2, count)
    parts = [model(TransformerInput(piece), cache).logits for piece in tokens.split(5, 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
    if kind == "dynamic" or count == 16:  # longrope has two choices only
        other = model(TransformerInput(tokens), model.make_cache(2, 40)).logits
        assert (other - whole).abs().max() > 1e-3, "the case must tell one choice from another"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_generation_that_outgrows_the_original_length_computes_all_keys_again(kind, capsys):
    """Each new token is the one a whole call over the frequencies then due would choose."""
    model, tokens = random_model(tiny_args(**by_length(kind))), random_tokens(2, 11)
    rows = transom_generate(model, [tokens[0].tolist(), tokens[1, :8].tolist()], 20)
    assert "16 tokens: the original length" in capsys.readouterr().err
    for row, real in zip(rows, (11, 8), strict=True):
        for count in (11, 15, 16, 17, 24):  # of the longest row, whose length decides
            so_far = torch.cat([row[:real], row[11:count]])[None]
            cache = model.make_cache(1, 16 if count <= 16 else 31)
            expected = model(TransformerInput(so_far, logits="last"), cache).logits.argmax()
            assert row[count] == expected, f"after {count} tokens"


def test_a_start_counts_towards_the_length_with_padding_too():
    model, tokens = random_model(tiny_args(**by_length("longrope"))), random_tokens(2, 6)
    plain = model(TransformerInput(tokens, tokens_position=14)).logits
    for at in (14, torch.arange(14, 20)):
        padded = model(
            TransformerInput(tokens, tokens_position=at, lengths=torch.tensor([6, 6]))
        ).logits
        torch.testing.assert_close(padded, plain, rtol=1e-5, atol=1e-5)


def test_rows_that_have_finished_outgrow_nothing(capsys):
    model = random_model(tiny_args(**by_length("longrope")))
    prompts = [random_tokens(1, 4)[0].tolist(), random_tokens(1, 14, seed=1)[0].tolist()]
    free = transom_generate(model, prompts, 10)
    capsys.readouterr()
    stop = int(free[1, 14])
    rows = transom_generate(model, prompts, 10, stop_tokens=[stop])
    assert "original length" not in capsys.readouterr().err, "the longer row has stopped before it"
    alone = transom_generate(model, [prompts[0]], 10, stop_tokens=[stop])
    assert rows[0, 14:].tolist() == alone[0, 4:].tolist()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"head_dim": 2, "rope_scaling": {"kind": "dynamic"}},
            "rope_scaling.kind: got 'dynamic'",
        ),
        (
            {"rope_theta": 1.0, "rope_scaling": {"kind": "yarn"}},
            "rope_theta: got 1.0; expected more than 1",
        ),
        (
            {"rope_scaling": {"kind": "yarn", "attention_factor": -1.0}},
            "attention_factor: got -1.0",
        ),
        (
            {"rope_scaling": {"kind": "linear", "attention_factor": 1.5}},
            "expected none unless kind is yarn or longrope",
        ),
        (
            {
                "rope_scaling": {
                    "kind": "longrope",
                    "short_factor": [1.0] * 4,
                    "long_factor": [0.0] * 4,
                }
            },
            "expected a number of more than 0",
        ),
        ({"rope_scaling_factor": 4.0}, "unless use_scaled_rope is true"),
    ],
)
def test_scalings_without_a_value_are_refused(changes, words):
    with pytest.raises(RequestError, match=re.escape(words)):
        tiny_args(**changes)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_packing_across_the_switch_is_refused(kind):
    model = random_model(tiny_args(**by_length(kind)))
    fits = model(TransformerInput(random_tokens(1, 30), sizes=[16, 14])).logits
    torch.testing.assert_close(
        fits[:, :16], model(TransformerInput(random_tokens(1, 30)[:, :16])).logits
    )
    with pytest.raises(RequestError, match=f"sizes: got documents of up to 17 tokens.*{kind}"):
        model(TransformerInput(random_tokens(1, 30), sizes=[17, 13]))


def test_local_layers_have_their_own_theta_without_scaling():
    scaling = {"kind": "linear", "factor": 8.0}
    args = tiny_args(
        layer_pattern="SF", sliding_window=8, rope_local_theta=100.0, rope_scaling=scaling
    )
    local, whole = (layer.rope for layer in args.layers)
    assert (local.theta, local.scaling) == (100.0, None)
    assert (whole.theta, whole.scaling.factor) == (10000.0, 8.0)
