"""The table of bugs in docs/verify.md: `python -m tests.mutations.table` writes it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.mutations.bugs import BUGS, Bug

PAGE = Path(__file__).parents[2] / "docs" / "verify.md"
BEGIN, END = "<!-- bugs -->", "<!-- /bugs -->"


def markdown(bugs: Sequence[Bug] = BUGS) -> str:
    """Return one row for each bug, in the order of the registry."""
    rows = [("bug", "what goes wrong", "check that fails"), ("---",) * 3]
    rows += [(bug.name, bug.what, f"`verify {bug.check}`") for bug in bugs]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def updated(text: str) -> str:
    """Return the text of the page with the table between its two marks replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"the page has no {BEGIN} and {END}"
    return f"{before}{BEGIN}\n{markdown()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
