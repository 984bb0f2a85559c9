"""Folders written for transformers open there as the same model; shapes it cannot say are
refused.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Llama4ForConditionalGeneration

from tests.checkpoints.consolidated import PARAMS, cut, meta_state, twin, write_meta
from tests.checkpoints.consolidated import VOCAB as META_VOCAB
from tests.checkpoints.families import FAMILIES, VOCAB, random_ids, tiny_hf
from tests.checkpoints.test_parity import image_call
from tests.helpers import TINY_VISION, random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.convert import convert
from transom.checkpoints.families.hf import args_to_hf
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM


def theirs_of(folder, family=""):
    kind = Llama4ForConditionalGeneration if family == "llama4" else AutoModelForCausalLM
    return kind.from_pretrained(folder, attn_implementation="eager")


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request, tmp_path_factory):
    model = tiny_hf(request.param)
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    return request.param, model, folder


def test_export_opens_in_transformers(pair, tmp_path):
    variant, theirs, folder = pair
    save(load(folder), tmp_path, format="hf")
    again = theirs_of(tmp_path, variant)
    for length in (
        12,
        40,
    ):  # not bit-equal: a Phi-3 without partial rotation is written as the Mistral it is
        ids = random_ids(2, length)
        assert torch.allclose(again(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_export_reads_back_as_the_same_model(pair, tmp_path, capsys):
    _, _, folder = pair
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


def test_a_model_with_images_is_written_whole(tmp_path):
    """Every tensor of transformers under its own name, bytes that do not change on the way, and
    equal images.
    """
    theirs, (ids, pixels) = tiny_hf("llama4"), image_call()
    theirs.save_pretrained(tmp_path / "theirs")
    save(load(tmp_path / "theirs"), tmp_path / "a", format="hf")
    save(load(tmp_path / "a"), tmp_path / "b", format="hf")
    convert(tmp_path / "theirs", tmp_path / "c", "hf")
    for name in ("config.json", "model.safetensors"):
        assert len({(tmp_path / folder / name).read_bytes() for folder in "abc"}) == 1
    expected, found = (
        load_file(tmp_path / folder / "model.safetensors") for folder in ("theirs", "a")
    )
    assert expected.keys() == found.keys() and all(
        torch.equal(found[key], expected[key]) for key in expected
    )
    again = theirs_of(tmp_path / "a", "llama4")
    assert torch.equal(
        again(input_ids=ids, pixel_values=pixels).logits,
        theirs(input_ids=ids, pixel_values=pixels).logits,
    )


def test_images_of_metas_format_are_converted(tmp_path):
    kind, (ids, pixels) = "llama4-vision", image_call()
    theirs, params = twin(kind), PARAMS[kind]
    params = {**params, "vision_args": {**params["vision_args"], "image_token": META_VOCAB - 1}}
    folder = write_meta(tmp_path / "meta", params, cut(kind, meta_state(kind, theirs), 2))
    convert(folder, tmp_path / "hf", "hf")
    again = theirs_of(tmp_path / "hf", "llama4")
    ids = torch.where(ids == VOCAB - 1, META_VOCAB - 1, ids % (META_VOCAB - 1))
    logits = [one(input_ids=ids, pixel_values=pixels).logits for one in (again, theirs)]
    assert torch.allclose(*logits, atol=1e-5, rtol=0)


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
LLAMA4 = {"moe_args": {**MOE, "routing": "sigmoid", "shared_expert": True}}
VISION = {**TINY_VISION, "hidden_dim": 64, "image_token": 60}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm": "layer"}, "norm = 'layer'"),
        ({"activation": "relu", "ffn_gated": False}, "ffn_gated = False"),
        ({"use_qk_norm": True}, "use_qk_norm = True"),
        (
            {"qk_norm": "head", "norm_placement": "both"},
            "qk_norm = 'head', norm_placement = 'both'",
        ),
        ({"attn_sinks": True}, "attn_sinks = True"),
        ({"logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"embedding_scale": 2.0}, "embedding_scale = 2.0"),
        ({"mup_base_dim": 16}, "mup_base_dim = 16"),
        ({"nope_layer_interval": 2}, "nope_layer_interval = 2"),
        ({"attention_chunk_size": 8}, "attention_chunk_size = 8"),
        ({"layer_pattern": "B"}, "layer_pattern = 'B'"),
        (
            {"rope_local_theta": 5.0, "layer_pattern": "SF", "sliding_window": 4},
            "rope_local_theta = 5.0",
        ),
        ({"context_dim": 16}, "context_dim = 16"),
        ({"context_dim": 16, **LLAMA4, "vision_args": VISION}, "context_dim = 16"),
        ({"head": {"kind": "classification"}}, "has head"),
        ({"moe_args": {**MOE, "shared_expert": True}}, "moe_args.shared_expert = True"),
        ({"moe_args": {**MOE, "balance": "bias"}}, "moe_args.balance = 'bias'"),
        ({"moe_args": {**MOE, "routing": "sigmoid"}}, "moe_args.routing = 'sigmoid'"),
        ({**LLAMA4, "rope_layout": "halves"}, "rope_layout = 'halves'"),
        ({"mla_args": {"kv_lora_rank": 8}, "n_kv_heads": None}, "mla_args.kv_lora_rank = 8"),
        ({"dim": 30, "head_dim": 8}, "dim: got 30"),
        ({"vision_args": VISION}, "vision_args.image_size = 8"),
        (
            {**LLAMA4, "vision_args": {**VISION, "image_token": None}},
            "vision_args.image_token: got None",
        ),
        ({**LLAMA4, "vision_args": {**VISION, "hidden_dim": 24}}, "vision_args.hidden_dim = 24"),
        ({**LLAMA4, "vision_args": {**VISION, "adapter_dim": 8}}, "vision_args.adapter_dim = 8"),
    ],
)
def test_a_shape_without_a_family_is_refused(changes, said):
    with pytest.raises(RequestError) as caught:
        args_to_hf(tiny_args(**changes))
    assert said in str(caught.value) and "native" in str(caught.value)


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
    config = args_to_hf(
        tiny_args(rope_scaling={"kind": "yarn", "factor": 2.0, "original_max_seq_len": 64})
    )
    assert json.loads(json.dumps(config["rope_parameters"]))["rope_type"] == "yarn"
    assert config["rope_scaling"]["factor"] == 2.0 and config["rope_theta"] == 10000.0


def test_the_config_states_a_dtype_that_holds_all_weights(tmp_path):
    """transformers loads every weight in the dtype of the config."""
    model = random_model(tiny_args())
    model.tok_embeddings.to(torch.bfloat16)
    save(model, tmp_path, format="hf")
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    wide = theirs_of(tmp_path).model.layers[0].self_attn.q_proj.weight
    assert torch.equal(wide, load(tmp_path).layers[0].attention.wq.weight)


def test_a_model_without_values_is_refused_and_nothing_is_written(tmp_path):
    with torch.device("meta"):
        model = LLM(tiny_args())
    with pytest.raises(RequestError, match=r"tok_embeddings\.weight: device: got 'meta'"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("format", ["native", "hf", "meta"])
def test_weights_that_a_dtype_cannot_hold_are_not_written_as_infinite(tmp_path, format):
    model = random_model(tiny_args())
    weight = model.layers[1].attention.wo.weight.data
    weight[0, 0] = 65519.0  # rounds to the largest number of float16
    save(model, tmp_path / "fits", format, dtype="float16")
    weight[0, :3] = 1e6
    with pytest.raises(
        WorkError, match=r"layers\.1\.attention\.wo\.weight: 3 weights are too large for float16"
    ):
        save(model, tmp_path / "out", format, dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["fits"]
    save(model, tmp_path / "wide", format, dtype="bfloat16")
