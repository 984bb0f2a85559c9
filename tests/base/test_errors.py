"""Notices: a text once per process, replies every time."""

from transom.base.errors import notice, reset_notices


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
