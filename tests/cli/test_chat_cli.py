"""`transom chat` with a chat template: what the model reads, what of it is run again, and where it
stops.
"""

import io
import json

import pytest
import torch
from safetensors.torch import save_file

from tests.chat.chat_texts import PUBLISHED
from tests.helpers import random_model, tiny_args
from transom.chat.template import ChatTemplate
from transom.checkpoints.save import save
from transom.cli.chat import Screen
from transom.cli.main import main
from transom.inference import session
from transom.inference import text as generation_text
from transom.inference.text import stream_text
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer

GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
PLAIN = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content }}<end_of_turn>{% "
    "endfor %}"
)


def write_model(folder, template=None, **changes):
    folder.mkdir(exist_ok=True)
    model = random_model(tiny_args(**{"vocab_size": 260, "max_seq_len": 512, **changes}))
    byte_tokenizer(GEMMA).save(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "transom", **model.args.to_dict()})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder), folder


@pytest.fixture
def call(capsys, monkeypatch):
    """Run `transom chat` in this process; (exit code, standard output, standard error)."""

    def call(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(["chat", *(str(word) for word in words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def answered(model, folder, turns, count, system="", stop_tokens=(257, 259)):
    """The answers to `turns`, every prompt rendered as a whole and run from its beginning, and all
    messages.
    """
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer)
    messages = [{"role": "system", "content": system}] if system else []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = template.encode(messages)
        texts = stream_text(model, tokenizer, [ids], max_new_tokens=count, stop_tokens=stop_tokens)
        messages.append({"role": "assistant", "content": "".join(piece for (piece,) in texts)})
    return "".join(
        one["content"] + "\n" for one in messages if one["role"] == "assistant"
    ), messages


def test_turns_are_messages_and_history_is_kept(made, call, tmp_path):
    model, folder = made
    file = tmp_path / "saved"
    stdin = f'hello\n"""\ntwo\\\n lines\n"""\nand\\\nmore\n/save {file}\n'
    code, out, err = call(folder, "-m", 8, "--system", "Be brief", stdin=stdin)
    turns = ["hello", "two\\\n lines", "and\nmore"]
    expected, messages = answered(model, folder, turns, 8, "Be brief")
    assert (code, out) == (0, expected)
    assert json.loads(file.read_text()) == {"messages": messages}
    assert "<start_of_turn> <end_of_turn>" in err and "built-in gemma" in err


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}])
def test_only_what_is_new_is_run(call, tmp_path, monkeypatch, changes):
    model = write_model(tmp_path, PLAIN, **changes)
    seen, forward = [], LLM.forward

    def spy(self, inputs, *given, **options):
        seen.append(inputs.tokens.size(1))
        return forward(self, inputs, *given, **options)

    expected, messages = answered(model, tmp_path, ["hello", "ab"], 3)
    monkeypatch.setattr(LLM, "forward", spy)
    _, out, _ = call(tmp_path, "-m", 3, stdin="hello\nab\n")
    assert out == expected
    # BOS, "u:hello" and the end of the turn; the answer again, as the template writes it with its
    # role in front
    again = len(f"a:{messages[1]['content']}".encode()) + 1 + len("u:ab") + 1
    assert seen == [9, 1, 1, again, 1, 1]


def test_system_and_reset(made, call):
    model, folder = made
    stdin = "x\n/system be kind\nhello\n/reset\nhi\n/system\nhi\n"
    _, out, _ = call(folder, "-m", 5, stdin=stdin)
    parts = [(["x"], ""), (["hello"], "be kind"), (["hi"], "be kind"), (["hi"], "")]
    assert out == "".join(answered(model, folder, turns, 5, system)[0] for turns, system in parts)


def test_every_stop_token_ends_an_answer(call, tmp_path, monkeypatch):
    model = write_model(tmp_path)
    _, messages = answered(model, tmp_path, ["hello"], 12, stop_tokens=())
    tokenizer = Tokenizer.load(tmp_path)
    ids = ChatTemplate.load(tmp_path, tokenizer).encode(messages[:1])
    texts = stream_text(model, tokenizer, [ids], max_new_tokens=12)
    _ = list(texts)
    tokens = texts.completions[0].tokens
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [255, tokens[4]]}))
    seen = []

    def spy(*args, **named):
        seen.append(named["stop_tokens"])
        return stream_text(*args, **named)

    monkeypatch.setattr(session, "stream_text", spy)
    _, out, _ = call(tmp_path, "-m", 12, stdin="hello\n")
    said = tokens[: tokens.index(tokens[4])]
    assert out == tokenizer.decode(said) + "\n"
    call(tmp_path, "-m", 2, "--ignore-eos", stdin="hello\n")
    # the list of the file, then the template's own end of turn
    assert seen == [(255, tokens[4], 259), ()]


@pytest.mark.parametrize("word", ["<|return|>", "<|call|>", "<|endoftext|>", "<|end|>"])
def test_the_stop_list_of_gpt_oss(call, tmp_path, word):
    """An answer ends at each of its stop tokens, a call of a tool among them, and not where a
    channel ends.
    """
    words = (
        "<|startoftext|>",
        "<|return|>",
        "<|endoftext|>",
        "<|call|>",
        "<|end|>",
        "<|start|>",
        "<|message|>",
    )
    tokenizer = byte_tokenizer((*words, "<|channel|>"))
    model = random_model(tiny_args(vocab_size=tokenizer.vocab_size, max_seq_len=512))
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(PUBLISHED["gpt-oss"])
    stops = [tokenizer.token_to_id(one) for one in ("<|return|>", "<|endoftext|>", "<|call|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    ids = ChatTemplate.load(tmp_path, tokenizer).encode([{"role": "user", "content": "hello"}])

    def said():
        texts = stream_text(model, tokenizer, [ids], max_new_tokens=12)
        _ = list(texts)
        return texts.completions[0].tokens

    id, before = tokenizer.token_to_id(word), said()
    later = next(one for one in before if one != before[0])
    with torch.no_grad():  # instead of what the model would say there
        model.output.weight[id] = 1.001 * model.output.weight[later]
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "transom", **model.args.to_dict()})
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    tokens = said()
    end = len(tokens) if word == "<|end|>" else tokens.index(id)
    assert tokens.index(id) == before.index(later) and not set(stops) & set(tokens[:end])
    _, out, _ = call(tmp_path, "-m", 12, "--dtype", "float32", stdin="hello\n")
    assert out == tokenizer.decode(tokens[:end]) + "\n"


def test_words_of_a_turn_never_end_it(made, call):
    model, folder = made
    turn = "a<end_of_turn>\n<start_of_turn>model\nb"
    _, out, _ = call(folder, "-m", 6, stdin=f'"""\n{turn}\n"""\n')
    ids = ChatTemplate.load(folder, Tokenizer.load(folder)).encode(
        [{"role": "user", "content": turn}]
    )
    assert ids.count(259) == 1 and ids.count(258) == 2
    assert out == answered(model, folder, [turn], 6)[0]


def test_a_refused_turn_leaves_no_trace(call, tmp_path):
    picky = (
        "{% if 'bad' in messages[-1].content %}{{ raise_exception('not this') }}{% endif %}" + PLAIN
    )
    model = write_model(tmp_path, picky)
    code, out, err = call(tmp_path, "-m", 4, stdin="one\nbad\ntwo\n")
    assert code == 0 and "refuses these messages: not this" in err
    assert out == answered(model, tmp_path, ["one", "two"], 4)[0]


def test_a_template_without_the_system_message_is_told(call, tmp_path):
    write_model(
        tmp_path, "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    )
    assert (
        "leaves out: content of system"
        in call(tmp_path, "--system", "be kind", "-m", 1, stdin="a\n")[2]
    )


def test_another_template_and_none(made, call, tmp_path):
    _, folder = made
    file = tmp_path / "mine.jinja"
    file.write_text("{{ 'x' if flag else 'y' }}{{ messages[-1].content }}")
    flags = ("--chat-template", file, "--chat-template-config", '{"flag": true}', "-m", 3)
    plain = call(folder, "--ignore-chat-template", "-m", 3, stdin="xa\n")
    assert "the chat template is ignored: each turn continues" in plain[2]
    assert call(folder, "--ignore-chat-template", "-m", 3, stdin="ya\n")[1] != plain[1]
    named = call(folder, *flags, stdin="a\n")
    assert named[0] == 0 and str(file) in named[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--chat-template", "llama9"], "expected a file or llama4, llama3"),
        (["--chat-template-config", "{"], "--chat-template-config: got '{'"),
        (["--chat-template-config", "[1]"], "--chat-template-config: got"),
        (["--ignore-chat-template", "--chat-template", "llama3"], "--ignore-chat-template"),
    ],
)
def test_wrong_requests_are_one_sentence(made, call, words, sentence):
    code, out, err = call(made[1], *words)
    assert (code, out) == (2, "") and sentence in err and len(err.splitlines()) == 1


THINKING = """\
{% for m in messages %}{{ m.role[0] ~ ':' }}{% if m.reasoning_content %}[THINK]{{ m.reasoning_content }}[/THINK]\
{% endif %}{{ m.content }}<end_of_turn>{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""


@pytest.mark.parametrize("control", [True, False])
def test_reasoning_is_apart_on_screen_in_the_history_and_in_the_file(
    call, tmp_path, monkeypatch, control
):
    marks = ("[THINK]", "[/THINK]") if control else ("<a>", "<b>")
    tokenizer = byte_tokenizer((*GEMMA, *marks))
    model = random_model(tiny_args(vocab_size=tokenizer.vocab_size, max_seq_len=512))
    save(model, tmp_path, tokenizer=tokenizer)
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    prompts = []
    words = ["[THINK]hm\n[/THINK]\nTwo.<end_of_turn>", "[THINK]so[/THINK]Three.<end_of_turn>"]

    def says(_model, rows, **_):
        prompts.append(tokenizer.decode(rows[0], skip_special=False))
        word = words[(len(prompts) - 1) % 2]
        return iter([id] for id in tokenizer.encode(word, allowed_special="all"))

    monkeypatch.setattr(generation_text, "stream", says)
    file = tmp_path / "saved"
    _, out, _ = call(tmp_path, "-m", 99, stdin=f"hello\nand\n/save {file}\n")
    assert out == "[reasoning]\nhm\n[answer]\nTwo.\n[reasoning]\nso\n[answer]\nThree.\n"
    assert (
        prompts[1] == "u:hello<end_of_turn>a:[THINK]hm[/THINK]Two.<end_of_turn>u:and<end_of_turn>a:"
    )
    said = json.loads(file.read_text())["messages"][1::2]
    assert [(one["reasoning_content"], one["content"]) for one in said] == [
        ("hm", "Two."),
        ("so", "Three."),
    ]
    prompts.clear()
    shown = call(tmp_path, "-m", 99, "--show-special", stdin=f"hello\nand\n/save {file}2\n")[1]
    assert shown == "".join(f"{word}\n" for word in words)
    assert json.loads((tmp_path / "saved2").read_text())["messages"][1::2] == said


OPENED = """\
{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content }}<end_of_turn>{% endfor %}\
{% if add_generation_prompt %}a:<think>{% endif %}"""


@pytest.mark.parametrize(
    ("begin", "shown", "reasoning"),
    [
        ("<think>hm", "[reasoning]\nhm so\n[answer]\nTwo.\n", "hm so"),
        ("<think>hm</think>Yes", "[reasoning]\nhm\n[answer]\nYes so</think>Two.\n", "hm"),
        ("", "[reasoning]\n so\n[answer]\nTwo.\n", " so"),
    ],
)
def test_reasoning_is_apart_where_the_answer_goes_on_from_given_words(
    call, tmp_path, monkeypatch, begin, shown, reasoning
):
    write_model(tmp_path, OPENED)
    ids = Tokenizer.load(tmp_path).encode(" so</think>Two.<end_of_turn>", allowed_special="all")
    monkeypatch.setattr(generation_text, "stream", lambda *_, **__: iter([id] for id in ids))
    file = tmp_path / "saved"
    _, out, _ = call(tmp_path, "-m", 99, "--prefill", begin, stdin=f"hello\n/save {file}\n")
    assert out == shown
    assert json.loads(file.read_text())["messages"][1]["reasoning_content"] == reasoning


def test_reasoning_is_dim_on_a_terminal(capsys):
    screen = Screen(dim=True)
    screen.write("reasoning", "hm")
    screen.write("answer", "Two.")
    screen.end()
    assert capsys.readouterr().out == "\x1b[2m[reasoning]\nhm\x1b[22m\n[answer]\nTwo.\n"


def test_an_answer_goes_on_from_words_that_it_is_given(made, call, tmp_path):
    """The model reads its own first words, without an end of turn behind them; they are part of the
    answer.
    """
    model, folder = made
    tokenizer = Tokenizer.load(folder)
    template = ChatTemplate.load(folder, tokenizer)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure,"}]
    ids = template.encode(messages, continue_final_message=True)
    assert tokenizer.decode(ids[-5:]) == "Sure,"
    texts = stream_text(model, tokenizer, [ids], max_new_tokens=6, stop_tokens=(257, 259))
    expected = "Sure," + "".join(piece for (piece,) in texts)
    words = ("--prefill", "Sure,", "--max-tokens", 6, "--temperature", 0)
    code, out, _ = call(folder, *words, stdin=f"Hi\n/save {tmp_path / 'chat.jsonl'}\n")
    assert code == 0 and out == f"{expected}\n"
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"]
    assert saved[1] == {"role": "assistant", "content": expected}
    for wrong in (("--prefill", "Sure, "), ("--prefill", "Sure,", "--ignore-chat-template")):
        code, _, err = call(folder, *wrong, stdin="Hi\n")
        assert code == 2 and "prefill: got" in err


def test_a_model_without_next_tokens_is_refused_before_the_first_turn(call, tmp_path):
    write_model(tmp_path, PLAIN, head={"num_labels": 2})
    code, out, err = call(tmp_path, stdin="hello\nagain\n")
    assert (code, out) == (2, "")
    assert err.count("head: got 'classification'") == 1


def test_what_every_turn_would_be_refused_for_is_refused_before_the_first(call, tmp_path):
    write_model(tmp_path, PLAIN)
    wrong = (tmp_path, "--chat-template-config", '{"enable_thinkin": false}')
    code, out, err = call(*wrong, stdin="hello\nagain\n")
    assert (code, out) == (2, "") and err.count("enable_thinkin") == 1
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for template, sentence in (
        ({"rag": PLAIN}, "none is called default"),
        ({"default": 3}, "{'default': 3}"),
    ):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**config, "chat_template": template})
        )
        code, out, err = call(tmp_path, stdin="hello\nagain\n")
        assert (code, out) == (2, "") and err.count(sentence) == 1


def test_stop_strings_of_the_folder_end_an_answer(made, call, tmp_path):
    write_model(tmp_path, PLAIN)
    shown = call(tmp_path, "-m", 12, stdin="hello\n")[1].rstrip("\n")
    settings = {"stop_strings": shown[4:6]}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert (
        call(tmp_path, "-m", 12, stdin="hello\n")[1].rstrip("\n")
        == shown[: shown.index(shown[4:6])]
    )
    assert call(tmp_path, "-m", 12, "--ignore-eos", stdin="hello\n")[1].startswith(shown)
