"""A model is opened with everything that it is used with, and a tokenizer without its model."""

import json

import pytest

from tests.checkpoints.adapters.folders import write_adapter, write_base
from transom.base.errors import RequestError
from transom.checkpoints.files.location import find_model
from transom.checkpoints.open_model import load_tokenizer, open_model, open_text

TALK = "{% for message in messages %}{{ message.content }}<eot>{% endfor %}"


@pytest.fixture
def base(tmp_path):
    """A model that states stop tokens, stop strings and a chat template."""
    folder = write_base(tmp_path / "base", "hf", dtype="float32")
    stated = {"eos_token_id": 5, "stop_strings": "END", "temperature": 0.5}
    (folder / "generation_config.json").write_text(json.dumps(stated))
    (folder / "chat_template.jinja").write_text(TALK)
    return folder


def test_a_model_comes_with_what_its_folders_state(base, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", base)
    for name in (base, adapter, find_model(adapter)):
        opened = open_model(name, device="cpu")
        assert opened.name == str(name) and not opened.model.training
        assert opened.stop_tokens == (5,) and opened.stop_strings == ("END",)
        assert opened.settings["temperature"] == 0.5
        assert opened.template is not None and opened.template.sources == {"default": TALK}
        assert set(opened.turn_stop_tokens) >= {5}
    assert opened.location.format == "hf" and opened.location.adapter == adapter


def test_a_model_without_a_template_or_settings_opens(tmp_path):
    opened = open_model(write_base(tmp_path, "native", dtype="float32"), device="cpu")
    assert opened.template is None and opened.stop_strings == ()
    assert opened.stop_tokens == opened.tokenizer.stop_ids


def test_wrong_settings_are_refused_when_they_are_used(base):
    (base / "generation_config.json").write_text('{"eos_token_id": "5", "stop_strings": [1]}')
    text = open_text(base)
    with pytest.raises(RequestError, match="eos_token_id: got '5'"):
        _ = text.stop_tokens
    with pytest.raises(RequestError, match=r"stop_strings: got \[1\]"):
        _ = text.stop_strings


def test_a_text_needs_no_weights(base):
    (base / "model.safetensors").unlink()
    text = open_text(base)
    assert text.tokenizer.encode("ab") == load_tokenizer(base).encode("ab")
    assert text.template is not None
    with pytest.raises(RequestError, match=r"no weights; expected model\.safetensors"):
        open_model(base, device="cpu")
