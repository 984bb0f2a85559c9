"""Folders written for transformers open there as the same model; shapes it cannot say are refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints.families import FAMILIES, random_ids, tiny_hf
from tests.helpers import random_model, random_tokens, tiny_args
from transom.checkpoints.hf_export import WRITABLE, args_to_hf
from transom.checkpoints.load import load, save
from transom.errors import RequestError
from transom.model import TransformerInput


def family_of(variant):
    return variant.partition("-")[0]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    model = tiny_hf(request.param)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


def test_export_opens_in_transformers(pair, tmp_path):
    variant, theirs, folder = pair
    mine = load(folder)
    if family_of(variant) not in WRITABLE:
        with pytest.raises(RequestError, match="save as native"):
            save(mine, tmp_path, format="hf")
        return
    save(mine, tmp_path, format="hf")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for length in (12, 40):  # not bit-equal: a Phi-3 without partial rotation is written as the Mistral it is
        ids = random_ids(2, length)
        assert torch.allclose(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_export_reads_back_as_the_same_model(pair, tmp_path, capsys):
    variant, _, folder = pair
    if family_of(variant) in WRITABLE:
        first = load(folder)
        save(first, tmp_path, format="hf")
        assert capsys.readouterr().err == "", "a key was written that no reader of ours knows"
        ids = random_ids()
        same = load(tmp_path)(TransformerInput(ids)).logits
        assert torch.equal(same, first(TransformerInput(ids)).logits)


def test_native_round_trip_is_byte_identical(pair, tmp_path):
    _, _, folder = pair
    save(load(folder), tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"qkv_bias": True},
        {"qk_norm": "head"},
        {"qk_norm": "projection", "norm": "rms_wide", "norm_placement": "post"},
        {"rotary_fraction": 0.5},
    ],
)
def test_export_permutes_interleaved_weights(changes, tmp_path):
    mine = random_model(tiny_args(rope_layout="interleaved", **changes))
    save(mine, tmp_path, format="hf")
    ids = random_tokens(2, 17)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert torch.allclose(mine(TransformerInput(ids)).logits, theirs, atol=1e-4, rtol=1e-4)


MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 24}


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "layer"},
        {"activation": "relu", "ffn_gated": False},
        {"use_qk_norm": True},
        {"qk_norm": "head", "norm_placement": "both"},
        {"attn_sinks": True},
        {"logit_scale": 0.5},
        {"embedding_scale": 2.0},
        {"mup_base_dim": 16},
        {"nope_layer_interval": 2},
        {"attention_chunk_size": 8},
        {"layer_pattern": "B"},
        {"rope_local_theta": 5.0, "layer_pattern": "SF", "sliding_window": 4},
        {"context_dim": 16},
        {"head": {"kind": "classification"}},
        {"moe_args": {**MOE, "shared_expert": True}},
        {"moe_args": {**MOE, "balance": "bias"}},
        {"moe_args": {**MOE, "routing": "sigmoid"}},
        {"moe_args": {**MOE, "routing": "sigmoid", "shared_expert": True}, "rope_layout": "halves"},
        {"mla_args": {"kv_lora_rank": 8}, "n_kv_heads": None},
    ],
)
def test_a_shape_without_a_family_is_refused(changes):
    with pytest.raises(RequestError, match="save as native"):
        args_to_hf(tiny_args(**changes))


@pytest.mark.parametrize(
    ("changes", "family"),
    [
        ({"moe_args": {**MOE, "aux_loss_coef": 0.5, "jitter": 0.1, "z_loss_coef": 0.1}}, "mixtral"),
        ({"moe_args": {**MOE, "first_dense_layers": 1}, "qk_norm": "head"}, "qwen3_moe"),
        ({"sliding_window": 4, "layer_pattern": "FS", "qkv_bias": True}, "qwen2"),
    ],
)
def test_training_settings_do_not_stand_in_the_way(changes, family):
    assert args_to_hf(tiny_args(**changes))["model_type"] == family


def test_both_spellings_are_written():
    config = args_to_hf(tiny_args(rope_scaling={"kind": "yarn", "factor": 2.0, "original_max_seq_len": 64}))
    assert json.loads(json.dumps(config["rope_parameters"]))["rope_type"] == "yarn"
    assert config["rope_scaling"]["factor"] == 2.0 and config["rope_theta"] == 10000.0
