"""`transom generate` and `transom chat` as a person or a script meets them."""

import argparse
import dataclasses
import json
import re

import pytest
from safetensors.torch import save_file

from tests.helpers import random_model, run_python, tiny_args
from transom.attention.sdpa import sdpa
from transom.base.runtime import mixed_seed
from transom.cli import chat as chat_verb
from transom.cli import generate as generate_verb
from transom.cli.options import read_fields
from transom.inference.loop import generate
from transom.inference.sampling import SamplingArgs
from transom.inference.text import stream_text
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer


def write_model(folder, **changes):
    folder.mkdir(exist_ok=True)
    model = random_model(tiny_args(**{"vocab_size": 258, "max_seq_len": 96, **changes}))
    byte_tokenizer().save(folder)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "transom", **model.args.to_dict()})
    )
    save_file(model.state_dict(), folder / "model.safetensors")
    return model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return write_model(folder), folder


def continued(model, prompt, count, stop_tokens=(257,), seeds=None, **sampling):
    """The text of `count` tokens behind a prompt of text or ids, greedy unless told, and its
    `Completion`.
    """
    args = SamplingArgs(**sampling)
    texts = stream_text(
        model,
        byte_tokenizer(),
        [prompt],
        max_new_tokens=count,
        sampling=args,
        seeds=seeds,
        stop_tokens=stop_tokens,
    )
    return "".join(piece for (piece,) in texts), texts.completions[0]


def test_one_prompt_is_continued(made, call):
    model, folder = made
    code, out, err = call("generate", folder, "-p", "hello", "-m", 20, "--device", "cpu")
    assert (code, out) == (0, continued(model, "hello", 20)[0] + "\n")
    # The first call of a machine compiles the ops, and says so.
    lines = [line for line in err.splitlines() if not line.startswith("transom: ops: ")]
    assert lines[0].startswith("Prompt: 6 tokens, ") and lines[0].endswith(" tokens-per-sec")
    assert lines[1].startswith("Generation: 20 tokens, ")
    assert lines[2].startswith("Peak memory: ") and lines[2].endswith(" GB")


def test_json_is_the_last_line(made, call):
    model, folder = made
    code, out, _ = call("generate", folder, "-p", "hello", "-p", "you", "-m", 9, "--json")
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and document["model"] == str(folder)
    for prompt, row in zip(("hello", "you"), document["completions"], strict=True):
        text, completion = continued(model, prompt, 9)
        assert row == {
            "prompt": prompt,
            "text": text,
            "tokens": completion.tokens,
            "finish_reason": "length",
        }
    assert document["prompt_tokens"] == 10 and document["generation_tokens"] == 18
    assert document["prompt_tokens_per_second"] > 0 and document["generation_tokens_per_second"] > 0
    assert document["peak_memory_bytes"] > 1e7
    assert "==> 1 of 2: 'hello' <==\n" in out and "==> 2 of 2: 'you' <==\n" in out


def test_standard_input_and_stop_and_seed(made, call):
    model, folder = made
    text, _ = continued(model, "x\ny\n", 20)
    stop = text[5:7]
    code, out, _ = call("generate", folder, "-p", "-", "-m", 20, "--stop", stop, stdin="x\ny\n")
    assert (code, out) == (0, text[: text.index(stop)] + "\n")
    flags = (
        "-p",
        "a",
        "-m",
        12,
        "--temp",
        1.2,
        "--top-k",
        90,
        "--top-p",
        0.9,
        "--min-p",
        0.001,
        "--seed",
    )
    outs = [call("generate", folder, *flags, seed)[1] for seed in (1, 1, 2)]
    assert outs[0] == outs[1] != outs[2]


@pytest.mark.parametrize("verb", [generate_verb, chat_verb])
def test_every_field_of_sampling_is_a_flag(verb, made):
    parser = argparse.ArgumentParser()
    verb.add_arguments(parser)
    for field in dataclasses.fields(SamplingArgs):
        other = {float: 0.5, int: 3, type(None): 3}[type(field.default)]
        flag = f"--{field.name.replace('_', '-')}"
        words = ["folder", flag, str(other), *(["-p", "a"] if verb is generate_verb else [])]
        options = parser.parse_args(words)
        assert read_fields(options, SamplingArgs) == SamplingArgs(**{field.name: other})
        assert generate(made[0], [[1, 2]], 1, **{field.name: other}).shape == (1, 3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "-p", "hello", "-p", "a", "-m", 80], "memory: got a KV cache"),
        (["chat", "--max-model-len", 80], "memory: got a KV cache"),
        (["generate", "-p", "a" * 99], "got 'a prompt of 100 tokens and 128 new'"),
        (["chat", "--max-model-len", 97], "max_model_len: got 97"),
        (["generate", "-p", "a", "--kv-bits", 4], "kv_bits: got 4"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    made, call, monkeypatch, words, message
):
    monkeypatch.setattr("transom.inference.room.host_bytes_left", lambda: 1000)
    monkeypatch.setattr("transom.checkpoints.load._place", None)
    code, out, err = call(words[0], made[1], "--device", "cpu", *words[1:])
    assert (code, out) == (2, "")
    assert message in err and err.count("\n") == 1


@pytest.mark.parametrize(("verb", "memory"), [("generate", "230kB"), ("chat", "400kB")])
def test_offloading_says_what_is_streamed_and_changes_no_text(call, tmp_path, verb, memory):
    write_model(tmp_path, n_layers=6)
    words = ["-p", "hello"] if verb == "generate" else ["--ignore-chat-template"]
    words = [verb, tmp_path, *words, "-m", 9, "--device", "cpu"]
    _, expected, _ = call(*words, stdin="hello\n")
    code, out, err = call(*words, "--offload", "disk", "--max-memory", memory, stdin="hello\n")
    assert (code, out) == (0, expected)
    assert re.search(r"offload: [0-3] of 6 layers and all else, .* per call are streamed", err)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--max-memory", "1GB"], 2, "--max-memory: got '1GB'; valid only with --offload"),
        (["--offload", "ram"], 2, "offload: got 'ram'; expected cpu or disk"),
        (["--offload", "disk", "--max-memory", "8kB"], 2, "weights that stay in memory of 0.00 GB"),
        (
            ["--offload", "disk", "--max-memory", "230kB", "--compile", "-m", "3"],
            2,
            "compile: got True",
        ),
    ],
)
def test_what_offloading_refuses_is_one_sentence(call, tmp_path, words, code, message):
    write_model(tmp_path, n_layers=6)
    found, out, err = call("generate", tmp_path, "-p", "a", "--device", "cpu", *words)
    assert (found, out) == (code, "")
    assert message in err.splitlines()[-1]


def test_the_default_length_is_what_the_context_leaves(made, call):
    _, folder = made
    code, out, err = call("generate", folder, "-p", "a" * 90, "--ignore-eos", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["generation_tokens"] == 5
    assert "room for 5 new" in err


def test_control_tokens_in_a_prompt_are_text_unless_asked(made, call):
    model, folder = made
    eos = "<|end_of_text|>"
    prompt = f"a{eos}b{eos}"
    flags = ("generate", folder, "-p", prompt, "-m", 9)
    _, out, err = call(*flags)
    assert out == continued(model, prompt, 9)[0] + "\n"
    assert err.count(f"prompt 1: {eos} is read as plain text") == 1
    _, out, err = call(*flags, "--special")
    assert out == continued(model, [256, 97, 257, 98, 257], 9)[0] + "\n"
    assert "plain text" not in err


def test_control_tokens_of_an_answer_are_shown_when_asked(made, call, tmp_path):
    model = write_model(tmp_path)
    _, completion = continued(model, "hello", 12)
    middle, stop = completion.tokens[2], completion.tokens[6]
    data = json.loads(byte_tokenizer()._backend.to_json())
    data["model"]["vocab"] |= {"<a>": middle, "<b>": stop}  # in place of bytes that the model says
    data["model"]["vocab"] = {
        word: id for id, word in {id: w for w, id in data["model"]["vocab"].items()}.items()
    }
    data["added_tokens"] += [
        {**data["added_tokens"][0], "id": id, "content": word}
        for word, id in (("<a>", middle), ("<b>", stop))
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    flags = ("generate", tmp_path, "-p", "hello", "-m", 12)
    said, shown = call(*flags)[1], call(*flags, "--show-special")[1]
    assert "<a>" in shown and shown.endswith("<b>\n")
    assert shown.replace("<a>", "").replace("<b>", "") == said


def test_the_folder_says_where_to_stop(made, call, tmp_path):
    model = write_model(tmp_path)
    _, completion = continued(model, "hello", 20)
    stop = completion.tokens[6]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [300, stop]}))
    flags = ("generate", tmp_path, "-p", "hello", "-m", 20, "--json")
    rows = [json.loads(call(*flags, *more)[1].splitlines()[-1]) for more in ((), ("--ignore-eos",))]
    assert rows[0]["completions"][0]["finish_reason"] == "stop"
    assert (
        rows[0]["completions"][0]["tokens"]
        == completion.tokens[: completion.tokens.index(stop) + 1]
    )
    assert rows[1]["generation_tokens"] == 20


def test_stop_strings_of_the_folder_end_a_text(made, call, tmp_path):
    write_model(tmp_path)
    flags = ("generate", tmp_path, "-p", "hello", "-m", 12)
    shown = call(*flags)[1].rstrip("\n")
    for stated in (shown[4:6], [shown[4:6], "never said"]):
        (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": stated}))
        assert call(*flags)[1] == shown[: shown.index(shown[4:6])] + "\n"
        assert call(*flags, "--ignore-eos")[1].startswith(shown)
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": [7]}))
    code, out, err = call(*flags)
    assert (code, out) == (2, "") and "stop_strings" in err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["-p", "-"], "standard input is empty"),
        (["-p", "-", "-p", "-"], "--prompt: got '-'; expected it once"),
        (["-p", "a" * 96], "a prompt of 97 tokens"),
        (["-p", "a", "-m", "95"], "expected max_seq_len = 96"),
        (["-p", "a", "-m", "0"], "--max-tokens: got 0"),
        (["-p", "a", "--temp", "-1"], "temperature: got -1.0"),
        (["-p", "a", "--temp", "warm"], "--temp"),
        (["-p", "a", "--stop", ""], "--stop: got ''"),
        (["-p", "a", "--dtype", "int3"], "dtype: got 'int3'"),
        (["-p", "a", "--device", "abacus"], "device: got 'abacus'"),
        ([], "--prompt"),
    ],
)
def test_wrong_requests_are_one_sentence(made, call, words, sentence):
    code, out, err = call("generate", made[1], *words)
    errors = [line for line in err.splitlines() if "room for" not in line]
    assert (code, out) == (2, "") and len(errors) == 1 and sentence in errors[0]


@pytest.mark.parametrize("verb", [["generate", "-p", "a"], ["chat"]])
def test_a_folder_without_a_model_is_refused(call, tmp_path, verb):
    assert call(*verb, tmp_path / "nothing")[0] == 2
    code, _, err = call(*verb, tmp_path)
    assert code == 2 and "config.json" in err
    (tmp_path / "config.json").write_text("{}")
    assert call(*verb, tmp_path)[0] == 2


def test_arguments_are_checked_without_torch():
    code = (
        "import sys; from transom.cli.main import main; "
        "print(main(['generate', 'nowhere', '-p', 'a']), main(['chat', '.', '-m', '0']), 'torch' "
        "in sys.modules)"
    )
    assert run_python(code) == "2 2 False\n"


def test_chat_is_one_growing_text(made, call, tmp_path):
    model, folder = made
    first, _ = continued(model, "hello", 10)
    answer, done = continued(
        model, [256, *b"hello", *continued(model, "hello", 10)[1].tokens, *b"\nab\ncd"], 10
    )
    assert done.finish_reason == "length"
    stdin = f"hello\n\nab\\\ncd\n/save {tmp_path / 'text'}\n"
    code, out, err = call("chat", folder, "-m", 10, stdin=stdin)
    assert (code, out) == (0, f"{first}\n{answer}\n")
    assert "this model has no chat template" in err
    assert (tmp_path / "text").read_text() == f"hello{first}\nab\ncd{answer}"


def test_chat_runs_only_what_is_new(made, call, monkeypatch):
    _, folder = made
    seen, forward = [], LLM.forward

    def spy(self, inputs, *given, **options):
        seen.append(inputs.tokens.size(1))
        return forward(self, inputs, *given, **options)

    monkeypatch.setattr(LLM, "forward", spy)
    call("chat", folder, "-m", 3, stdin="hello\nab\n")
    # BOS and five bytes, two answers; the last answer, a line end and two bytes; two answers
    assert seen == [6, 1, 1, 4, 1, 1]


def test_chat_commands(made, call, tmp_path):
    model, folder = made
    taken = tmp_path / "taken"
    taken.write_text("mine")
    stdin = (
        f"x\n/reset\nhello\n/system be\nhello\n/nope\n/save {taken}\n/save\n/help\n/exit\nnever\n"
    )
    code, out, err = call("chat", folder, "-m", 6, stdin=stdin)
    answers = [continued(model, prompt, 6)[0] for prompt in ("x", "hello", "be\nhello")]
    assert code == 0 and out.startswith("".join(f"{answer}\n" for answer in answers) + "Every line")
    assert "command: got '/nope'" in err and "the file exists" in err and "name of a file" in err
    assert taken.read_text() == "mine"


def test_a_stop_token_ends_an_answer_and_not_the_text(call, tmp_path):
    model = write_model(tmp_path)
    tokens = continued(model, "hello", 20)[1].tokens
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[4]}))
    said = tokens[: tokens.index(tokens[4])]
    _, out, _ = call("chat", tmp_path, "-m", 20, stdin="hello\nab\n")
    answer, _ = continued(model, [256, *b"hello", *said, *b"\nab"], 20, stop_tokens=[tokens[4]])
    assert out.endswith(f"\n{answer}\n")


def test_every_turn_has_draws_of_its_own(made, call):
    flags = ("chat", made[1], "-m", 12, "--temp", 1.5)
    runs = [call(*flags, stdin="hello\n/reset\nhello\n")[1] for _ in range(2)]
    first, second = (
        continued(made[0], "hello", 12, temperature=1.5, seeds=[mixed_seed(0, turn)])[0]
        for turn in (0, 1)
    )
    assert runs == [f"{first}\n{second}\n"] * 2 and first != second


def test_chat_says_when_the_context_is_full(made, call, tmp_path):
    model, folder = made
    file = tmp_path / "text"
    stdin = f"hello\n{'x' * 90}\n/save {file}\nhi\n"
    code, out, err = call("chat", folder, "-m", 40, "--max-model-len", 50, stdin=stdin)
    first, done = continued(model, "hello", 40)
    assert code == 0 and "the context of 50 tokens is full" in err
    assert file.read_text() == "hello" + first  # the turn that did not fit left nothing behind
    answer, _ = continued(model, [256, *b"hello", *done.tokens, *b"\nhi"], 1)
    assert out == f"{first}\n{answer}\n"


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}])
@pytest.mark.parametrize("calls", [1, 2, 3, 10])
def test_ctrl_c_keeps_text_and_cache_together(call, tmp_path, monkeypatch, calls, changes):
    model = write_model(tmp_path / "model", n_layers=3, max_seq_len=256, **changes)
    count = 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 3 * calls - 1:  # in the middle layer, so that the layers' caches differ
            raise KeyboardInterrupt
        return sdpa(*args)

    monkeypatch.setattr(LLM, "attend", staticmethod(interrupted))
    file, prompt = tmp_path / "text", "hello " * 18
    stdin = f"{prompt}\n/save {file}\nhi\n"
    code, out, _ = call(
        "chat", tmp_path / "model", "-m", 12, "--prefill-step-size", 55, stdin=stdin
    )
    monkeypatch.setattr(LLM, "attend", staticmethod(sdpa))
    whole = continued(model, prompt, 12)[1].tokens
    kept = whole[
        : max(0, calls - 2)
    ]  # two calls for the prompt; the token of the second is shown first
    answer, _ = continued(model, [256, *prompt.encode(), *kept, *b"\nhi"], 12)
    assert code == 0 and out.endswith(f"\n{answer}\n")
    assert file.read_text().startswith(prompt)


def test_a_prompt_cache_file_is_reused_and_another_model_refuses_it(tmp_path, call):
    path, words = tmp_path / "prompt", ("-p", "hello there", "-m", 5, "--device", "cpu")
    write_model(tmp_path / "one")
    write_model(tmp_path / "two", rope_theta=77.0)
    words = (*words, "--prompt-cache-file", path)
    first = call("generate", tmp_path / "one", *words)
    again = call("generate", tmp_path / "one", *words)
    assert (first[0], first[1]) == (again[0], again[1])
    assert f"{path}: 11 of 12 prompt tokens are reused" in again[2]
    code, out, err = call("generate", tmp_path / "two", *words)
    assert (code, out) == (2, "")
    assert re.fullmatch(r"transom: prompt_cache_file: \S+: weights: got .*; expected .*\n", err)
