"""Arguments: strict, expanded once, counted right, and free of torch."""

from __future__ import annotations

import json

import pytest
import torch

from tests.helpers import run_python, tiny_args
from transom.attention.mask import allowed
from transom.base.errors import RequestError
from transom.config.layer_args import LayerRule, RopeScaling, TemperatureArgs
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS, preset
from transom.models.llm import LLM
from transom.planning.counts import keys_seen, parameters

LLAMA4_LIKE = {
    "attention_chunk_size": 16,
    "nope_layer_interval": 4,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
    "floor_scale": 4.0,
    "use_scaled_rope": True,
    "rope_scaling_factor": 16.0,
    "rope_high_freq_factor": 1.0,
    "n_layers": 8,
    "moe_args": {"num_experts": 4, "top_k": 1, "routing": "sigmoid", "shared_expert": True},
}


@pytest.mark.parametrize(
    ("data", "key", "meant"),
    [
        ({"n_kv_head": 2}, "n_kv_head:", "n_kv_heads"),
        ({"moe_args": {"topk": 1}}, "moe_args.topk:", "top_k"),
    ],
)
def test_unknown_key_names_the_nearest(data, key, meant):
    with pytest.raises(RequestError) as error:
        ModelArgs.from_dict(data)
    assert key in str(error.value)
    assert f"did you mean {meant!r}" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "field", "value", "accepted"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads", "3", "divisor of n_heads = 4"),
        ({"dim": 30}, "n_heads", "4", "divisor of dim = 30"),
        ({"head_dim": 7}, "head_dim", "7", "even"),
        ({"sliding_window": 0}, "sliding_window", "0", "1 or more"),
        ({"nope_layer_interval": 0}, "nope_layer_interval", "0", "1 or more"),
        ({"moe_args": {"num_experts": 2, "top_k": 3}}, "moe_args.top_k", "3", "num_experts = 2"),
        (
            {"sliding_window": 4, "attention_chunk_size": 4},
            "attention_chunk_size",
            "4",
            "layer_pattern",
        ),
        ({"layer_pattern": "SF"}, "sliding_window", "None", "S layers"),
        ({"layer_pattern": "F", "sliding_window": 4}, "sliding_window", "4", "no S layer"),
        ({"layer_pattern": "FX"}, "layer_pattern", "'FX'", "F, S, C, B"),
        ({"layer_pattern": ["F"]}, "layer_pattern", "['F']", "one letter per layer (2)"),
        (
            {"layer_pattern": "F", "nope_layer_interval": 2},
            "nope_layer_interval",
            "2",
            "lower case",
        ),
        (
            {"rope_layout": "halfs"},
            "rope_layout",
            "'halfs'",
            "interleaved, halves; did you mean 'halves'",
        ),
        (
            {"rope_high_freq_factor": 0.5},
            "rope_high_freq_factor",
            "0.5",
            "rope_low_freq_factor or more",
        ),
        ({"dim": "wide"}, "dim", "'wide'", "a whole number"),
        ({"tie_embeddings": 1}, "tie_embeddings", "1", "true or false"),
        ({"moe_args": 8}, "moe_args", "8", "a mapping"),
    ],
)
def test_impossible_value_names_field_value_and_what_is_accepted(changes, field, value, accepted):
    with pytest.raises(RequestError) as error:
        tiny_args(**changes)
    sentence = str(error.value)
    assert sentence.startswith(field)
    assert value in sentence
    assert accepted in sentence


@pytest.mark.parametrize("data", [LLAMA4_LIKE, {"layer_pattern": ["F", "f"]}, *PRESETS.values()])
def test_json_round_trip_changes_nothing(data):
    args = ModelArgs.from_dict({"n_layers": 2, **data})
    again = ModelArgs.from_dict(json.loads(json.dumps(args.to_dict())))
    assert again == args
    assert again.layers == args.layers
    assert again.to_dict() == args.to_dict()


@pytest.mark.parametrize(
    ("changes", "letters"),
    [
        ({}, "FFFFFF"),
        ({"sliding_window": 4}, "SSSSSS"),
        ({"attention_chunk_size": 4, "nope_layer_interval": 3}, "CCfCCf"),
        ({"nope_layer_interval": 2}, "FfFfFf"),
        ({"layer_pattern": "SSSSf", "sliding_window": 4}, "SSSSfS"),
        ({"layer_pattern": list("FBfbFF")}, "FBfbFF"),
    ],
)
def test_pattern_expands_to_one_letter_per_layer(changes, letters):
    assert tiny_args(n_layers=6, **changes).pattern == letters


def test_llama4_layers_resolve_as_its_reference_does():
    layers = tiny_args(**LLAMA4_LIKE).layers
    local, nope = layers[2], layers[3]  # every 4th is NoPE, the last of each group
    assert [layer.rope is None for layer in layers] == [False, False, False, True] * 2
    assert (local.rule, nope.rule) == (LayerRule("chunk", 16), LayerRule("causal"))
    assert (local.use_qk_norm, nope.use_qk_norm) == (True, False)
    assert (local.temperature, nope.temperature) == (None, TemperatureArgs(0.1, 4.0))
    assert local.rope.scaling == RopeScaling(factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0)


def test_hidden_dims_of_the_worked_examples():
    # meta llama3: 2 * 4 * 64 / 3 = 170, * 1.3 = 221, up to 16s = 224
    assert (
        tiny_args(dim=64, hidden_dim=None, ffn_dim_multiplier=1.3, multiple_of=16).dense_hidden_dim
        == 224
    )
    # meta llama4: 4 * 64 * 2 / 3 = 170, * 1.2 = 204, / 2 = 102, up to 16s = 112; its dense layers
    # 208
    moe = {"num_experts": 4, "top_k": 1, "interleave_moe_layer_step": 2}
    args = tiny_args(dim=64, hidden_dim=None, ffn_dim_multiplier=1.2, multiple_of=16, moe_args=moe)
    assert args.layers[0].moe is None
    assert (args.layers[0].hidden_dim, args.layers[1].moe.hidden_dim) == (208, 112)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"n_kv_heads": 1, "head_dim": 12},
        {"hidden_dim": None, "ffn_dim_multiplier": 1.3, "multiple_of": 16},
        {"tie_embeddings": True},
        {"moe_args": {"num_experts": 4, "hidden_dim": 24, "shared_expert": True}},
        {"moe_args": {"num_experts": 4, "interleave_moe_layer_step": 2}, "n_layers": 3},
        LLAMA4_LIKE,
    ],
)
def test_counted_parameters_are_those_of_the_real_model(changes):
    args = tiny_args(**changes)
    with torch.device("meta"):
        model = LLM(args)
    assert parameters(args) == sum(weight.numel() for weight in model.parameters())
    # What one token visits: the same without the experts it does not.
    idle = sum(
        weight.numel()
        * (args.moe_args.num_experts - args.moe_args.top_k)
        // args.moe_args.num_experts
        for name, weight in model.named_parameters()
        if ".experts." in name
    )
    assert parameters(args, active_only=True) == parameters(args) - idle


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3.1-8b", 8_030_261_248),
        ("mistral-7b-v0.1", 7_241_732_096),
        ("mixtral-8x7b", 46_702_792_704),
        ("qwen3-8b", 8_190_735_360),
        ("gemma2-9b", 9_241_705_984),
        ("gpt-oss-20b", 20_914_757_184),
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_presets_have_the_published_number_of_parameters(name, published):
    assert parameters(preset(name)) == published


@pytest.mark.parametrize(
    "changes", [{"layer_pattern": "FB"}, {"sliding_window": 5}, {"attention_chunk_size": 6}]
)
@pytest.mark.parametrize("length", [1, 5, 6, 7, 20])
def test_keys_seen_is_the_mean_of_the_mask(changes, length):
    positions = torch.arange(length)[None]
    for layer in tiny_args(**changes).layers:
        seen = allowed(layer.rule, positions, positions).sum().item() / length
        assert keys_seen(layer, length) == pytest.approx(seen, abs=1e-12)


def test_arguments_and_plans_import_no_torch():
    code = (
        "import sys, transom, transom.config.model_args, transom.config.presets, "
        "transom.planning.counts as counts\ncounts.parameters(transom.preset('llama3-8b'))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    run_python(code)
