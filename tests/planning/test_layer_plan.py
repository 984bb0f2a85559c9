"""The plan's numbers are the model's own: parameters, cache bytes and FLOPs of models that
exist.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.helpers import TINY_VISION, random_model, random_tokens, tiny_args
from transom.attention.mask import allowed
from transom.attention.reference import reference
from transom.base.errors import RequestError
from transom.config.layer_args import LayerRule
from transom.config.presets import PRESETS, preset
from transom.layers import linear
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.planning import counts
from transom.planning.layer_plan import groups, index_words, plan

MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
MOE = {
    "num_experts": 4,
    "top_k": 2,
    "hidden_dim": 20,
    "shared_expert": True,
    "interleave_moe_layer_step": 2,
}


OPTIONS = {
    "tied": {"tie_embeddings": True},
    "biases and norms": {
        "norm": "layer",
        "norm_placement": "both",
        "qkv_bias": True,
        "out_bias": True,
        "ffn_bias": True,
        "attn_sinks": True,
        "qk_norm": "projection",
        "ffn_gated": False,
    },
    "context": {"context_dim": 24, "qk_norm": "head", "out_bias": True, "norm_placement": "post"},
    "latent": {"n_kv_heads": None, "mla_args": {**MLA, "q_lora_rank": 12}, "qkv_bias": True},
    "latent, direct queries": {"n_kv_heads": None, "mla_args": MLA},
    "experts": {
        "ffn_bias": True,
        "moe_args": {
            **MOE,
            "router_bias": True,
            "expert_bias": True,
            "shared_hidden_dim": 28,
            "routing": "biased_sigmoid",
        },
    },
    "labels": {"head": {"kind": "classification", "num_labels": 3}},
    "embedding": {"head": {"kind": "embedding"}},
    "images": {"vision_args": TINY_VISION},
}


@pytest.mark.parametrize("name", [*PRESETS, *OPTIONS])
def test_parameters_sum_to_those_of_the_model(name):
    args = tiny_args(**OPTIONS[name]) if name in OPTIONS else preset(name)
    planned = plan(args)
    parts = planned.embedding_parameters + planned.output_parameters + planned.final_norm_parameters
    parts += planned.vision_parameters
    assert sum(layer.parameters for layer in planned.layers) + parts == planned.parameters
    assert planned.parameters == counts.parameters(args)
    with torch.device("meta"):
        model = LLM(args)
    assert planned.parameters == sum(p.numel() for p in model.parameters())
    for layer, block in zip(planned.layers, model.layers, strict=True):
        assert layer.parameters == sum(p.numel() for p in block.parameters())


@pytest.mark.parametrize("length", [5, 8, 50])
@pytest.mark.parametrize("kind", ["float32", "int8"])
@pytest.mark.parametrize("latent", [False, True])
def test_cache_bytes_are_those_of_a_real_cache(length, kind, latent):
    changes = {"n_kv_heads": None, "mla_args": MLA} if latent else {}
    args = tiny_args(
        n_layers=4, layer_pattern="SCFf", sliding_window=8, attention_chunk_size=12, **changes
    )
    model = random_model(args)
    cache = model.make_cache(1, length, slack=0, kv_bits=8 if kind == "int8" else 16)
    model(TransformerInput(random_tokens(1, length)), cache, inference=True)
    planned = plan(args, length)
    for layer, store in zip(planned.layers, cache.layers, strict=True):
        kept = [
            state[:, :-1] for state in (*store.states, *store.scales)
        ]  # the last slot takes the writes of padding
        assert layer.kv_bytes[kind] == sum(state.nbytes for state in kept)
        slots = kept[0].size(1)
        assert layer.kv_bytes_per_token[kind] * slots == layer.kv_bytes[kind]
    assert planned.kv_bytes[kind] == sum(layer.kv_bytes[kind] for layer in planned.layers)
    assert planned.kv_bytes["float32"] == 2 * planned.kv_bytes["bfloat16"]


def counted_flops(args, length, monkeypatch):
    """FLOPs of the products one forward really does, every score included."""
    monkeypatch.setattr(
        linear, "grouped_mm_works", lambda *_: False
    )  # the counter does not know the fused ones
    model = random_model(args)
    model.attend = reference
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(TransformerInput(random_tokens(1, length)))
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_args": MOE},
        {"tie_embeddings": True},
        {"ffn_gated": False},
        {"n_kv_heads": None, "mla_args": {**MLA, "q_lora_rank": 12}},
    ],
)
def test_flops_are_those_the_products_cost(changes, monkeypatch):
    args = tiny_args(
        layer_pattern="B", **changes
    )  # every query sees every key, so no score is masked out
    planned = plan(args, 11)
    assert planned.flops_per_token * 11 == counted_flops(args, 11, monkeypatch)
    assert planned.training_flops_per_token == 3 * planned.flops_per_token
    layers = sum(layer.flops_per_token for layer in planned.layers)
    assert layers + planned.output_flops_per_token == planned.flops_per_token


def test_flops_leave_out_masked_scores(monkeypatch):
    args, length = (
        tiny_args(n_layers=4, layer_pattern="FSCf", sliding_window=3, attention_chunk_size=4),
        11,
    )
    positions = torch.arange(length)[None]
    hidden = sum(int((~allowed(layer.rule, positions, positions)).sum()) for layer in args.layers)
    masked = 4 * hidden * args.n_heads * args.head_size
    expected = counted_flops(args, length, monkeypatch) - masked
    assert plan(args, length).flops_per_token * length == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("length", [1, 4, 5, 13])
@pytest.mark.parametrize(
    "rule", [LayerRule(), LayerRule("window", 5), LayerRule("chunk", 5), LayerRule("full")]
)
def test_keys_seen_is_what_the_rule_allows(rule, length):
    letter = {"causal": "F", "window": "S", "chunk": "C", "full": "B"}[rule.kind]
    sizes = {"S": {"sliding_window": 5}, "C": {"attention_chunk_size": 5}}.get(letter, {})
    positions = torch.arange(length)[None]
    expected = allowed(rule, positions, positions).sum() / length
    assert plan(tiny_args(layer_pattern=letter, **sizes), length).layers[
        0
    ].keys_seen == pytest.approx(float(expected))


def test_words():
    first, *_, last = plan(preset("llama4-scout")).layers
    assert (first.attention, last.attention) == ("chunk 8192", "causal")
    assert first.positions == "RoPE theta 500000 scaled x16"
    assert last.positions == "NoPE + temperature"
    assert first.heads == "40 q / 8 kv x 128"
    assert first.feed_forward == "MoE 16 x 8192, top 1 sigmoid + shared"
    assert (first.qk_norm, last.qk_norm) == (True, False)
    assert plan(preset("mistral-7b-v0.1")).layers[0].attention == "window 4096"
    assert plan(preset("demo")).layers[0].feed_forward == "SwiGLU 384"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"n_layers": 32}, ["0-31"]),
        ({"n_layers": 1}, ["0"]),
        ({"n_layers": 4, "layer_pattern": "FFff"}, ["0-1", "2-3"]),
        ({"n_layers": 8, "layer_pattern": "FFf"}, ["0-1, 3-4, 6-7", "2, 5"]),
        (
            {"n_layers": 20, "nope_layer_interval": 4},
            ["0-2, 4-6, ... 16-18 (15 layers)", "3, 7, ... 19 (5 layers)"],
        ),
        # Uneven runs are all named: the dots would promise a rhythm that is not there.
        (
            {"n_layers": 11, "layer_pattern": list("FfFfFfFfFFf")},
            ["0, 2, 4, 6, 8-9", "1, 3, 5, 7, 10"],
        ),
    ],
)
def test_equal_layers_share_a_row(changes, expected):
    found = groups(plan(tiny_args(**changes)).layers)
    assert [index_words(tuple(one.index for one in alike)) for alike in found] == expected


def test_a_length_below_one_is_refused():
    with pytest.raises(RequestError, match=r"length: got 0"):
        plan(tiny_args(), 0)
