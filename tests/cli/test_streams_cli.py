"""Standard streams as a user's shell, service or container leaves them."""

import io
import sys

import pytest

from transom.cli import main as cli
from transom.cli.main import main


def test_characters_that_the_encoding_of_the_output_lacks_are_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(written, encoding="cp1252"))
    monkeypatch.setattr(cli, "_overview", lambda: "naïve 日本 😀")
    assert main([]) == 0
    sys.stdout.flush()
    assert written.getvalue().decode("cp1252").strip() == "naïve \\u65e5\\u672c \\U0001f600"


@pytest.mark.parametrize("verb", [["generate", "-p", "-"], ["embed", "-i", "-"]])
def test_a_closed_standard_input_is_an_empty_one(tmp_path, monkeypatch, capsys, verb):
    monkeypatch.setattr("sys.stdin", None)
    assert main([*verb, str(tmp_path)]) == 2
    assert "empty" in capsys.readouterr().err


def test_errors_do_not_go_to_standard_output_where_standard_error_is_closed(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr", None)
    assert main(["nonsense"]) == 2
    assert capsys.readouterr().out == ""
