"""What tests of the verbs share."""

from __future__ import annotations

import io

import pytest

from transom.cli.main import main


@pytest.fixture
def call(capsys, monkeypatch):
    """Run a verb in this process; (exit code, standard output, standard error)."""

    def call(*words, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
