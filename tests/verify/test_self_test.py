"""Every planted bug turns its check red, leaves nothing behind, and stands in the docs."""

from __future__ import annotations

from pathlib import Path

import pytest

from transom.base.errors import RequestError, WorkError
from transom.base.runtime import one_thread
from transom.verify import planting, plants_runs
from transom.verify.bugs import BUGS, Bug
from transom.verify.checks import CHECKS
from transom.verify.self_test import baseline, markdown_table, plant_all, write_table

DOCS = Path(__file__).parents[2] / "docs" / "verify.md"


@pytest.fixture(autouse=True, scope="module")
def single_threaded():
    with one_thread():
        yield


# The first bug of each check shows that the check can turn red; to plant all of them takes half a
# minute.
FIRST = {bug.check: bug for bug in reversed(BUGS)}
PLANTED = [
    pytest.param(bug, marks=() if FIRST[bug.check] is bug else pytest.mark.slow) for bug in BUGS
]


@pytest.mark.slow  # the other files of this folder run the parts of each check
@pytest.mark.parametrize("name", CHECKS)
def test_checks_are_green_with_nothing_planted(name):
    baseline([name])


@pytest.mark.parametrize("bug", PLANTED, ids=lambda bug: bug.name)
def test_planted_bug_turns_its_check_red(bug):
    (caught,) = plant_all([bug])
    assert caught.by is not None, "the check stayed green"
    assert caught.by.error > 10 * caught.by.tolerance, (
        "a margin that rounding can cross is no margin"
    )
    assert next(iter(CHECKS[bug.check].run())).ok or bug.check == "resume", (
        "the bug has outlived its context"
    )


def test_a_bug_that_nothing_sees_is_reported():
    harmless = Bug("harmless", "data", lambda: planting.lost(Bug, "__repr__"))
    (caught,) = plant_all([harmless])
    assert caught.by is None


def test_a_red_baseline_is_an_error():
    with (
        plants_runs.masked_eos(),
        pytest.raises(WorkError, match="verify data is red with no bug planted: EOS"),
    ):
        baseline(["data"])


def test_names_are_unique_and_checks_exist():
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert {bug.check for bug in BUGS} == set(CHECKS), "every check has a bug that it must see"


def test_the_table_in_the_docs_is_that_of_the_registry(tmp_path):
    (tmp_path / "page.md").write_text(DOCS.read_text(encoding="utf-8"), encoding="utf-8")
    write_table(tmp_path / "page.md")
    assert DOCS.read_text(encoding="utf-8") == (tmp_path / "page.md").read_text(encoding="utf-8"), (
        "update it with transom.verify.self_test.write_table(Path('docs/verify.md'))"
    )


def test_the_table_is_replaced_where_it_stands(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# A\n\n{markdown_table(BUGS[:2])}\n\nbehind\n", encoding="utf-8")
    write_table(page)
    assert page.read_text(encoding="utf-8") == f"# A\n\n{markdown_table()}\n\nbehind\n"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(RequestError, match="no table"):
        write_table(page)
