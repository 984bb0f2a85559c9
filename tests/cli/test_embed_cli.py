"""`transom embed` as a person or a script meets it."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers import random_model, run_python, tiny_args
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.config.layer_args import BASE_HEAD
from transom.data.labelled import write_labels
from transom.inference.embedding import encode_texts, run_rows
from transom.models.llm import LLM
from transom.tokenizers.training import byte_tokenizer

TEXTS = ["the cat", "a much longer text than that", "x"]


def write_model(folder, **changes):
    model = random_model(tiny_args(**{"vocab_size": 258, "max_seq_len": 32, **changes}))
    save(model, folder, tokenizer=byte_tokenizer())
    return model, folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    model, folder = write_model(tmp_path_factory.mktemp("labels"), head={"num_labels": 3})
    write_labels(folder, ["bad", "fair", "good"])
    return model, folder


@pytest.fixture
def call(capsys, monkeypatch):
    """Run the verb in this process; (exit code, standard output, standard error)."""

    def call(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main(["embed", *(str(word) for word in words), "--device", "cpu"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def words(texts):
    return [word for text in texts for word in ("--text", text)]


def expected(model, texts=TEXTS, pooling=None):
    return run_rows(model, encode_texts(byte_tokenizer(), texts, model.args.max_seq_len), pooling)


def test_vectors_are_printed_one_text_a_line(plain, call):
    model, folder = plain
    code, out, err = call(folder, *words(TEXTS))
    got = torch.tensor([[float(number) for number in line.split()] for line in out.splitlines()])
    assert code == 0 and err == "3 texts, 39 tokens, mean pooling, vectors of 32\n"
    torch.testing.assert_close(got, expected(model, pooling="mean").vectors, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("stated", "pooling"),
    [
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "mean"),
    ],
)
def test_the_folder_states_the_pooling(plain, call, tmp_path, stated, pooling):
    shutil.copytree(plain[1], tmp_path / "model")
    (tmp_path / "model" / "1_Pooling").mkdir()
    (tmp_path / "model" / "1_Pooling" / "config.json").write_text(json.dumps(stated))
    _, out, err = call(tmp_path / "model", "--text", "ab", "--json")
    assert json.loads(out.splitlines()[-1])["pooling"] == pooling
    assert ("pooling_mode_cls_token, which is not supported" in err) == (
        "pooling_mode_cls_token" in stated
    )


@pytest.mark.parametrize("flags", [[], ["--normalize"]])
def test_modules_that_are_not_applied_are_named(plain, call, tmp_path, flags):
    shutil.copytree(plain[1], tmp_path / "model")
    kinds = ["models.Transformer", "models.Pooling", "models.Dense", "models.Normalize"]
    modules = [{"type": f"sentence_transformers.{kind}"} for kind in kinds]
    (tmp_path / "model" / "modules.json").write_text(json.dumps(modules))
    _, _, err = call(tmp_path / "model", "--text", "ab", *flags)
    assert "not applied: Dense" in err and ("Normalize" in err) == (not flags)


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_base_without_a_head_is_pooled_as_a_language_model(plain, pooling):
    base = LLM(replace(plain[0].args, head=BASE_HEAD))
    base.load_state_dict(plain[0].state_dict(), strict=False)
    rows = encode_texts(byte_tokenizer(), TEXTS, 32)
    torch.testing.assert_close(
        run_rows(base, rows, pooling).vectors, expected(plain[0], pooling=pooling).vectors
    )


def test_json_is_the_last_line_and_has_everything(plain, call):
    model, folder = plain
    code, out, _ = call(folder, "--text", "ab", "--pooling", "last", "--normalize", "--json")
    document = json.loads(out.splitlines()[-1])
    want = torch.nn.functional.normalize(expected(model, ["ab"], "last").vectors, dim=1)
    torch.testing.assert_close(torch.tensor(document.pop("embeddings")), want)
    assert code == 0
    assert document == {"model": str(folder), "pooling": "last", "texts": 1, "tokens": 3, "dim": 32}


@pytest.mark.parametrize("name", ["v.safetensors", "v.npy"])
def test_vectors_go_to_a_file_once(plain, call, tmp_path, name):
    model, folder = plain
    out = tmp_path / name
    code, printed, _ = call(folder, *words(TEXTS), "--out", out)
    assert (code, printed) == (0, "")
    got = torch.from_numpy(np.load(out)) if out.suffix == ".npy" else load_file(out)["embeddings"]
    torch.testing.assert_close(got, expected(model, pooling="mean").vectors)
    code, _, err = call(folder, "--text", "a", "--out", out)
    assert code == 2 and "expected --overwrite" in err
    code, printed, _ = call(folder, "--text", "a", "--out", out, "--overwrite", "--json")
    assert (
        code == 0
        and json.loads(printed)["out"] == str(out)
        and "embeddings" not in json.loads(printed)
    )


def test_texts_come_from_files_and_standard_input(plain, call, tmp_path):
    _, folder = plain
    _, want, _ = call(folder, *words(TEXTS))
    lines, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    lines.write_bytes("\r\n".join(TEXTS).encode())
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    assert call(folder, "--input", lines)[1] == want
    assert call(folder, "--input", rows)[1] == want
    assert call(folder, "--input", "-", stdin="\n".join(TEXTS) + "\n")[1] == want
    assert call(folder, "--text", TEXTS[0], "--input", "-", stdin="\n".join(TEXTS[1:]))[1] == want


def test_a_classifier_says_labels(classifier, call):
    model, folder = classifier
    shares = expected(model).logits.softmax(1)
    names = [["bad", "fair", "good"][index] for index in shares.argmax(1)]
    code, out, err = call(folder, *words(TEXTS))
    assert code == 0 and "last pooling" in err
    rows = [line.split("\t") for line in out.splitlines()]
    assert [row[0] for row in rows] == names
    assert [float(row[1]) for row in rows] == pytest.approx(shares.amax(1).tolist(), abs=1e-4)
    document = json.loads(call(folder, *words(TEXTS), "--json")[1])
    assert [row["label"] for row in document["labels"]] == names and len(
        document["embeddings"]
    ) == 3


def test_texts_that_spell_control_tokens_are_counted(plain, call):
    words = [
        word for text in ("a<|end_of_text|>", "b", "<|end_of_text|>") for word in ("--text", text)
    ]
    assert call(plain[1], *words)[2].count("2 of 3 texts spell control tokens") == 1
    assert "control tokens" not in call(plain[1], "--text", "b")[2]


def test_long_texts_are_cut_and_said(plain, call):
    _, folder = plain
    code, _, err = call(folder, "--text", "y" * 40)
    assert code == 0 and "1 of 1 texts are longer than 32 tokens" in err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "--text, --input: got None"),
        (["--text", ""], "text 1 of 1: got ''"),
        (["--input", "-"], "--input: got '-'; expected a text in line 1"),
        (["--input", "/no/such"], "--input /no/such: cannot be read"),
        (
            ["--text", "a", "--out", "v.txt"],
            "expected a file name that ends in .safetensors or .npy",
        ),
        (
            ["--text", "a", "--out", "/no/such/v.npy"],
            "expected a file in an existing folder",
        ),
        (["--text", "a", "--pooling", "max"], "--pooling: got 'max'; expected"),
    ],
)
def test_wrong_requests_are_one_sentence(plain, call, flags, said):
    code, out, err = call(plain[1], *flags)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


def test_an_empty_line_a_binary_file_and_another_pooling_are_refused(classifier, call, tmp_path):
    _, folder = classifier
    (tmp_path / "gap.txt").write_text("a\n\nb\n")
    (tmp_path / "odd.txt").write_bytes(b"\xff\xfe")
    assert "line 2" in call(folder, "--input", tmp_path / "gap.txt")[2]
    assert "expected UTF-8" in call(folder, "--input", tmp_path / "odd.txt")[2]
    code, _, err = call(folder, "--text", "a", "--pooling", "mean")
    assert (
        code == 2 and "pooling: got 'mean'; expected last, the pooling of the model's head" in err
    )
    assert call(tmp_path / "none", "--text", "a")[0] == 2


def test_half_precision_gives_float32_vectors(classifier, call, tmp_path):
    _, folder = classifier
    code, _, _ = call(folder, *words(TEXTS), "--dtype", "bfloat16", "--out", tmp_path / "v.npy")
    assert code == 0 and np.load(tmp_path / "v.npy").dtype == np.float32


def test_a_wrong_request_does_not_wait_for_torch():
    code = "import transom.cli.embed, sys; print('torch' in sys.modules)"
    assert run_python(code).strip() == "False"


def test_a_vector_that_is_not_finite_is_failed_work(plain, call, tmp_path):
    folder = tmp_path / "broken"
    write_model(folder)
    state = load_file(folder / "model.safetensors")
    state["tok_embeddings.weight"][ord("b")] = float("inf")
    save_file(state, folder / "model.safetensors")
    code, out, err = call(folder, "--text", "a", "--text", "b", "--json")
    assert (code, out) == (1, "")
    assert "text 2 of 2" in err and "float32" in err
