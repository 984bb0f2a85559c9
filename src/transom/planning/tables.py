"""Tables and numbers as the verbs print them: `8.03 B`, `14.96 GiB`. No torch; rich is imported
when something is printed.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

PIPE_WIDTH = 400  # characters: a pipe has no width, and its reader wants no cell cut


def heading(text: str) -> None:
    """Print an empty line and `text` in bold."""
    from rich.text import Text

    show(Text(f"\n{text}", style="bold"))


def show(part: RenderableType) -> None:
    """Print a table or a text without trailing spaces."""
    out = _console()
    with out.capture() as captured:
        out.print(part)
    for line in captured.get().splitlines():
        print(line.rstrip())


def _console() -> Console:
    """Return the terminal at its own width, or a wide pipe without colour."""
    from rich.console import Console

    terminal = sys.stdout.isatty()
    width = None if terminal else PIPE_WIDTH
    return Console(width=width, force_terminal=terminal, markup=False, emoji=False, highlight=False)


def fits_terminal(part: Table) -> bool:
    """Return whether a table can be printed without wrapping a cell."""
    from rich.measure import Measurement

    out = _console()
    natural = Measurement.get(out, out.options.update(width=PIPE_WIDTH), part).maximum
    return natural <= out.width


def table(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Return a table. Columns titled `words` are aligned left, those titled `numbers` follow
    and are aligned right.
    """
    from rich import box
    from rich.table import Table

    out = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in (*words, *numbers):
        out.add_column(title, justify="left" if title in words else "right")
    for row in rows:
        out.add_row(*row)
    return out


def pairs(lines: Iterable[tuple[str, str]]) -> Table:
    """Return two columns without a frame: names and their values."""
    from rich.table import Table

    out = Table.grid(padding=(0, 2))
    for line in lines:
        out.add_row(*line)
    return out


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as `1 row` or `2,000 rows`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def counted_words(count: int, words: str) -> str:
    """Return a count with words in which its noun is the first plural, such as `1 row cut` for
    `rows cut`.
    """
    noun, rest = re.split(r"s\b", words, maxsplit=1)
    return counted(count, noun) + rest


def visible(text: str) -> str:
    """Return `text` in quotes, with spaces and line ends visible, in characters that standard
    output can write.
    """
    encoding = sys.stdout.encoding or "utf-8"
    return repr(text).encode(encoding, "backslashreplace").decode(encoding)


def _scaled(value: float, units: Sequence[str], base: float) -> str:
    step = 0
    while float(f"{value:.4g}") >= base and step < len(units) - 1:
        value /= base
        step += 1
    return f"{value:.4g}{units[step]}"


def amount(value: int) -> str:
    """Return a count with four digits: `8.03 B` is 8,030,000,000. It is exact below ten
    thousand.
    """
    return f"{value:,}" if value < 10_000 else _scaled(value, ("", " K", " M", " B", " T"), 1000.0)


def byte_words(count: int) -> str:
    """Return a number of bytes in powers of 1024."""
    return _scaled(count, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"), 1024.0)


def flop_words(count: float) -> str:
    """Return a number of floating point operations in powers of 1000."""
    return _scaled(count, (" FLOP", " kFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP"), 1000.0)
