"""Adapter folders: Mistral's file, fused foreign names, and every folder that is refused with one
sentence.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.checkpoints.adapters.twins import ADAPTERS, far, logits_of, read_back, twin
from tests.checkpoints.families import random_ids, tiny_hf
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.adapters.foreign_leaves import Naming, namings
from transom.checkpoints.adapters.peft_config import base_of, read_peft
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.layout import is_adapter
from transom.checkpoints.load import load
from transom.checkpoints.mapping import sort_keys
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import adapted_modules
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.weights import LoraWeights
from transom.models.llm import LLM
from transom.names.transforms import permute_rotary

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def interleaved(B: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of halves as Mistral's files have them, per head."""
    return B.view(heads, 2, -1, B.size(1)).transpose(1, 2).reshape(B.shape)


def mistral_files(folder: Path, scaling: float) -> torch.Tensor:
    """A Mistral base and `lora.safetensors` in `folder`; the logits that PEFT has for the same
    adapter.
    """
    base = tiny_hf("mixtral")
    base.save_pretrained(folder / "base")
    names = {"q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo"}
    model = get_peft_model(
        base, LoraConfig(r=2, lora_alpha=2 * scaling, target_modules=list(names))
    )
    generator, state = torch.Generator().manual_seed(1), {}
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if "lora_" not in key:
                continue
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
            parts = key.split(".")
            layer, leaf, which = parts[4], parts[6], parts[7]
            turned = weight
            if which == "lora_B" and leaf in ("q_proj", "k_proj"):
                turned = interleaved(weight, 4 if leaf == "q_proj" else 2)
            state[f"layers.{layer}.attention.{names[leaf]}.{which}.weight"] = turned.contiguous()
    (folder / "adapter").mkdir()
    save_file(state, folder / "adapter" / "lora.safetensors")
    return model.eval()(random_ids(2, 12)).logits


@pytest.mark.parametrize("said", ["beside", "given", "not at all"])
def test_mistral_files_scale_directly_and_turn_with_the_base(said, tmp_path, capsys):
    scaling = 2.0 if said == "not at all" else 1.5
    expected = mistral_files(tmp_path, scaling)
    if said == "beside":
        (tmp_path / "adapter" / "params.json").write_text(
            json.dumps({"lora": {"rank": 2, "scaling": 1.5}})
        )
    mine = load(tmp_path / "base")
    load_adapter(mine, tmp_path / "adapter", scaling=1.5 if said == "given" else None)
    assert far(logits_of(mine), expected) < 2e-5
    assert ("no params.json states the scaling" in capsys.readouterr().err) == (
        said == "not at all"
    )
    save_adapter(mine, tmp_path / "again", format="mistral")
    again = load_adapter(load(tmp_path / "base"), tmp_path / "again", scaling=2.0)
    assert far(logits_of(again), expected) < 2e-5
    before, after = (load_file(tmp_path / at / "lora.safetensors") for at in ("adapter", "again"))
    assert set(before) == set(after)
    save_adapter(mine, tmp_path / "peft")
    assert far(read_back("experts", tmp_path / "peft")(random_ids(2, 12)).logits, expected) < 2e-5


def test_experts_of_mistral_files_are_w1_w3_w2(tmp_path):
    model, bare = (
        random_model(tiny_args(moe_args={"num_experts": 3, "top_k": 2, "hidden_dim": 20}))
        for _ in "ab"
    )
    apply_lora(model, LoraArgs(rank=2, scaling="direct", alpha=2.0, targets=("experts",)))
    leaf = model.layers[1].feed_forward.experts.w_value.lora["default"]
    with torch.no_grad():
        leaf.B.normal_()
    save_adapter(model, tmp_path, format="mistral")
    state = load_file(tmp_path / "lora.safetensors")
    assert torch.equal(state["layers.1.feed_forward.experts.2.w3.lora_B.weight"], leaf.B[2])
    assert set(state) == {
        f"layers.{i}.feed_forward.experts.{e}.w{w}.lora_{x}.weight"
        for i in (0, 1)
        for e in range(3)
        for w in (1, 2, 3)
        for x in "AB"
    }
    load_adapter(bare, tmp_path, scaling=2.0)
    tokens = TransformerInput(random_tokens(2, 9))
    assert far(bare(tokens).logits, model(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    "family", ["phi3", "mixtral", "llama4_text", "gpt_oss", "qwen3_moe", "deepseek_v3"]
)
@pytest.mark.parametrize("targets", [("all-linear",), ("wq(_b)?", "w_value"), ("w_gate",)])
def test_leaves_trained_apart_are_written_into_fused_ones(family, targets, tmp_path):
    base = tiny_hf(family)
    base.save_pretrained(tmp_path / "base")
    mine = load(tmp_path / "base")
    apply_lora(mine, LoraArgs(rank=2, alpha=3.0, targets=targets), seed=1)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for _, _, held in adapted_modules(mine):
            held["default"].B.copy_(torch.randn(held["default"].B.shape, generator=generator) * 0.2)
    save_adapter(mine, tmp_path / "adapter", base=str(tmp_path / "base"))
    kind = next(name for name, (of, _) in ADAPTERS.items() if of == family)
    theirs = read_back(kind, tmp_path / "adapter")
    assert far(theirs(random_ids(2, 12)).logits, logits_of(mine)) < 2e-5
    again = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    assert far(logits_of(again), logits_of(mine)) < 2e-5


def test_fused_weights_take_dora_of_leaves_trained_apart(tmp_path):
    tiny_hf("phi3").save_pretrained(tmp_path / "base")
    mine = load(tmp_path / "base")
    apply_lora(mine, LoraArgs(rank=2, alpha=2.0, dora=True, scaling="rslora"), seed=1)
    with torch.no_grad():
        for _, _, held in adapted_modules(mine):
            held["default"].B.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
            held["default"].magnitude.mul_(1.2)
    save_adapter(mine, tmp_path / "adapter", family="phi3")
    theirs = read_back("fused", tmp_path / "adapter")
    assert far(theirs(random_ids(2, 12)).logits, logits_of(mine)) < 2e-5


def test_what_fused_weights_share_they_train_together(tmp_path):
    twin("fused", tmp_path)
    attention = load_adapter(load(tmp_path / "base"), tmp_path / "adapter").layers[0].attention
    parts = [leaf.lora["default"] for leaf in (attention.wq, attention.wk, attention.wv)]
    assert parts[0].A is parts[1].A is parts[2].A
    assert [len(part.B) for part in parts] == [32, 16, 16]


def test_an_interleaved_base_turns_rows_of_queries_and_keys(tmp_path):
    twin("DoRA with biases", tmp_path)
    halves = load(tmp_path / "base")
    args = dataclasses.replace(halves.args, rope_layout="interleaved")
    mine = LLM(args).eval()
    mine.load_state_dict(
        {
            k: permute_rotary(k, t, halves.args, "interleaved")
            for k, t in halves.state_dict().items()
        }
    )
    load_adapter(halves, tmp_path / "adapter")
    load_adapter(mine, tmp_path / "adapter")
    assert far(logits_of(mine), logits_of(halves)) < 2e-5
    one, other = (model.layers[0].attention.wq.lora["default"] for model in (mine, halves))
    assert torch.equal(one.A, other.A) and torch.equal(one.B, interleaved(other.B, 4))
    save_adapter(mine, tmp_path / "again")
    again, before = (load_file(tmp_path / at / WEIGHTS) for at in ("again", "adapter"))
    assert set(again) == set(before) and all(torch.equal(again[key], before[key]) for key in before)


def test_names_of_multimodal_wrappers_are_understood():
    key = "base_model.model.model.language_model.layers.3.self_attn.q_proj.lora_A.weight"
    image = "base_model.model.model.vision_tower.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    naming, state = Naming("gemma3", random_model(tiny_args())), dict.fromkeys((key, image))
    source, unread = sort_keys(naming.names, naming.known_key, state, 4, "adapter")
    assert list(unread.values()) == [1]
    assert list(source) == ["language_model.model.layers.3.self_attn.q_proj.lora_A"]
    assert naming.spellings("language_model.model.layers.3.self_attn.q_proj") == (
        "language_model.model.layers.3.self_attn.q_proj",
        "model.language_model.layers.3.self_attn.q_proj",
    )


def test_a_folder_says_whether_it_is_an_adapter_and_of_what(tmp_path):
    twin("all linear", tmp_path)
    assert is_adapter(tmp_path / "adapter") and not is_adapter(tmp_path / "base")
    with pytest.raises(RequestError, match="base_model_name_or_path: got None"):
        base_of(tmp_path / "adapter")
    mine = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    save_adapter(mine, tmp_path / "again", base="../base")
    assert Path(base_of(tmp_path / "again")).resolve() == (tmp_path / "base").resolve()


FEATURES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "ADALORA"}, "peft_type: got 'ADALORA'"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"lora_bias": True}, "lora_bias"),
    ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"use_qalora": True}, "use_qalora"),
    ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    ({"kasa_config": {"beta": 1}}, "kasa_config"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_tomorrow": True}, "use_tomorrow"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: got 'pissa_niter_4'"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: got 'olora'; expected plain LoRA"),
    ({"r": "many"}, "r: got 'many'; expected a whole number"),
    ({"rank_pattern": {"(": 3}}, r"pattern: got '\('; expected a regular expression"),
    ({"alpha_pattern": {"q_proj": "high"}}, "alpha_pattern.q_proj: got 'high'; expected a number"),
    ({"rank_pattern": [1]}, r"rank_pattern: got \[1\]; expected a mapping"),
]


@pytest.mark.parametrize(("changes", "words"), FEATURES)
def test_features_that_are_not_computed_are_refused_by_name(changes, words):
    with pytest.raises(RequestError, match=f"here: .*{words}"):
        read_peft({"peft_type": "LORA", **changes}, "here")


def test_every_field_of_a_plain_config_is_known():
    fields = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1).to_dict()
    plain = {key: sorted(v) if isinstance(v, set) else v for key, v in fields.items()}
    plain["peft_type"] = plain["peft_type"].value
    assert read_peft(plain, "here").r == 4


def _config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, **changes}))


def _state(folder: Path, change: Any) -> None:
    state = load_file(folder / WEIGHTS)
    change(
        state, next(key for key in state if key.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    )
    save_file(state, folder / WEIGHTS)


def _renamed(state, key):
    state[key.replace("q_proj", "z_proj")] = state.pop(key)


def _without_b(state, key):
    del state[key.replace("lora_A", "lora_B")]


DAMAGES: list[tuple[Any, str]] = [
    (lambda f: (f / CONFIG).unlink(), r"no adapter_config\.json and no lora\.safetensors"),
    (lambda f: (f / CONFIG).write_text("[]"), "a JSON object"),
    (lambda f: (f / CONFIG).write_text("{"), "not JSON"),
    (lambda f: (f / WEIGHTS).unlink(), r"adapter_model\.safetensors: no such file"),
    (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:999]),
        "not a complete safetensors file",
    ),
    (
        lambda f: _state(f, _renamed),
        r"left over model\.layers\.1\.self_attn\.z_proj\.lora_A",
    ),
    (lambda f: _state(f, _without_b), r"missing model\.layers\.1\.self_attn\.q_proj\.lora_B"),
    (
        lambda f: _state(f, lambda s, k: s.update({k: s[k][:, 1:].contiguous()})),
        r"q_proj\.lora_A has shape \(3, 31\), which does not make .*wq\.A \(3, 32\)",
    ),
    (
        lambda f: _state(f, lambda s, k: s.update({k: s[k][1:].contiguous()})),
        r"q_proj: rank: got 2; expected 3, as in the config",
    ),
    (
        lambda f: _state(f, lambda s, k: s.update({"extra": s[k].clone()})),
        "left over extra",
    ),
    (
        lambda f: _state(
            f, lambda s, k: s.update({k.replace("lora_A.weight", "lora_B.bias"): s[k].clone()})
        ),
        r"lora_B\.bias",
    ),
    (
        lambda f: _state(f, lambda s, k: s.update({k.replace("lora_A", "lora_Z"): s[k].clone()})),
        r"lora_Z\.weight",
    ),
    (lambda f: _config(f, use_dora=True), r"missing .*q_proj\.lora_magnitude_vector"),
    (
        lambda f: _config(f, r=4),
        r"q_proj: rank: got 3; expected 4, as in the config",
    ),
    (
        lambda f: _state(
            f, lambda s, k: s.update({"base_model.model.lm_head.weight": torch.zeros(98, 32)})
        ),
        r"lm_head\.weight has shape \(98, 32\), which does not make output\.weight \(99, 32\)",
    ),
    (
        lambda f: _state(
            f,
            lambda s, k: s.update({k.replace("lora_A.weight", "base_layer.bias"): torch.ones(32)}),
        ),
        r"an adapter on .*wq and a bias of its own",
    ),
]


@pytest.mark.parametrize(("damage", "words"), DAMAGES)
def test_damaged_folders_are_one_sentence_and_leave_the_model_alone(damage, words, tmp_path):
    twin("all linear", tmp_path)
    damage(tmp_path / "adapter")
    model = load(tmp_path / "base")
    names = list(model.state_dict())
    with pytest.raises(RequestError, match=words) as error:
        load_adapter(model, tmp_path / "adapter")
    assert "\n" not in str(error.value) and list(model.state_dict()) == names


def test_a_pickle_that_wants_code_is_refused(tmp_path):
    twin("all linear", tmp_path)
    (tmp_path / "adapter" / WEIGHTS).unlink()
    torch.save({"a": Path("/")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(RequestError, match=r"adapter_model\.bin: would run pathlib"):
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")


def test_the_output_of_a_tied_model_is_not_saved_apart(tmp_path):
    twin("tied embeddings", tmp_path)
    path = tmp_path / "adapter" / WEIGHTS
    state = {key: tensor for key, tensor in load_file(path).items() if "embed" not in key}
    save_file({**state, "base_model.model.lm_head.weight": torch.ones(99, 32)}, path)
    with pytest.raises(
        RequestError, match=r"got 'lm_head\.weight'; it differs from the embeddings"
    ):
        load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    both = {
        f"base_model.model.{key}.weight": torch.ones(99, 32)
        for key in ("lm_head", "model.embed_tokens")
    }
    save_file({**state, **both}, path)
    model = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    assert bool((model.tok_embeddings.weight == 1).all())


def test_numbers_that_are_not_finite_are_counted(tmp_path, capsys):
    twin("all linear", tmp_path)
    _state(tmp_path / "adapter", lambda s, k: s[k].fill_(float("nan")))
    load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    assert "1 tensors hold NaN or infinite numbers" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"name": "other"}, "adapter: got 'other'; expected default"),
        ({"format": "gguf"}, "format: got 'gguf'; expected peft or mistral"),
        ({"family": "phi3"}, "family: got 'phi3'; expected for this model"),
        ({"family": "gpt5"}, "family: got 'gpt5'; expected for this model"),
    ],
)
def test_what_cannot_be_written_is_one_sentence(options, words, tmp_path):
    model = random_model(tiny_args(qkv_bias=True))
    apply_lora(model, LoraArgs(rank=1))
    with pytest.raises(RequestError, match=words):
        save_adapter(model, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    model = apply_lora(random_model(tiny_args()), LoraArgs(rank=1))

    def full(*_: object, **__: object) -> int:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(WorkError, match=r"could not be written .*No space left"):
        save_adapter(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_dora_on_a_part_of_a_fused_weight_is_refused(tmp_path):
    tiny_hf("phi3").save_pretrained(tmp_path / "base")
    model = load(tmp_path / "base")
    apply_lora(model, LoraArgs(rank=1, dora=True, targets=("wq",)))
    with pytest.raises(RequestError, match=r"DoRA on layers\.0\.attention\.wq.*cannot hold it"):
        save_adapter(model, tmp_path / "out", family="phi3")


def test_every_family_of_tables_is_one_of_transformers():
    families = {naming.family for naming in namings(random_model(tiny_args()))}
    assert {"llama", "mistral", "qwen2", "phi3"} <= families and "meta" not in families


def test_parts_know_their_family(tmp_path):
    twin("fused", tmp_path)
    model = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    parts = [part for _, _, held in adapted_modules(model) for part in held.values()]
    assert {part.family for part in parts if isinstance(part, LoraWeights)} == {"phi3"}
