"""`verify checkpoint`: green on folders of transformers and of every format, red for each thing
that is wrong.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model

from tests.checkpoints.families import tiny_hf
from tests.helpers import random_model, tiny_args
from tests.mutations import checkpoint_bugs, model_bugs
from transom.base.errors import require
from transom.base.runtime import one_thread
from transom.chat.template import ChatTemplate
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.tokenizers.training import byte_tokenizer, train_chars
from transom.verify import checkpoint, texts
from transom.verify.checkpoint import SPECIAL, compare_folder
from transom.verify.findings import summarize
from transom.verify.texts import compare_texts

WINDOWED = {"layer_pattern": "SF", "sliding_window": 7}
BOS, EOS = SPECIAL[:2]
CHAT = "{{ bos_token }}{% for m in messages %}{{ '<|eot_id|>' + m.content }}{% endfor %}"


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


def lines(folder, **options):
    return {
        line.comparison: line for line in summarize(compare_folder(folder, name="it", **options))
    }


def failing(folder, **options):
    return {name for name, line in lines(folder, **options).items() if line.failed}


def hf_folder(folder, family="qwen2"):
    tiny_hf(family).save_pretrained(folder)
    return folder


def with_chat(folder, template=CHAT):
    save(
        random_model(tiny_args(vocab_size=256 + len(SPECIAL))),
        folder,
        "hf",
        byte_tokenizer(SPECIAL),
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


# What the second reader has no rule for: only fused experts, sinks, corrections and the norms
# around them.
FUSED = {"gpt_oss": 2 * 7, "llama4_text": 2 * 3, "deepseek_v3": 2}
# The slow ones have the keys of a quick one, or a subset of its options; test_parity.py compares
# them all.
SLOW = ("qwen2", "qwen3", "olmo2", "llama-dynamic")
FAMILIES = ["llama-tied", "mixtral", "gemma2", "phi3", *FUSED]
FAMILIES += [pytest.param(name, marks=pytest.mark.slow) for name in SLOW]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers_is_green_and_read_by_hand(tmp_path, capsys, family):
    found = lines(hf_folder(tmp_path, family))
    assert not {name: line.first_failure for name, line in found.items() if line.failed}
    assert {
        "logits = transformers",
        "prefill + decode",
    } <= found.keys()
    said = capsys.readouterr().err
    if family in FUSED:
        assert f"it: {FUSED[family]} of" in said
    else:
        assert "have no second reading" not in said


def test_a_forward_that_fails_in_transformers_is_a_notice(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Qwen2Model, "forward", raises)
    assert "logits = transformers" not in lines(hf_folder(tmp_path))
    assert "transformers cannot run the model (LookupError: no layers)" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["native", "hf", "meta", "mistral"])
def test_every_format_is_green(tmp_path, format):
    save(
        random_model(tiny_args(**({} if format in ("meta", "hf") else WINDOWED))),
        tmp_path,
        format=format,
    )
    found = lines(tmp_path, length=32)
    assert not {name: line.first_failure for name, line in found.items() if line.failed}
    formats = {finding.case.split(",")[0] for finding in compare_folder(tmp_path, 32, name="it")}
    assert f"it as {format}" in formats
    assert ("it as meta" in formats) == (format in ("meta", "hf"))


def raises(*args, **kwargs):
    raise LookupError("no layers")


def rewrite(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def test_keys_that_do_not_add_up_are_red_and_end_it(tmp_path):
    key = "model.layers.1.mlp.up_proj.weight"
    rewrite(hf_folder(tmp_path), lambda state: state.update({f"{key}_too": state.pop(key)}))
    (line,) = lines(tmp_path).values()
    assert line.failed
    assert f"missing {key}; left over {key}_too" in line.first_failure.detail


def test_a_tied_output_with_numbers_of_its_own_is_red(tmp_path):
    hf_folder(tmp_path, "llama-tied")
    rewrite(
        tmp_path,
        lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"] + 1}),
    )
    assert failing(tmp_path) == {"every key = one parameter"}


def test_weights_that_are_no_numbers_are_red_and_still_compared_bit_by_bit(tmp_path):
    rewrite(hf_folder(tmp_path), lambda state: state["model.norm.weight"].fill_(float("nan")))
    assert failing(tmp_path) == {"logits are finite"}
    assert "written and read back" in lines(tmp_path)


def test_a_vocabulary_that_cannot_write_the_texts_is_said(tmp_path, capsys):
    save(random_model(tiny_args()), tmp_path, tokenizer=train_chars(["abc xy"]))
    assert not failing(tmp_path, length=16)
    assert "no chats are compared: text" in capsys.readouterr().err


@pytest.mark.slow  # tests/mutations plants one bug of this check
@pytest.mark.parametrize(
    ("family", "plant", "expected"),
    [
        ("qwen2", checkpoint_bugs.permuted_query, "parameters = second reading"),
        ("llama4_text", checkpoint_bugs.permuted_query, "logits = transformers"),
        ("llama4_text", checkpoint_bugs.unturned_query, None),
        ("llama-tied", checkpoint_bugs.untied_reading, "output tied as the config says"),
        ("mixtral", checkpoint_bugs.swapped_widths, "parameters = second reading"),
        ("phi3", checkpoint_bugs.swapped_widths, "logits = transformers"),
        ("qwen2", checkpoint_bugs.dropped_bias, "parameters = second reading"),
        ("gpt_oss", checkpoint_bugs.dropped_bias, "logits = transformers"),
        ("gemma2", model_bugs.swapped_layout, "logits = transformers"),
        ("qwen3", model_bugs.swapped_layout, "logits = transformers"),
    ],
)
def test_bugs_are_seen_in_folders_of_transformers(tmp_path, family, plant, expected):
    hf_folder(tmp_path, family)
    with plant():
        found = failing(tmp_path)
    assert expected in found if expected else not found  # nothing is turned where the layout stays


def test_bits_show_what_only_writing_gets_wrong(tmp_path):
    save(random_model(tiny_args()), tmp_path, format="meta")
    with checkpoint_bugs.unturned_query():
        found = lines(tmp_path, length=16)
    assert (
        found["written and read back"].first_failure.case
        == "it as hf, layers.0.attention.wq.weight"
    )
    assert found["logits after a round trip"].failed == 1


@pytest.mark.parametrize(
    ("template", "plant", "red"),
    [
        (CHAT, None, set()),
        ("{{ bos_token }}" + CHAT, None, set()),  # one is dropped, and that is said
        (CHAT.replace("{{ bos_token }}", ""), None, set()),
        (CHAT, checkpoint_bugs.double_bos_in_a_chat, {"BOS once"}),
        (CHAT, checkpoint_bugs.obeyed_spelling, {"spelled tokens stay text"}),
    ],
)
def test_texts_and_chats(tmp_path, template, plant, red):
    with_chat(tmp_path, template)
    if plant is None:
        assert failing(tmp_path, length=16) == red
    else:
        with plant():
            assert failing(tmp_path, length=16) == red


SYSTEMLESS = CHAT.replace(
    "{{ bos_token }}", "{{ raise_exception('no') if messages[0].role == 'system' }}"
)


@pytest.mark.parametrize(
    ("template", "lost", "red"),
    [
        (CHAT, 0, []),
        (CHAT, 2, ["a question", "three turns", "a system message", "an answered question"]),
        ("{{ bos_token }}" + CHAT, 0, []),
        (SYSTEMLESS, 0, []),
    ],
)
def test_chats_have_the_ids_of_transformers(tmp_path, monkeypatch, template, lost, red):
    original = ChatTemplate.ids_of
    monkeypatch.setattr(ChatTemplate, "ids_of", lambda self, chat: original(self, chat)[lost:])
    found = [
        one
        for one in compare_texts(with_chat(tmp_path, template), "it")
        if one.comparison == texts.IDS
    ]
    assert [one.case.removeprefix("it, ") for one in found if not one.ok] == red
    assert len(found) == (3 if template == SYSTEMLESS else 4)


def test_a_chat_that_only_transformers_writes_is_red(tmp_path, monkeypatch):
    original = ChatTemplate.encode

    def encode(self, messages, *given, **named):
        require(len(messages) != 3, "messages", len(messages), "expected another number")
        return original(self, messages, *given, **named)

    folder = with_chat(tmp_path)
    monkeypatch.setattr(ChatTemplate, "encode", encode)
    red = [one for one in compare_texts(folder, "it") if not one.ok]
    assert [(one.comparison, one.case) for one in red] == [(texts.IDS, "it, three turns")]


def test_chats_that_transformers_cannot_have_are_said(tmp_path, capsys, monkeypatch):
    with_chat(tmp_path)
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert texts.IDS not in {one.comparison for one in compare_texts(tmp_path, "it")}
    assert "transformers is not installed: no chats are compared with it" in capsys.readouterr().err
    monkeypatch.undo()
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": CHAT})
    )  # read by processors only
    (tmp_path / "chat_template.jinja").unlink()
    assert texts.IDS not in {one.comparison for one in compare_texts(tmp_path, "it")}
    assert (
        "it, a question: not compared with transformers, which refuses it"
        in capsys.readouterr().err
    )
    byte_tokenizer(("<s>", "</s>", "[MODEL_SETTINGS]")).save(tmp_path)
    (tmp_path / "chat_template.json").unlink()
    assert {one.comparison for one in compare_texts(tmp_path, "it")} == {
        "spelled tokens stay text",
        "BOS once",
    }
    assert "no chats are compared: a vocabulary with [MODEL_SETTINGS]" in capsys.readouterr().err


def test_what_cannot_be_compared_is_said(tmp_path, capsys, monkeypatch):
    save(random_model(tiny_args(**WINDOWED)), tmp_path)
    assert "loads in transformers" not in lines(tmp_path, length=16)
    said = capsys.readouterr().err
    assert "no tokenizer in the folder" in said
    assert "not written as hf: " in said
    assert "cannot be written for transformers" in said
    monkeypatch.setattr(checkpoint, "find_spec", lambda name: None)
    assert "logits = transformers" not in lines(hf_folder(tmp_path / "hf"))
    assert "transformers is not installed" in capsys.readouterr().err


def test_weights_that_transformers_misses_are_red(tmp_path, monkeypatch):
    model = tiny_hf("qwen2")
    monkeypatch.setattr(
        checkpoint, "_load_in_transformers", lambda folder, dtype: (model, ["lm_head.weight"])
    )
    assert failing(hf_folder(tmp_path)) == {"loads in transformers"}


def test_half_precision_is_compared_bit_by_bit(tmp_path):
    save(random_model(tiny_args()).to(torch.bfloat16), tmp_path, format="hf")
    assert not failing(tmp_path, length=16)
    assert not failing(tmp_path, length=16, dtype="bfloat16")


def test_the_command(tmp_path, capsys):
    hf_folder(tmp_path, "llama-tied")
    assert main(["verify", "checkpoint", str(tmp_path), "--length", "16", "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    told = json.loads(out[-1])
    assert len(out) == 1
    assert told["ok"] and told["check"] == "checkpoint"
    assert all(row["worst"]["error"] <= row["worst"]["tolerance"] for row in told["comparisons"])
    rewrite(tmp_path, lambda state: state.pop("model.norm.weight"))
    assert main(["verify", "checkpoint", str(tmp_path)]) == 1
    assert "every key = one parameter: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["no-such-folder"], "no such folder"),
        (["--length", "9"], "--length: got 9; valid only with `verify cache MODEL --full`"),
        (["FOLDER", "--length", "1000"], "--length: got 1000; expected 2 to max_seq_len = 128"),
        (["FOLDER", "--dtype", "int3"], "--dtype: got 'int3'; expected"),
        (["FOLDER", "--full"], "--full: got True"),
    ],
)
def test_a_wrong_request_is_one_sentence(tmp_path, capsys, words, said):
    hf_folder(tmp_path)
    capsys.readouterr()
    assert (
        main(
            [
                "verify",
                "checkpoint",
                *(str(tmp_path) if word == "FOLDER" else word for word in words),
            ]
        )
        == 2
    )
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1
