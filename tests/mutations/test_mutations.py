"""Every planted bug makes its check fail, leaves nothing behind, and is listed in the docs."""

from __future__ import annotations

from contextlib import nullcontext

import pytest

from tests.mutations import table
from tests.mutations.bugs import BUGS, Bug, first_failure
from transom.base.runtime import one_thread
from transom.verify.checks import CHECKS, run


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


# One bug of each check shows that the check can fail; planting all of them takes half a minute.
FIRST = {bug.check: bug for bug in reversed(BUGS)}
PLANTED = [
    pytest.param(bug, marks=() if FIRST[bug.check] is bug else pytest.mark.slow) for bug in BUGS
]


@pytest.mark.slow  # tests/verify runs the parts of each check
@pytest.mark.parametrize("name", CHECKS)
def test_checks_pass_without_a_bug(name):
    assert [finding for finding in run(name) if not finding.ok] == []


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_a_planted_bug_makes_its_check_fail(bug):
    failure = first_failure(bug)
    assert failure is not None, "the check passed"
    assert failure.error > 10 * failure.tolerance, "rounding could cross so small a margin"
    first = next(iter(run(bug.check)))
    assert first.ok or bug.check == "resume", "the bug is still there after its context"


def test_a_bug_that_no_check_sees_is_reported():
    assert first_failure(Bug("harmless", "data", nullcontext)) is None


def test_names_are_unique_and_every_check_has_a_bug():
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {bug.check for bug in BUGS} == set(CHECKS)


def test_the_table_in_the_docs_is_up_to_date():
    page = table.PAGE.read_text(encoding="utf-8")
    assert table.updated(page) == page, "run python -m tests.mutations.table"
