"""`transom verify` from the outside: what it takes, what it prints, and its exit codes."""

import json

import pytest
import yaml

from tests.helpers import random_model, tiny_args
from tests.mutations import model_bugs, run_bugs
from transom.checkpoints.save import save
from transom.cli.main import main
from transom.config.model_args import ModelArgs
from transom.verify.targets import model_args

MODEL = {"dim": 64, "n_layers": 2, "n_heads": 2, "layer_pattern": "SF", "sliding_window": 512}


def written(folder, kind):
    """The same model as a YAML file, a JSON file, a run's config, a config.json and a folder."""
    if kind == "folder":
        save(random_model(tiny_args(layer_pattern="SF", sliding_window=7)), folder / "model")
        return folder / "model"
    if kind == "run":
        path, data = folder / "run.yaml", {"steps": 7, "model": MODEL}
    elif kind == "config.json":
        path, data = folder / "config.json", {"model_type": "transom", **MODEL}
    else:
        path, data = folder / f"model.{kind}", MODEL
    path.write_text(yaml.safe_dump(data) if path.suffix == ".yaml" else json.dumps(data))
    return path


@pytest.mark.parametrize("kind", ["yaml", "json", "run", "config.json"])
def test_a_model_is_taken_from_wherever_it_is_written(tmp_path, kind):
    assert model_args(str(written(tmp_path, kind))) == ModelArgs.from_dict(MODEL)


def test_all_comparisons_of_a_folder_are_in_one_document(tmp_path, capsys):
    assert main(["verify", "cache", str(written(tmp_path, "folder")), "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["ok"]
    names = {row["comparison"] for row in told["comparisons"]}
    assert {"after a rollback", "packed documents", "chunked prefill"} <= names
    assert all(row["worst"]["error"] <= row["worst"]["tolerance"] for row in told["comparisons"])


def test_a_folder_is_verified_with_its_own_weights(tmp_path, capsys):
    folder = written(tmp_path, "folder")
    words = ["--full", "--length", "48", "--dtype", "float64", "--json"]
    assert main(["verify", "cache", str(folder), *words]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {row["worst"]["tolerance"] for row in told["comparisons"]} == {1e-9}


@pytest.mark.parametrize("what", ["model", "resume"])
def test_other_checks_take_a_preset(capsys, what):
    assert main(["verify", what, "demo"]) == 0
    assert "comparisons passed" in capsys.readouterr().out


def test_resume_takes_a_runs_config_and_steps(tmp_path, capsys):
    assert main(["verify", "resume", str(written(tmp_path, "run")), "--steps", "4"]) == 0
    assert "1 + 1 + 2 steps" in capsys.readouterr().out


def test_a_mismatch_is_shown_where_it_begins_and_is_exit_code_1(capsys):
    with run_bugs.overwriting_prefill():
        assert main(["verify", "cache", "mistral-7b-v0.1"]) == 1
    out = capsys.readouterr().out
    assert "FAILED: " in out
    assert "first at position" in out
    assert ", layer 0" in out
    with model_bugs.weightless_norm():
        assert main(["verify", "model", "demo", "--json"]) == 1
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["comparisons"][0]["first_failure"]["detail"].startswith("first at position")


def test_what_the_oracle_lacks_is_a_refusal(tmp_path, capsys):
    (tmp_path / "wide.yaml").write_text(yaml.safe_dump({"mup_base_dim": 64}))
    assert main(["verify", "model", str(tmp_path / "wide.yaml")]) == 2
    assert "mup_base_dim: the oracle has no formula" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "verify: got None"),
        (["cash"], "verify: got 'cash'"),
        (["data", "demo"], "model: got 'demo'"),
        (["cache", "--full"], "--full: got True"),
        (["cache", "demo", "--full"], "--full: got 'demo'"),
        (["model", "demo", "--full"], "--full: got True"),
        (
            ["cache", "demo", "--length", "9"],
            "--length: got 9; valid only with `verify cache MODEL",
        ),
        (["cache", "--steps", "4"], "--steps"),
        (["resume", "demo", "--steps", "2"], "--steps: got 2"),
        (["cache", "no-such-model"], "model: got 'no-such-model'"),
        (["cache", "--tokens", "100"], "--tokens: got 100"),
        (["cache", "demo", "--tokens", "20000"], "model: got 'demo'"),
    ],
)
def test_a_wrong_request_is_one_sentence(capsys, words, said):
    assert main(["verify", *words]) == 2
    told = capsys.readouterr().err
    assert said in told
    assert told.count("\n") == 1


def test_files_that_are_no_model_are_refused(tmp_path, capsys):
    for text, said in (("- 1", "mapping"), ("dim: [", "YAML"), ("dims: 4", "dim")):
        (tmp_path / "model.yaml").write_text(text)
        assert main(["verify", "cache", str(tmp_path / "model.yaml")]) == 2
        assert said in capsys.readouterr().err


def test_the_matrix_is_shown_where_it_cannot_be_saved(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr("transom.verify.attention.compare_backends", lambda devices: iter(()))
    assert main(["verify", "attention"]) == 0
    captured = capsys.readouterr()
    assert "0 comparisons" in captured.out
    assert "attention.json: cannot be written" in captured.err
