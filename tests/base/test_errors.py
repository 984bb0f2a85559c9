"""Notices: a text once per process, replies every time. Errors of libraries as one sentence."""

import pytest

from transom.base.errors import RequestError, WorkError, explained, notice, reset_notices


def test_a_notice_is_printed_once_until_notices_are_reset(capsys):
    notice("one")
    notice("one")
    notice("two")
    assert capsys.readouterr().err == "transom: one\ntransom: two\n"
    reset_notices()
    notice("one")
    assert capsys.readouterr().err == "transom: one\n"


def test_replies_are_printed_every_time(capsys):
    notice("saved", again=True)
    notice("saved", again=True)
    assert capsys.readouterr().err == "transom: saved\n" * 2


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("first\nline"), "x: not JSON (first line)"),
        (FileNotFoundError(2, "No such file", "x"), "x: not JSON (No such file)"),
    ],
)
def test_an_error_of_a_library_is_explained_in_one_line(error, words):
    with pytest.raises(WorkError) as raised, explained("x: not JSON", Exception, by=WorkError):
        raise error
    assert str(raised.value) == words


@pytest.mark.parametrize(
    "error", [RequestError("own"), WorkError("own"), MemoryError(), KeyError()]
)
def test_other_errors_pass_as_they_are(error):
    kind = ValueError if isinstance(error, KeyError) else Exception
    with pytest.raises(type(error)) as raised, explained("x: not JSON", kind):
        raise error
    assert raised.value is error
