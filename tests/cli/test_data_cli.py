"""`transom data`: counts, faults with their lines, exit codes, and one example token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.chat.chat_texts import say
from tests.helpers import run_python, tiny_args
from tests.training.finetune.runs import base_folder, chats, judged, preferences, solved
from transom.chat.template import ChatTemplate
from transom.cli import finetune
from transom.cli.main import Parser
from transom.data.chat.packing import first_fit_decreasing
from transom.data.chat.rows import COUNTS
from transom.distributed.ranks import ALONE
from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer
from transom.training.finetune.data import open_finetune_data

CHATML = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
TALK = {
    "messages": [say("user", "q"), say("assistant", "a"), say("user", "r"), say("assistant", "bc")]
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder without weights: tokenizer and settings are all that is read."""
    folder = tmp_path_factory.mktemp("model")
    byte_tokenizer(CHATML).save(folder)
    args = tiny_args(vocab_size=260, max_seq_len=200)
    (folder / "config.json").write_text(json.dumps({"model_type": "transom", **args.to_dict()}))
    return folder


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def checked(call: Any, *words: object) -> tuple[int, dict[str, Any], str]:
    code, out, err = call("data", "check", *words, "--json")
    return code, json.loads(out.splitlines()[-1]), err


ALL = "data.held_out=0"


def test_check_counts(call: Any, model: Path, tmp_path: Path) -> None:
    masked = {"messages": [say("user", "q"), {**say("assistant", "a"), "weight": 0}]}
    long = {"messages": [say("user", "q"), say("assistant", "x" * 300)]}
    path = write(tmp_path, [TALK, masked, long, TALK])
    code, facts, _ = checked(call, path, "--model", model, ALL, "finetune.packing=true")
    # Control tokens, then characters: of three turns with "user\n" or "assistant\n" and a line end
    # behind each.
    tokens = 2 * 4 + len("user\nq\nassistant\na\nuser\nr\nassistant\nbc")
    assert (code, facts["examples"], facts["rows"]) == (0, 4, 3)
    assert (
        facts["tokens"] == 2 * tokens + 201
    )  # what is longer than 200 inputs and their last target is cut
    assert facts["trained_tokens"] == 2 * len("a.bc.") + 201 - 3 - len("user\nq\nassistant\n")
    assert (facts["truncated"], facts["fully_masked"], facts["without_end"], facts["dropped"]) == (
        1,
        1,
        1,
        0,
    )
    assert facts["template"] == "the built-in template chatml" and facts["kinds"] == ["chat"]
    assert facts["longest"] == 201 and facts["seq_len"] == 200 and facts["malformed"] == []
    assert facts["packed_rows"] == 2 and 0 < facts["fill"] < 1
    _, facts, _ = checked(call, path, "--model", model, "--truncate", "drop", ALL)
    assert (facts["dropped"], facts["truncated"], facts["longest"]) == (1, 0, tokens)


def test_check_lists_every_malformed_row_and_fails(call: Any, model: Path, tmp_path: Path) -> None:
    tools = {**TALK, "messages": [say("user", "q"), say("assistant", "\ud800")]}
    path = write(tmp_path, [TALK, "no\n", {"messages": [say("user", "q")]}, tools, {"text": "a"}])
    code, facts, _ = checked(call, path, "--model", model, ALL)
    assert code == 1 and facts["malformed_rows"] == 4 and facts["rows"] == 1
    assert [fault["where"].rpartition(":")[2] for fault in facts["malformed"]] == [
        "2",
        "3",
        "4",
        "5",
    ]
    code, out, _ = call("data", "check", path, "--model", model)
    assert (
        code == 1 and f"{path}:2: 'no': expected one JSON object" in out and "malformed rows" in out
    )


def test_check_fails_where_nothing_would_be_learnt(call: Any, model: Path, tmp_path: Path) -> None:
    masked = {"messages": [say("user", "q"), {**say("assistant", "a"), "weight": 0}]}
    code, facts, err = checked(call, write(tmp_path, [masked]), "--model", model)
    assert code == 1 and facts["trains"] is False and "nothing to train on" in err


def test_check_of_prompts_pairs_and_splits(call: Any, model: Path, tmp_path: Path) -> None:
    asked = write(tmp_path, [{"prompt": "1+1", "answer": "2"}, {"prompt": "1" * 80, "answer": "2"}])
    code, facts, err = checked(call, asked, "--model", model, ALL)
    assert (code, facts["rows"], facts["too_long"], facts["kinds"]) == (0, 1, 1, ["answer"])
    assert facts["objective"] == "grpo" and "--objective grpo" in err
    code, facts, _ = checked(
        call, asked, "--model", model, ALL, "finetune.reward=regex", "finetune.answer_tokens=8"
    )
    assert (code, facts["rows"], facts["malformed"]) == (0, 2, [])
    folder = tmp_path / "set"
    folder.mkdir()
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    write(folder, [pair] * 2, "train.jsonl")
    write(folder, [pair], "val.jsonl")
    facts = checked(call, folder, "--model", model)[1]
    assert facts["rows"] == 4 and facts["held_out"] == 1
    assert checked(call, folder, "--model", model, "--split", "valid")[1]["rows"] == 2
    write(
        folder, [pair, {"prompt": "q"}], "val.jsonl"
    )  # finetune reads it, too, and refuses the second row
    code, facts, _ = checked(call, folder, "--model", model)
    assert code == 1 and facts["malformed"][0]["where"] == f"{folder / 'val.jsonl'}:2"


@pytest.mark.parametrize(
    ("write_set", "words"),
    [
        (chats, []),
        (chats, ["finetune.packing=true", "--max-seq-length", 40, "--batch-size", 3]),
        (chats, ["--max-seq-length", 46, "--truncate", "drop", "--epochs", 2, "data.held_out=0.5"]),
        (preferences, ["--objective", "dpo"]),
        (judged, ["--objective", "kto", "finetune.template=plain", "data.held_out=0.3"]),
        (solved, ["--objective", "grpo", "finetune.answer_tokens=200"]),
    ],
)
def test_check_counts_what_finetune_trains_on(
    call: Any, tmp_path: Path, write_set: Any, words: list[Any]
) -> None:
    base, rows = base_folder(tmp_path / "model"), write_set(tmp_path / "rows.jsonl")
    given = [
        word for word in words if word not in ("--truncate", "drop")
    ]  # finetune has it as a word only
    given += ["finetune.truncate=drop"] * (len(given) < len(words))
    code, facts, _ = checked(call, rows, "--model", base, *words)
    parser = Parser()
    finetune.add_arguments(parser)
    args = finetune.config_of(
        parser.parse_intermixed_args([str(one) for one in [base, "--data", rows, *given]])
    )
    tokenizer = Tokenizer.load(base)
    template = ChatTemplate.find(base, tokenizer, args.finetune.template)
    data = open_finetune_data(args, tokenizer, template, base, ALONE)
    assert code == 0
    assert (facts["packing"], facts["rows_per_step"]) == (
        data.choice.packing,
        data.choice.batch_size,
    )
    assert facts["steps"] == data.choice.steps
    if data.train is None:
        assert facts["rows"] == data.choice.rows and facts["held_out"] == len(data.held_out)
    else:
        assert {name: facts[name] for name in COUNTS} == {
            name: data.train.counts[name] for name in COUNTS
        }


def test_rows_of_another_objective_are_refused_as_by_finetune(
    call: Any, model: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("finetune: {objective: dpo}")
    for words in (["--objective", "dpo"], ["finetune.objective=dpo"], [config]):
        code, _, err = call("data", "check", write(tmp_path, [TALK]), *words, "--model", model)
        assert code == 2 and "finetune.objective: got 'dpo'" in err.splitlines()[-1]


def test_show_prints_tokens_with_their_loss(call: Any, model: Path, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        [TALK, {"messages": [say("user", "\x1b[2J"), {**say("assistant", "é"), "weight": 0.5}]}],
    )
    code, out, _ = call("data", "show", path, "--model", model, "--index", 1, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["examples"] == ["rows.jsonl:2"]
    trained = [
        (token["id"], token["weight"], token["mark"]) for token in row["tokens"] if token["weight"]
    ]
    assert trained == [(0xC3, 0.5, ""), (0xA9, 0.5, ""), (259, 0.5, "end of turn")]
    code, out, _ = call("data", "show", path, "--model", model, "--index", 1)
    assert (
        "\x1b" not in out and "\\x1b[2J" in out and "é" in out
    )  # no colours in a pipe, nor those of a row
    assert "'<|im_end|>'    end of turn  259   0.5        0" in out


def test_show_colours_what_is_learnt_on_a_terminal(
    call: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for no_color, colour in ((None, True), ("1", False)):
        monkeypatch.delenv("NO_COLOR", raising=False)
        if no_color:
            monkeypatch.setenv("NO_COLOR", no_color)
        _, out, _ = call("data", "show", write(tmp_path, [TALK]), "--model", model)
        assert ("\x1b[32ma" in out) == colour


def test_show_packed_prints_segments(call: Any, model: Path, tmp_path: Path) -> None:
    texts = ["x" * 80, "y" * 30, "z" * 150]
    path = write(tmp_path, [{"text": text} for text in texts])
    packs = first_fit_decreasing([len(text) + 1 for text in texts], 200, seed=0)
    code, out, _ = call("data", "show", path, "--model", model, "--packed", "--index", 0, "--json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and row["examples"] == [f"rows.jsonl:{at + 1}" for at in packs[0]]
    assert [token["segment"] for token in row["tokens"] if token["mark"] == "BOS"] == [0, 1]
    assert [token["position"] for token in row["tokens"] if token["mark"] == "BOS"] == [0, 0]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["check", "none.jsonl", "--model", "MODEL"],
            "data: got 'none.jsonl'; expected a file",
        ),
        (["check", "DATA", "--model", "none"], "got 'none', no such folder"),
        (["check", "DATA"], "--model: got nothing; expected a value"),
        (["count", "DATA", "--model", "MODEL"], "what: got 'count'; expected"),
        (
            ["check", "DATA", "--model", "MODEL", "--seq-len", "201"],
            "data.seq_len: got 201; expected at most 200",
        ),
        (
            ["check", "DATA", "--model", "MODEL", "--index", "0"],
            "--index: got 0; valid only with show",
        ),
        (
            ["check", "DATA", "--model", "MODEL", "--split", "dev"],
            "split: got 'dev'; expected a split that",
        ),
        (["show", "DATA", "--model", "MODEL", "--index", "2"], "--index: got 2; expected 0 to 0"),
        (
            ["show", "DATA", "--model", "MODEL", "--seed", "1"],
            "--seed: got 1; valid only with show --packed",
        ),
        (
            ["check", "DATA", "--model", "MODEL", "--chat-template", "x"],
            "chat template: got 'x'; expected a file",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(
    call: Any, model: Path, tmp_path: Path, words: list[str], sentence: str
) -> None:
    given = {"MODEL": str(model), "DATA": str(write(tmp_path, [TALK]))}
    code, out, err = call("data", *(given.get(word, word) for word in words))
    assert (code, out) == (2, "") and sentence in err.splitlines()[-1]


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from transom.cli.main import main; main(['data', '--help']); print('torch' "
        "in sys.modules)"
    )
    assert run_python(code).splitlines()[-1] == "False"


def test_a_run_on_tokens_has_the_losses_of_its_text(call: Any, tmp_path: Path) -> None:
    texts, tokens = tmp_path / "texts", tmp_path / "tokens"
    texts.mkdir()
    for number in range(6):
        (texts / f"{number}.txt").write_text(f"text {number}. " * 30)
    byte_tokenizer().save(tmp_path / "tokenizer")
    words = ("tokenize", texts, "--model", tmp_path / "tokenizer", "--out", tokens, "--workers", 1)
    code, _, err = call("data", *words, "--part", "2/2")
    assert code == 0 and "parts are missing" in err
    code, out, err = call("data", *words, "--part", "1/2", "--json")
    assert code == 0 and "all parts are there" in err and len(json.loads(out)["shards"]) == 1
    fields = ["model.dim=16", "model.n_layers=1", "data.seq_len=16", "steps=2", "--json"]
    losses = []
    for source in (texts, tokens):
        run = tmp_path / f"run-{source.name}"
        given = ["tokenizer.kind=bytes", "data.held_out=0.3", f"out={run}", *fields]
        code, _, err = call("train", f"data.sources={source}", *given)
        assert code == 0, err
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses.append([(one.get("loss"), one.get("bits_per_byte")) for one in lines])
    assert losses[0] == losses[1] and len(losses[0]) >= 2
    code, _, err = call("train", f"data.sources={tokens}", f"out={tmp_path / 'bpe'}", *fields)
    assert code == 2 and "expected text; tokens are only read with the tokenizer" in err


def test_flags_of_other_actions_are_refused(call: Any, tmp_path: Path) -> None:
    words = ("tokenize", tmp_path, "--model", tmp_path)
    for given in (("--seed", 1), ("--train-on", "all"), ("steps=3",), ("--part", 1)):
        assert call("data", *words, "--out", tmp_path / "out", *given)[0] == 2
    code, _, err = call("data", *words)
    assert code == 2 and "--out: got None; expected a folder or a URL" in err
    code, _, err = call("data", "check", tmp_path, "--model", tmp_path, "--workers", 2)
    assert code == 2 and "--workers: got 2; valid only with tokenize" in err
