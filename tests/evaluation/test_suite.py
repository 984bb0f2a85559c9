"""Text scored by document against `transformers`, and two models on the same data."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.evaluation.twins import LONGEST, TEXT, write_llama
from transom.base.errors import RequestError, WorkError
from transom.base.files import sha256_of
from transom.data.text.shards import prepare
from transom.data.text.sources import SourceArgs
from transom.evaluation.eval_args import EvalArgs
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.intervals import Ratio, Z
from transom.evaluation.suite import comparison, evaluate, report
from transom.evaluation.task_data import DataSet, TaskResult, open_data


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Other weights, the same vocabulary."""
    return EvalModel.open(
        write_llama(tmp_path_factory.mktemp("other"), seed=1), device="cpu", dtype="float32"
    )


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A folder of three documents."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    where = tmp_path / "texts"
    where.mkdir()
    for number, text in enumerate(TEXT):
        (where / f"{number}.txt").write_text(text)
    return where


def test_documents_are_scored_alone_with_bos_and_eos(folder, opened, texts):
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    want = []
    for text in TEXT:
        ids = torch.tensor([[*tokenizer(text).input_ids, tokenizer.eos_token_id]])
        with torch.no_grad():
            want.append(float(model(ids, labels=ids).loss) * (ids.size(1) - 1))
    (got,) = evaluate(opened, open_data([str(texts)]), EvalArgs(window=LONGEST))
    assert [row["nats"] for row in got.rows] == pytest.approx(want, rel=1e-5)
    assert [row["bytes"] for row in got.rows] == [len(text.encode()) for text in TEXT]
    tokens = sum(
        len(tokenizer(text).input_ids) for text in TEXT
    )  # each is predicted but BOS, and EOS too
    assert (got.facts["documents"], got.facts["tokens"]) == (3, tokens)
    bits = sum(want) / math.log(2) / got.facts["bytes"]
    assert got.scores["bits_per_byte"].score == pytest.approx(bits, rel=1e-5)
    assert got.scores["perplexity"].score == pytest.approx(math.exp(sum(want) / tokens), rel=1e-5)


def test_the_hash_of_text_is_that_of_a_run(opened, texts):
    (got,) = evaluate(opened, open_data([str(texts)]), EvalArgs())
    assert got.sha256 == prepare(SourceArgs(str(texts)), opened.tokenizer).sha256


def test_a_report_has_an_interval_for_every_score(opened, texts, tmp_path):
    rows = tmp_path / "rows.jsonl"
    asked = [
        {"question": f"The {word}", "choices": ["fox", "dog"], "answer": at % 2}
        for at, word in enumerate("abcdef")
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    args = EvalArgs(limit=5, stride=7, window=32)
    document = report(opened.facts(), evaluate(opened, open_data([str(texts), str(rows)], 5), args))
    assert json.loads(json.dumps(document)) == document
    text, choices = document["data"]
    assert choices["sha256"] == sha256_of(rows) and (choices["rows"], text["documents"]) == (5, 3)
    assert (text["window"], text["stride"]) == (32, 7)
    for one in (text, choices):
        for score in one["scores"].values():
            assert score["low"] <= score["value"] <= score["high"]
    share, (low, high) = (
        choices["scores"]["acc"]["value"],
        (choices["scores"]["acc"][k] for k in ("low", "high")),
    )
    assert (
        abs(share - low) == pytest.approx(Z * np.sqrt(low * (1 - low) / 5), abs=1e-7)
        and high > share
    )


def test_a_difference_is_paired_and_says_who_is_better(opened, other, texts):
    data = open_data([str(texts)])
    first, second = (evaluate(one, data, EvalArgs()) for one in (opened, other))
    a, b = opened.facts(), other.facts()
    assert a["fingerprint"] != b["fingerprint"] and a["tokenizer_hash"] == b["tokenizer_hash"]
    (one,) = comparison((a, b), first, second)["data"]
    found = one["difference"]["bits_per_byte"]
    values = [one[side]["scores"]["bits_per_byte"]["value"] for side in "ab"]
    assert found["value"] == pytest.approx(values[1] - values[0])
    (back,) = comparison((b, a), second, first)["data"]
    assert back["difference"]["bits_per_byte"]["low"] == pytest.approx(-found["high"])
    (same,) = comparison((a, a), first, first)["data"]
    assert same["difference"]["bits_per_byte"] == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
        "better": None,
    }


def test_the_better_of_two_is_the_lower_of_bits_and_the_higher_of_shares():
    rows, facts = 40, {"tokenizer_hash": "same"}
    bits, right = np.arange(rows) + 1.0, np.arange(rows) % 2 == 0

    def measured(more_bits, right):
        scores = {
            "bits_per_byte": Ratio(bits + more_bits, np.ones(rows)),
            "acc": Ratio.of_right(right),
        }
        return [TaskResult(DataSet("data", "text"), "hash", scores, {}, [])]

    first, second = measured(0.0, right), measured(0.5, right | (np.arange(rows) % 4 == 1))
    (one,) = comparison((facts, facts), first, second)["data"]
    assert {name: found["better"] for name, found in one["difference"].items()} == {
        "bits_per_byte": "a",
        "acc": "b",
    }
    (close,) = comparison((facts, facts), first, measured(0.0, right | (np.arange(rows) == 1)))[
        "data"
    ]
    assert close["difference"]["acc"]["better"] is None
    assert close["difference"]["acc"]["value"] == pytest.approx(1 / rows)


def test_perplexities_of_two_vocabularies_have_no_difference(opened, texts):
    measured = evaluate(opened, open_data([str(texts)]), EvalArgs())
    facts = opened.facts()
    (one,) = comparison((facts, {**facts, "tokenizer_hash": "other"}), measured, measured)["data"]
    assert set(one["difference"]) == {"bits_per_byte"} and "perplexity" in one["b"]["scores"]


def test_data_that_changes_between_two_models_is_refused(opened, texts):
    facts = opened.facts()
    first = evaluate(opened, open_data([str(texts)]), EvalArgs())
    (texts / "0.txt").write_text("another text")
    second = evaluate(opened, open_data([str(texts)]), EvalArgs())
    with pytest.raises(WorkError, match="the data changed"):
        comparison((facts, facts), first, second)


def test_what_was_left_out_is_said(opened, texts, capsys):
    (texts / "picture.bin").write_bytes(b"\0\1")
    evaluate(opened, open_data([str(texts)]), EvalArgs())
    assert "3 documents read; 1 binary file left out" in capsys.readouterr().err


def test_a_window_beyond_the_model_is_refused(opened, texts):
    with pytest.raises(RequestError, match=f"window: got {LONGEST + 1}; expected 1 to {LONGEST}"):
        evaluate(opened, open_data([str(texts)]), EvalArgs(window=LONGEST + 1))


def test_scores_that_are_no_numbers_are_no_result(folder, texts):
    broken = EvalModel.open(folder, device="cpu", dtype="float32")
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with pytest.raises(WorkError, match="bits_per_byte is not finite"):
        evaluate(broken, open_data([str(texts)]), EvalArgs())
    (texts.parent / "rows.jsonl").write_text(
        '{"question": "The", "choices": ["fox", "dog"], "answer": 0}'
    )
    with pytest.raises(WorkError, match=r"rows\.jsonl:1: the log-probability of a choice is NaN"):
        evaluate(broken, open_data([str(texts.parent / "rows.jsonl")]), EvalArgs())
