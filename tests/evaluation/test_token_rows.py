"""Rows to compare models on: whose text they are, how long they get, and that the same text gives
the same rows.
"""

import json

import pytest
import torch
import yaml

from tests.checkpoints.adapters.folders import write_base
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.evaluation.token_rows import token_rows
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return ModelLocation(write_base(tmp_path_factory.mktemp("rows") / "base", max_seq_len=64))


def rows_of(found, *given, **named):
    return token_rows(found, read_args(found.model), *given, **named)


def text_of(rows):
    return byte_tokenizer().decode(torch.cat(rows.rows).tolist())


def test_built_in_texts_fill_rows_up_to_the_budget_and_repeat(found):
    one, again = rows_of(found), rows_of(found)
    assert one.tokens == 4096 and max(map(len, one.rows)) == 64
    assert (one.source, one.sha256) == ("Python's language reference", again.sha256)
    fewer = rows_of(found, tokens=100)
    assert [len(row) for row in fewer.rows] == [64, 36] and fewer.sha256 != one.sha256


def test_joined_texts_fill_rows_of_one_length(found, tmp_path):
    for name, text in (("a.txt", "x" * 70), ("b.txt", "yz")):
        (tmp_path / name).write_text(text)
    rows = rows_of(found, str(tmp_path), tokens=70, joined=True)
    assert [len(row) for row in rows.rows] == [64, 6]
    many = rows_of(found, tokens=40_000, joined=True)
    assert many.tokens == 40_000 and {len(row) for row in many.rows} == {64}


def test_texts_are_documents_of_their_own(found, tmp_path):
    for name, text in (("a.txt", "x" * 70), ("b.txt", "yz")):
        (tmp_path / name).write_text(text)
    rows = rows_of(found, str(tmp_path))
    assert [len(row) for row in rows.rows] == [64, 7, 3], "each begins with BOS"
    (tmp_path / "rows.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}\n')
    assert text_of(rows_of(found, str(tmp_path / "rows.jsonl"))).replace("\0", "").count("ab") == 1


def test_conversations_are_written_by_the_adapters_template(found, tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]}
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rows = rows_of(ModelLocation(found.model, adapter), str(data))
    assert text_of(rows).startswith("<user>ab") and "<assistant>cd" in text_of(rows)


def test_a_run_gives_what_it_held_out_while_its_data_is_there(found, tmp_path, capsys):
    data = tmp_path / "set"
    data.mkdir()
    for split, word in (("train", "seen"), ("valid", "held")):
        (data / f"{split}.jsonl").write_text(
            json.dumps({"prompt": "say", "completion": word}) + "\n"
        )
    config = {"data": {"sources": [str(data)], "held_out": 0.5}, "finetune": {"method": "lora"}}
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    rows = rows_of(found, None, run)
    assert (
        rows.source == f"held out of {run}"
        and "held" in text_of(rows)
        and "seen" not in text_of(rows)
    )
    assert rows_of(found, __file__, run).source == __file__, "what is asked for comes first"
    for file in data.iterdir():
        file.unlink()
    assert rows_of(found, None, run).source == "Python's language reference"
    assert "its data is missing" in capsys.readouterr().err


def test_weights_without_a_tokenizer_get_random_tokens(tmp_path, capsys):
    save(random_model(tiny_args()), tmp_path, "native")
    rows = rows_of(ModelLocation(tmp_path), tokens=50)
    assert (
        rows.source == "random tokens"
        and rows.tokens == 50
        and "random tokens" in capsys.readouterr().err
    )
    with pytest.raises(RequestError, match="expected none, because"):
        rows_of(ModelLocation(tmp_path), __file__)


def test_a_text_of_nothing_is_refused(found, tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(RequestError, match="path: got"):
        rows_of(found, str(tmp_path / "a.txt"))
