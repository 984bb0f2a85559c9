"""Both spellings of a config mean the same model; what we cannot compute is refused; nothing is
passed over.
"""

import contextlib
import importlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints.families import _YARN as YARN
from tests.checkpoints.families import FAMILIES, random_ids, tiny_hf
from transom.base.errors import RequestError
from transom.checkpoints.families.hf import args_from_hf
from transom.checkpoints.families.registry import FAMILIES as KNOWN
from transom.checkpoints.load import load
from transom.layers.inputs import TransformerInput


def config_of(family):
    """The config that transformers 5 writes for a tiny model."""
    return json.loads(tiny_hf(family).config.to_json_string(use_diff=False))


def older(config):
    """The same in the words of transformers 4, as far as its files go: what was derived there is
    left out.
    """
    out = {key: older(value) if key.endswith("_config") else value for key, value in config.items()}
    rope = out.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        local, rope = rope["sliding_attention"], dict(rope["full_attention"])
        out["rope_local_base_freq"] = local["rope_theta"]
    if rope:
        rope = dict(rope)
        out["rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            out["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        kind = rope.pop("rope_type")
        out["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    for key in ("layer_types", "moe_layers", "swiglu_limit", "_sliding_window_pattern"):
        out.pop(key, None)
    if "swiglu_limit" in config:
        out["swiglu_limit"] = config["swiglu_limit"]
    if "no_rope_layers" in out:
        out["no_rope_layers"] = []
    if config.get("model_type") == "qwen3_moe":
        out["num_experts"] = out.pop("num_local_experts")
    if "dtype" in out:
        out["torch_dtype"] = out.pop("dtype")
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_both_spellings_mean_the_same(family):
    config = config_of(family)
    assert args_from_hf(older(config), "old") == args_from_hf(config, "new")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_key_of_the_class_is_read_or_known(family, capsys):
    args_from_hf(config_of(family), "config.json")
    assert capsys.readouterr().err == ""


CLASSES = {
    "gemma3_text": ("gemma3", "Gemma3TextConfig"),
    "llama4_text": ("llama4", "Llama4TextConfig"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeConfig"),
    "gpt_oss": ("gpt_oss", "GptOssConfig"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3Config"),
}


@pytest.mark.parametrize("family", [name for name in KNOWN if name not in ("gemma3", "llama4")])
def test_defaults_are_those_of_the_class(family):
    module, name = CLASSES.get(family, (family, f"{family.capitalize()}Config"))
    config = getattr(
        importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name
    )()
    full = json.loads(config.to_json_string(use_diff=False))
    # Released files always say these.
    said = {"norm_topk_prob", "vocab_size", "num_local_experts", *full} - set(
        KNOWN[family].defaults
    )
    silent = {key: value for key, value in full.items() if key in said and key != "rope_parameters"}
    for key in ("layer_types", "no_rope_layers", "moe_layers", "tie_word_embeddings"):
        silent.pop(key, None)
    assert args_from_hf(silent, "silent") == args_from_hf(full, "full")


REFUSED = [
    ("llama", {"model_type": "falcon"}, "model_type: got 'falcon'"),
    ("llama", {"model_type": None}, "model_type: got None"),
    ("llama", {"hidden_act": "xielu"}, "hidden_act: got 'xielu'"),
    ("llama", {"rope_theta": float("inf")}, "rope_theta: got inf; expected a finite number"),
    ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps: got nan"),
    (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": float("inf")}},
        "rope_scaling.factor: got inf",
    ),
    ("gpt_oss", {"max_position_embeddings": float("inf")}, "max_position_embeddings: got inf"),
    ("llama", {"hidden_size": None}, "dim: got None"),
    ("gemma2", {"query_pre_attn_scalar": None}, "not a gemma2 config"),
    ("llama", {"quantization_config": {"quant_method": "aqlm"}}, "'aqlm'"),
    ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type: got 'proportional'"),
    ("llama", {"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_type: got 'mrope'"),
    ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: got None"),
    (
        "llama",
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        "mrope_section",
    ),
    (
        "llama",
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        "partial_rotary_factor",
    ),
    ("llama", {"rope_parameters": {"full_attention": {}}}, "rope_parameters: got"),
    ("mistral", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ("qwen2", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention: got True"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping: got 50.0"),
    (
        "gemma3_text",
        {"rope_parameters": {"rope_type": "default"}},
        "one mapping for full_attention",
    ),
    ("llama4", {"tie_word_embeddings": True}, "tie_word_embeddings: got True"),
    ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "'mxfp4'"),
    ("gpt_oss", {"swiglu_alpha": 1.5}, "swiglu_alpha: got 1.5"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func: got 'softmax'"),
    ("deepseek_v3", {"topk_method": "greedy"}, "topk_method: got 'greedy'"),
    ("deepseek_v3", {"moe_layer_freq": 2}, "moe_layer_freq: got 2"),
]


@pytest.mark.parametrize(("family", "change", "words"), REFUSED)
def test_what_we_cannot_compute_is_refused_in_one_sentence(family, change, words):
    with pytest.raises(RequestError) as error:
        args_from_hf({**config_of(family), **change}, "config.json")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "change", "said"),
    [
        ("llama", {"pretraining_tp": 2}, ""),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 3.0, "finetuned": True}},
            "ignored: finetuned",
        ),
        (
            "qwen2",
            {"rope_parameters": {**YARN, "attn_factor": 1.0, "finetuned": True}},
            "ignored: attn_factor, fine",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "'default' does not have are ignored",
        ),
        ("mistral", {"attention_bias": True}, "attention_bias = True is ignored"),
        ("mixtral", {"attention_bias": True}, "attention_bias = True is ignored"),
        (
            "phi3",
            {"attention_bias": True, "mlp_bias": True, "lm_head_bias": True},
            "mlp_bias = True is ignored",
        ),
        ("qwen2", {"use_mrope": True}, "use_mrope = True is ignored"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 700.0},
            "",
        ),  # beside the newer
    ],
)
def test_what_transformers_ignores_is_said_and_changes_nothing(
    family, change, said, tmp_path, capsys
):
    theirs = tiny_hf(family)
    theirs.save_pretrained(tmp_path)
    config = {**json.loads((tmp_path / "config.json").read_text()), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    ours = load(tmp_path)(TransformerInput(random_ids()), inference=True).logits
    torch.testing.assert_close(ours, theirs(random_ids()).logits, rtol=0, atol=3e-5)
    assert said in capsys.readouterr().err


# Keys that a file may leave out: a class has values for them, and the shapes of the weights do not
# tell.
SILENT = (
    *("max_position_embeddings", "rms_norm_eps", "num_key_value_heads", "num_experts_per_tok"),
    *(
        "routed_scaling_factor",
        "n_shared_experts",
        "attention_bias",
        "tie_word_embeddings",
        "hidden_act",
    ),
)


@pytest.mark.parametrize("key", SILENT)
@pytest.mark.parametrize("family", [name for name in KNOWN if name not in ("gemma3", "llama4")])
def test_a_key_that_a_file_leaves_out_is_as_the_class_has_it(family, key):
    module, name = CLASSES.get(family, (family, f"{family.capitalize()}Config"))
    kind = getattr(
        importlib.import_module(f"transformers.models.{module}.configuration_{module}"), name
    )
    full = json.loads(tiny_hf(family).config.to_json_string(use_diff=False)) | {
        "num_local_experts": 8
    }
    full |= {
        "num_attention_heads": 32,
        "num_experts": 8,
        "n_routed_experts": 64,
        "hidden_size": 128,
    }
    short = {name: value for name, value in full.items() if name != key}
    as_class = json.loads(kind.from_dict(dict(short)).to_json_string(use_diff=False)).get(key)
    wanted = args_from_hf(short if as_class is None else {**short, key: as_class}, "full")
    assert args_from_hf(short, "short") == wanted


@pytest.mark.parametrize(
    ("part", "change", "words"),
    [
        ("vision_config", {"hidden_act": "quick_gelu"}, "hidden_act: got 'quick_gelu'"),
        ("vision_config", {"intermediate_size": 48}, "intermediate_size: got 48"),
        ("vision_config", {"image_size": [24, 36]}, "image_size"),
        ("vision_config", {"vision_output_dim": 16}, "vision_output_dim: got 16"),
        ("text_config", {"layer_types": ["sliding_attention"] * 4}, "layer_types"),
    ],
)
def test_parts_are_refused_by_their_place(part, change, words):
    config = config_of("llama4")
    config[part] |= change
    with pytest.raises(RequestError, match=f"config.json: {part}: ") as error:
        args_from_hf(config, "config.json")
    assert words in str(error.value)


@pytest.mark.parametrize(
    "family", ["phi3-longrope", "gemma3_text", "llama4", "gpt_oss", "deepseek_v3"]
)
def test_nonsense_in_any_key_is_one_sentence_or_harmless(family):
    config = config_of(family)
    for part in (None, *(key for key, value in config.items() if isinstance(value, dict))):
        for key in config if part is None else config[part]:
            for value in (None, "x", -1, [], {}, 1.5):
                change = {key: value} if part is None else {part: {**config[part], key: value}}
                with contextlib.suppress(RequestError):
                    assert args_from_hf({**config, **change}, "config.json").layers


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma2", "gpt_oss", "deepseek_v3"])
def test_a_missing_shape_is_named(family):
    config = config_of(family)
    del config["num_hidden_layers"]
    with pytest.raises(RequestError, match="num_hidden_layers: missing"):
        args_from_hf(config, "config.json")


def test_keys_that_nobody_read_are_said(capsys):
    args_from_hf(
        {**config_of("qwen2"), "dual_chunk_attention_config": {}, "attention_dropout": 0.1},
        "c.json",
    )
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "transom: c.json: training settings not taken over: attention_dropout = 0.1",
        "transom: c.json: keys not read: dual_chunk_attention_config",
    ]


@pytest.mark.parametrize(
    ("given", "kind", "factor", "original"),
    [
        ({"type": "su"}, "longrope", 4.0, 64),
        ({"type": "yarn"}, "longrope", 4.0, 64),
        ({"rope_type": "longrope", "factor": 3.0}, "longrope", 3.0, 64),
    ],
)
def test_first_names_of_longrope_in_phi3(given, kind, factor, original):
    config = {
        **config_of("phi3"),
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 64,
    }
    del config["rope_parameters"]
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    scaling = args_from_hf({**config, "rope_scaling": {**given, **factors}}, "c").rope_scaling
    assert (scaling.kind, scaling.factor, scaling.original_max_seq_len) == (kind, factor, original)


def test_lengths_of_dynamic_scaling():
    args = args_from_hf(config_of("llama-dynamic"), "c")
    assert (args.max_seq_len, args.rope_scaling.original_max_seq_len) == (48, 16)


def test_one_weight_of_yarn_alone_scales_scores_and_not_the_table():
    config = config_of("deepseek_v3")
    config["rope_parameters"]["mscale"] = 0.0
    args = args_from_hf(config, "c")
    assert args.rope_scaling.mscale is None and args.softmax_scale > args.head_size**-0.5
