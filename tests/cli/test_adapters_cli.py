"""`transom chat --adapter`: after a change every answer is what the adapter loaded alone says."""

import pytest
import torch

from tests.checkpoints.adapters.folders import write_adapter, write_base
from transom.chat.template import ChatTemplate
from transom.checkpoints.load import load
from transom.cli.main import main
from transom.inference.text import stream_text
from transom.tokenizers.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("switch")
    base = write_base(root / "base", dtype="float32", max_seq_len=512)
    for seed, name in enumerate(("one", "two")):
        write_adapter(root / name, base, seed=seed, size=0.2)
    return root


def said(call, *words, stdin):
    code, out, err = call(
        "chat",
        *words,
        "-m",
        6,
        "--ignore-eos",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        stdin=stdin,
    )
    assert code == 0, err
    return out, err


def test_a_change_equals_each_adapter_alone(made, call):
    both = ("--adapter", f"one={made / 'one'}", "--adapter", f"two={made / 'two'}")
    answers = {name: said(call, made / name, stdin="hello\n")[0] for name in ("base", "one", "two")}
    assert len(set(answers.values())) == 3
    turns = (
        "hello\n/reset\n/adapter one\nhello\n/reset\n/adapter two\nhello\n/reset\n/adapter "
        "none\nhello\n"
    )
    out, err = said(call, made / "base", *both, stdin=turns)
    assert out == "".join(answers[name] for name in ("base", "one", "two", "base"))
    assert "adapters: one, two; in use: none" in err and "adapter in use: two" in err


def test_a_change_keeps_the_conversation_and_forgets_what_was_computed(made, call, tmp_path):
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}")
    words = ("--adapter", f"other={made / 'two'}", "--chat-template", template)
    out, _ = said(
        call,
        made / "one",
        *words,
        stdin="hello\n/adapter other\nand now\n/adapter default\nagain\n",
    )
    tokenizer = Tokenizer.load(made / "base")
    rendered = ChatTemplate(template.read_text(), tokenizer)
    messages, answers = [], []
    for name, turn in (("one", "hello"), ("two", "and now"), ("one", "again")):
        messages.append({"role": "user", "content": turn})
        texts = stream_text(
            load(made / name), tokenizer, [rendered.encode(messages)], max_new_tokens=6
        )
        answers.append("".join(piece for (piece,) in texts))
        messages.append({"role": "assistant", "content": answers[-1]})
    assert out == "".join(f"{answer}\n" for answer in answers)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["one"], "--adapter: got 'one'; expected NAME=FOLDER"),
        (["none=ONE"], "expected a name of its own, and not none"),
        (["a=ONE", "a=TWO"], "expected a name of its own"),
        (["a=BASE"], "expected an adapter or its run, not a complete model"),
        (["a.b=ONE"], "adapter name: got 'a.b'"),
        (["a=FOREIGN"], "base: got"),
    ],
)
def test_wrong_requests_are_one_sentence(made, capsys, tmp_path, flags, words):
    folders = {"ONE": made / "one", "TWO": made / "two", "BASE": made / "base"}
    if "FOREIGN" in flags[0]:
        other = write_base(tmp_path / "other", dtype="float32", seed=8)
        folders["FOREIGN"] = write_adapter(tmp_path / "foreign", other)
    for word, folder in folders.items():
        flags = [flag.replace(f"={word}", f"={folder}") for flag in flags]
    capsys.readouterr()
    code = main(
        ["chat", str(made / "base"), *(word for flag in flags for word in ("--adapter", flag))]
    )
    err = capsys.readouterr().err
    assert code == 2 and words in err and err.count("\n") == 1


def test_a_name_that_is_not_there_leaves_all_as_it_was(made, call):
    out, err = said(
        call, made / "base", "--adapter", f"one={made / 'one'}", stdin="/adapter two\nhello\n"
    )
    assert "adapter: got 'two'; expected one, none" in err
    assert out == said(call, made / "base", stdin="hello\n")[0]
    assert (
        "expected a chat that was opened with adapters"
        in said(call, made / "base", stdin="/adapter one\n")[1]
    )
