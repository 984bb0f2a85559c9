"""Which tokens end a text: what folders state, in the order of transformers."""

import json

import pytest
from transformers import GenerationConfig

from transom.base.errors import RequestError
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.generation_config import stop_tokens_of
from transom.checkpoints.files.location import ModelLocation
from transom.tokenizers.training import byte_tokenizer

TOKENIZER = byte_tokenizer()
EOS = TOKENIZER.eos_id


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"eos_token_id": 7},
        {"eos_token_id": [7, 9]},
        {"eos_token_id": None, "text_config": {"eos_token_id": [7, 9]}},
        {"eos_token_id": 5, "text_config": {"eos_token_id": 7}},
        {"text_config": {"eos_token_id": 0}},
    ],
)
def test_a_config_states_what_it_does_in_transformers(tmp_path, config):
    expected = GenerationConfig.from_model_config(json.loads(json.dumps(config))).eos_token_id
    expected = expected if isinstance(expected, list) else [expected]
    assert stop_tokens_of(write(tmp_path, config=config), TOKENIZER) == tuple(expected)


@pytest.mark.parametrize(("stored", "expected"), [(7, (7,)), ([7, 9], (7, 9)), (None, (5,))])
def test_the_generation_config_comes_first(tmp_path, stored, expected):
    write(tmp_path, config={"eos_token_id": 5}, generation_config={"eos_token_id": stored})
    assert stop_tokens_of(tmp_path, TOKENIZER) == expected


def test_the_tokenizer_is_asked_where_no_file_states_any(tmp_path):
    assert stop_tokens_of(tmp_path, TOKENIZER) == (EOS,)
    assert stop_tokens_of(write(tmp_path, config={"model_type": "llama"}), TOKENIZER) == (EOS,)


def test_an_adapter_comes_before_its_base(tmp_path):
    base = write(tmp_path / "base", generation_config={"eos_token_id": 5})
    adapter = write(tmp_path / "adapter", adapter_config={})
    found = ModelLocation(base, adapter)
    assert stop_tokens_of(found, TOKENIZER) == (5,)
    TOKENIZER.save(adapter)  # chat formats are often taught with an EOS of their own
    assert stop_tokens_of(found, TOKENIZER) == (5, EOS)
    write(adapter, generation_config={"eos_token_id": 7})
    assert stop_tokens_of(found, TOKENIZER) == (7,), "stated by the adapter's folder itself"


def test_a_template_adds_the_end_of_its_turns(tmp_path):
    tokenizer = byte_tokenizer(("<bos>", "<eos>", "<end>"))
    template = ChatTemplate("{% for m in messages %}{{ m.content }}<end>{% endfor %}", tokenizer)
    assert stop_tokens_of(write(tmp_path, config={"eos_token_id": 7}), tokenizer, template) == (
        7,
        258,
    )


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize("stated", [["</s>"], "7", -1, True])
def test_what_is_no_token_id_is_refused(tmp_path, name, stated):
    with pytest.raises(RequestError, match="eos_token_id"):
        stop_tokens_of(write(tmp_path, **{name: {"eos_token_id": stated}}), TOKENIZER)


def test_a_stop_token_beyond_the_tokenizer_is_a_notice(tmp_path, capsys):
    folder = write(tmp_path, generation_config={"eos_token_id": [7, 60_000]})
    assert stop_tokens_of(folder, TOKENIZER) == (7, 60_000)
    assert "eos_token_id 60000 is not in the tokenizer" in capsys.readouterr().err
