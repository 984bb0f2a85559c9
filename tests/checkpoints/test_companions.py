"""What a folder states on generation, and its templates, stay with the model in every direction."""

import json

import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.checkpoints.adapters.folders import write_adapter, write_base
from transom.chat.template import ChatTemplate
from transom.checkpoints.convert import convert
from transom.checkpoints.files.generation_config import stop_tokens_of
from transom.checkpoints.files.hub import wanted_files
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.evaluation.merging import merge_folders
from transom.tokenizers.training import byte_tokenizer

FORMATS = ("native", "hf", "meta", "mistral")
STATED = {
    "eos_token_id": [5, 7, 9],
    "bos_token_id": 3,
    "do_sample": True,
    "temperature": 0.6,
    "top_p": 0.9,
}
TALK = "{% for message in messages %}{{ message.content }}{% endfor %}"
TEMPLATES = {"default": TALK, "rag": f"rag {TALK}", "tool_use": f"tools {TALK}"}


def state_all(folder, where="generation_config.json"):
    """Put settings of generation and templates into a folder."""
    if where == "config.json":
        (folder / "generation_config.json").unlink(missing_ok=True)
        own = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**own, **STATED}))
    else:
        (folder / where).write_text(json.dumps(STATED))
        config = folder / "config.json"
        own = json.loads(config.read_text()) if config.exists() else {}
        if "eos_token_id" in own:
            config.write_text(json.dumps({**own, "eos_token_id": STATED["eos_token_id"]}))
    (folder / "chat_template.jinja").write_text(TEMPLATES["default"])
    (folder / "additional_chat_templates").mkdir()
    for name in ("rag", "tool_use"):
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(TEMPLATES[name])
    return folder


def check(folder, wanted=STATED, templates=TEMPLATES):
    """The folder states all that was stated, for us and for transformers."""
    settings = json.loads((folder / "generation_config.json").read_text())
    assert {key: settings[key] for key in wanted} == wanted
    tokenizer = load_tokenizer(folder)
    assert list(stop_tokens_of(folder, tokenizer)) == wanted["eos_token_id"]
    assert ChatTemplate.load(folder, tokenizer).sources == templates
    theirs = GenerationConfig.from_pretrained(folder)
    assert (theirs.eos_token_id, theirs.temperature, theirs.top_p) == (
        wanted["eos_token_id"],
        0.6,
        0.9,
    )
    config = folder / "config.json"
    if config.exists() and json.loads(config.read_text())["model_type"] != "transom":
        assert json.loads(config.read_text())["eos_token_id"] == wanted["eos_token_id"]
        assert AutoTokenizer.from_pretrained(folder).chat_template == templates


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """One folder of each format."""
    at = tmp_path_factory.mktemp("bases")
    return {
        kind: state_all(write_base(at / kind, kind, dtype="float32", rope_layout="halves"))
        for kind in FORMATS
    }


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("kind", FORMATS)
def test_convert_and_save_keep_it(bases, kind, to, tmp_path):
    convert(bases[kind], tmp_path / "converted", to)
    check(tmp_path / "converted")
    save(load(bases[kind]), tmp_path / "saved", to, load_tokenizer(bases[kind]))
    check(tmp_path / "saved")


@pytest.mark.parametrize("to", FORMATS)
def test_what_only_a_config_states_is_kept(tmp_path, to, capsys):
    """Older folders state all in config.json, which other formats have no room for."""
    base = state_all(write_base(tmp_path / "base", "hf", dtype="float32"), "config.json")
    convert(base, tmp_path / "converted", to)
    check(tmp_path / "converted")
    save(load(base), tmp_path / "saved", to, load_tokenizer(base))
    check(tmp_path / "saved")
    assert "keys not read" not in capsys.readouterr().err


def test_older_templates_go_along(tmp_path):
    base = write_base(tmp_path / "base", "hf", dtype="float32")
    (base / "chat_template.json").write_text(json.dumps({"chat_template": TALK}))
    convert(base, tmp_path / "converted", "native")
    save(load(base), tmp_path / "saved", tokenizer=load_tokenizer(base))
    for name in ("converted", "saved"):
        assert ChatTemplate.load(tmp_path / name, load_tokenizer(tmp_path / name)).sources == {
            "default": TALK
        }


def test_an_adapter_and_what_is_merged_of_it_keep_it(tmp_path):
    base = state_all(write_base(tmp_path / "base", "hf", dtype="float32"))
    adapter = write_adapter(tmp_path / "adapter", base)
    assert load(adapter).generation_settings == STATED
    merge_folders(None, [adapter], tmp_path / "merged", tokens=64)
    convert(adapter, tmp_path / "converted", "hf")
    for name in ("merged", "converted"):
        check(tmp_path / name)


def test_settings_and_templates_of_the_adapter_come_first(tmp_path):
    base = state_all(write_base(tmp_path / "base", "hf", dtype="float32"))
    adapter = write_adapter(tmp_path / "adapter", base)
    own = {**STATED, "eos_token_id": [8]}
    (adapter / "generation_config.json").write_text(json.dumps(own))
    (adapter / "chat_template.jinja").write_text("mine")
    convert(adapter, tmp_path / "converted", "hf")
    settings = json.loads((tmp_path / "converted" / "generation_config.json").read_text())
    assert settings == own
    assert ChatTemplate.load(tmp_path / "converted", load_tokenizer(base)).sources == {
        "default": "mine"
    }


def test_an_adapter_that_states_no_ids_has_those_of_its_base(tmp_path):
    base = state_all(write_base(tmp_path / "base", "hf", dtype="float32"))
    adapter = write_adapter(tmp_path / "adapter", base)
    (adapter / "generation_config.json").write_text('{"temperature": 0.1}')
    ids = {key: STATED[key] for key in ("eos_token_id", "bos_token_id")}
    assert load(adapter).generation_settings == {"temperature": 0.1, **ids}


def test_an_adapter_with_its_own_tokenizer_stops_at_the_same_tokens_when_merged(tmp_path):
    base = state_all(write_base(tmp_path / "base", "hf", dtype="float32"))
    adapter = write_adapter(tmp_path / "adapter", base)
    load_tokenizer(base).save(adapter)
    before = stop_tokens_of(ModelLocation(base, adapter), load_tokenizer(adapter))
    assert set(before) > set(STATED["eos_token_id"])
    convert(adapter, tmp_path / "converted", "native")
    assert stop_tokens_of(tmp_path / "converted", load_tokenizer(adapter)) == before


def test_all_stop_tokens_of_a_vocabulary_are_written(tmp_path):
    tokenizer = byte_tokenizer(("<bos>", "<eos>", "<eot>"))
    tokenizer.stop_ids = (257, 258)
    model = load(write_base(tmp_path / "base", "hf", dtype="float32"))
    model.generation_settings = {}
    save(model, tmp_path / "out", "hf", tokenizer)
    for name in ("generation_config.json", "config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == [257, 258]


def test_stop_tokens_of_another_vocabulary_are_not_kept(tmp_path, capsys):
    base = write_base(tmp_path / "base", "hf", dtype="float32")
    model, tokenizer = load(base), byte_tokenizer()
    model.generation_settings = {"eos_token_id": [5, 100000], "temperature": 0.5}
    save(model, tmp_path / "out", "hf", tokenizer)
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == tokenizer.eos_id and settings["temperature"] == 0.5
    assert "eos_token_id [5, 100000]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name",
    ["tekken_240911.json", "mistral_instruct_tokenizer_240216.model.v2", "1_Pooling/config.json"],
)
def test_tokenizers_of_any_name_and_the_pooling_go_along(tmp_path, name):
    base = write_base(tmp_path / "base", "native", dtype="float32")
    (base / name).parent.mkdir(exist_ok=True)
    (base / name).write_bytes(b"{}")
    assert name in convert(base, tmp_path / "out", "hf").companions


def test_additional_templates_and_the_pooling_are_fetched_from_a_hub():
    wanted = [
        "config.json",
        "additional_chat_templates/rag.jinja",
        "1_Pooling/config.json",
        "model.safetensors",
    ]
    assert wanted_files([*wanted, "other/x.jinja", "2_Dense/config.json"]) == wanted
