"""Does a check turn red when something is wrong? Every known bug is planted once, and its check
must say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from transom.base.errors import WorkError, require
from transom.verify.bugs import BUGS, Bug
from transom.verify.check import Finding
from transom.verify.checks import CHECKS

HEADER = ("planted bug", "what goes wrong", "check that turns red")


@dataclass(frozen=True)
class Caught:
    """A planted bug and the first finding that gave it away; None: its check stayed green."""

    bug: Bug
    by: Finding | None


def baseline(names: Iterable[str]) -> None:
    """Every check is green on the code as it is: a red one would catch any bug at all."""
    for name in names:
        for finding in CHECKS[name].run():
            if not finding.ok:
                raise WorkError(
                    f"verify {name} is red with no bug planted: {finding.comparison}, "
                    f"{finding.where}: {finding.error:.2g} {finding.detail}"
                )


def plant_all(bugs: Sequence[Bug]) -> Iterator[Caught]:
    """Each bug planted alone, its check run until the first red finding."""
    for bug in bugs:
        with bug.plant():
            by = next((finding for finding in CHECKS[bug.check].run() if not finding.ok), None)
        yield Caught(bug, by)


def table_rows(bugs: Sequence[Bug] = BUGS) -> list[tuple[str, str, str]]:
    """The table of the documentation, in the order of the registry."""
    return [(bug.name, bug.what, f"verify {bug.check}") for bug in bugs]


def write_table(page: Path) -> None:
    """Bring the table on a page of the documentation, from its header to the next empty line, up to
    date.
    """
    text = page.read_text(encoding="utf-8")
    before, header, rest = text.partition(f"| {' | '.join(HEADER)} |\n")
    require(
        bool(header),
        str(page),
        "no table",
        "expected a page with the header of the planted bugs",
    )
    page.write_text(
        before + markdown_table() + "\n\n" + rest.partition("\n\n")[2], encoding="utf-8"
    )


def markdown_table(bugs: Sequence[Bug] = BUGS) -> str:
    """`table_rows` as Markdown, for docs/verify.md."""
    rows = [
        HEADER,
        ("---",) * len(HEADER),
        *((name, what, f"`{check}`") for name, what, check in table_rows(bugs)),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
