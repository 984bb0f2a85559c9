"""`transom eval` as a person or a script meets it."""

import importlib.util
import json

import pytest

from tests.helpers import random_model, run_python, tiny_args
from transom.checkpoints.save import save
from transom.tokenizers.training import byte_tokenizer

CHOICES = [
    {"question": f"The {word} is", "choices": ["red", "blue"], "answer": at % 2}
    for at, word in enumerate("abcd")
]
ANSWERS = [{"prompt": "2 + 2 =", "answer": "4"}, {"prompt": "Say hi:", "answer": ["hi", "Hi"]}]


def write_model(folder, seed=0):
    save(
        random_model(tiny_args(vocab_size=258, max_seq_len=96), seed),
        folder,
        tokenizer=byte_tokenizer(),
    )
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(autouse=True)
def data(tmp_path, monkeypatch):
    """The working folder, with one file of every kind."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("the cat sat on the mat\n" * 9)
    for name, rows in (("choices.jsonl", CHOICES), ("answers.jsonl", ANSWERS)):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


FILES = ("--data", "a.txt", "choices.jsonl", "--data", "answers.jsonl")


def test_every_score_is_a_line_with_its_interval(model, call):
    code, out, _ = call("eval", model, *FILES, "-m", 8)
    lines = [line.split() for line in out.splitlines()]
    found = {
        (line[0], *line[1:-1][:3])
        for line in lines
        if line and line[0] in ("a.txt", "choices.jsonl", "answers.jsonl")
    }
    assert code == 0 and {name for name, *_ in found} == {"a.txt", "choices.jsonl", "answers.jsonl"}
    assert sum(line[:1] == ["choices.jsonl"] for line in lines) == 3
    (bits,) = [line for line in lines if line[:4] == ["a.txt", "bits", "per", "byte"]]
    assert float(bits[4]) > 0 and bits[5] == "-"  # one document has no interval


def test_the_document_is_printed_last_and_written(model, call, data):
    flags = ("-m", 8, "--window", 64, "--out", "result.json", "--rows", "rows.jsonl", "--json")
    code, out, _ = call("eval", model, *FILES, *flags)
    document = json.loads(out.splitlines()[-1])
    assert code == 0 and json.loads((data / "result.json").read_text()) == document
    text, choices, answers = document["data"]
    assert (text["documents"], text["bytes"], text["window"]) == (1, 207, 64)
    assert (choices["rows"], answers["rows"], answers["unfinished"]) == (4, 2, 2)
    assert len(document["model"]["fingerprint"]) == len(text["sha256"]) == 64
    assert document["seconds"] > 0 and document["versions"]["transom"]
    rows = [json.loads(line) for line in (data / "rows.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == [
        "a.txt",
        *(f"choices.jsonl:{n}" for n in (1, 2, 3, 4)),
        "answers.jsonl:1",
        "answers.jsonl:2",
    ]
    assert (
        sum(row.get("right", False) for row in rows) / 2
        == answers["scores"]["exact_match"]["value"]
    )
    code, _, err = call("eval", model, *FILES, *flags)
    assert code == 2 and "--out: got 'result.json'" in err
    assert call("eval", model, *FILES, *flags, "--overwrite")[0] == 0


def test_two_models_stand_side_by_side(model, other, call):
    code, out, _ = call("eval", "--compare", model, other, *FILES, "-m", 4, "--json")
    document = json.loads(out.splitlines()[-1])
    assert (
        code == 0 and document["a"]["model"] == str(model) and document["b"]["model"] == str(other)
    )
    assert document["a"]["fingerprint"] != document["b"]["fingerprint"]
    text, choices, _ = document["data"]
    assert text["difference"]["bits_per_byte"]["low"] is None  # one document
    bounds = choices["difference"]["acc"]
    assert bounds["low"] <= bounds["value"] <= bounds["high"]
    assert "one unit is not enough" in out and "B - A" in out
    code, out, _ = call("eval", "--compare", model, model, *FILES, "-m", 4)
    assert code == 0 and out.count("no significant difference") == 4


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{model}"], "--data, --tasks: got both or none"),
        (["--data", "a.txt"], "MODEL, --compare: got both or none"),
        (
            ["{model}", "--compare", "{model}", "{model}", "--data", "a.txt"],
            "MODEL, --compare: got both or none",
        ),
        (["{model}", "--data", "a.txt", "--tasks", "hellaswag"], "--data, --tasks: got both"),
        (["{model}", "--data", "nothing.txt"], "path: got 'nothing.txt'"),
        (["{model}", "--data", "bad.jsonl"], "bad.jsonl:1: answer: got 5; means no choice"),
        (["nothing", "--data", "a.txt"], "no such folder"),
        (["{model}", "--data", "a.txt", "--window", "0"], "window: got 0"),
        (["{model}", "--data", "a.txt", "--stride", "97"], "stride: got 97"),
        (["{model}", "--data", "a.txt", "--extract", "("], "extract: got '('"),
        (
            ["{model}", "--data", "a.txt", "--num-fewshot", "2"],
            "--num-fewshot: got 2; valid only with --tasks",
        ),
        (
            ["{model}", "--tasks", "hellaswag", "--window", "9"],
            "--window: got 9; valid only with --data",
        ),
        (
            ["{model}", "--tasks", "hellaswag", "--ignore-case"],
            "--ignore-case: got True; valid only with --data",
        ),
        (["{model}", "--data", "answers.jsonl", "-m", "90"], "answers.jsonl:1: a prompt of"),
        (["{model}", "--data", "a.txt", "--out", "no/where.json"], "--out: got"),
        (
            ["--compare", "{model}", "{model}", "--revision", "x", "--data", "a.txt"],
            "valid only with one model",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(model, call, data, words, sentence):
    (data / "bad.jsonl").write_text(json.dumps({**CHOICES[0], "answer": 5}) + "\n")
    code, out, err = call("eval", *(word.format(model=model) for word in words))
    assert (code, out, err.count("\n")) == (2, "", 1) and sentence in err


def test_models_without_a_next_token_are_refused(call, data):
    for name, changes, sentence in (
        ("head", {"head": {"num_labels": 2}}, "expected a language model"),
        ("both", {"layer_pattern": "B"}, "see later tokens"),
    ):
        args = tiny_args(vocab_size=258, max_seq_len=96, **changes)
        save(random_model(args), data / name, format="native", tokenizer=byte_tokenizer())
        code, _, err = call("eval", data / name, "--data", "a.txt")
        assert code == 2 and sentence in err


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is installed")
def test_tasks_say_what_they_need(model, call):
    code, _, err = call("eval", model, "--tasks", "hellaswag")
    assert code == 2 and "pip install 'transom[lm_eval]'" in err


def test_a_wrong_file_is_refused_before_torch_is_imported(data):
    words = ["eval", str(data), "--data", "nothing.jsonl"]
    code = (
        f"import sys; from transom.cli.main import main; print(main({words}), 'torch' in "
        f"sys.modules)"
    )
    assert run_python(code).strip() == "2 False"
