"""Count the code lines of every room of `src/transom`: python tools/code_lines.py [--files].

A code line is one statement, or one header of a compound statement, for every started `WIDTH`
columns that it would take on one line. Blank lines, comments, docstrings and imports do not count.
Neither the line length of the formatter nor a line broken by hand changes the count. With this
width, the revision that the ceilings of `tests/test_structure.py` were chosen for counts as many
code lines as it had lines of source (21,700).
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

WIDTH = 91
PACKAGE = Path(__file__).parents[1] / "src" / "transom"
_SKIPPED = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def _uncounted(tree: ast.Module) -> set[int]:
    """Return the first line of every import and docstring."""
    lines = {n.lineno for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            lines.add(node.body[0].lineno)
    return lines


def code_lines(text: str) -> int:
    """Return the number of code lines of one Python source text."""
    uncounted = _uncounted(ast.parse(text))
    total, line = 0, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _SKIPPED:
            continue
        if token.type != tokenize.NEWLINE:
            line.append(token)
            continue
        if line and line[0].start[0] not in uncounted:
            # Half a column per token stands for the spaces between tokens.
            columns = line[0].start[1] + sum(len(one.string) for one in line) + len(line) // 2
            inside = sum(one.string.count("\n") for one in line)
            total += max(1, -(-columns // WIDTH)) + inside
        line = []
    return total


def rooms() -> dict[str, int]:
    """Return the code lines per room; files beside the rooms count as one room called `.`."""
    count: Counter[str] = Counter()
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        count[parts[0] if len(parts) > 1 else "."] += code_lines(path.read_text(encoding="utf-8"))
    return dict(sorted(count.items()))


if __name__ == "__main__":
    if "--files" in sys.argv:
        for path in sorted(PACKAGE.rglob("*.py")):
            lines = code_lines(path.read_text(encoding="utf-8"))
            print(f"{lines:6,} {path.relative_to(PACKAGE)}")
    for room, lines in rooms().items():
        print(f"{lines:6,} {room}")
    print(f"{sum(rooms().values()):6,} in all")
