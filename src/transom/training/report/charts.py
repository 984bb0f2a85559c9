"""Charts of the report: numbers over training steps, drawn by matplotlib as SVG. No torch."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Row = Mapping[str, Any]

# Charts are drawn in these colours, which become variables of the page for its light and dark mode.
MUTED, GRID = "#606162", "#d0d1d2"
SERIES = ("#2563c9", "#b34d05", "#0f7b5f", "#8a3ab9", "#b4234c", "#6b6f1d")
VARIABLES = {MUTED: "muted", GRID: "line"} | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
MISSING = "\N{EM DASH}"
FEW_STEPS = 80  # below, single steps are drawn without a smoothed curve


@dataclass(frozen=True)
class Line:
    """One curve of a chart, which the legend lists if it has a label."""

    steps: Floats
    values: Floats
    colour: str = SERIES[0]
    label: str = ""
    width: float = 1.7
    alpha: float = 1.0


def smoothed(values: ArrayLike, width: int) -> Floats:
    """Return the mean over a centred window of about `width` values, shorter at the ends.

    Values that are not finite are left out; the result is NaN where a window has no other ones.
    """
    array = np.asarray(values, dtype=np.float64)
    finite, half = np.isfinite(array), min(width, len(array)) // 2
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, array, 0.0), window)[half : half + len(array)]
    count = np.convolve(finite.astype(np.float64), window)[half : half + len(array)]
    return np.divide(total, count, out=np.full(len(array), np.nan), where=count > 0.5)


def column(rows: Sequence[Row], *keys: str | int) -> Floats:
    """Return the number under a path of keys in each row; NaN without one, or a finite one."""
    numbers = np.full(len(rows), np.nan)
    for index, row in enumerate(rows):
        value: Any = row
        with contextlib.suppress(TypeError, LookupError):  # a row may have other data there
            for key in keys:
                value = value[key]
            if isinstance(value, int | float) and np.isfinite(value):
                numbers[index] = value
    return numbers


def short(value: float, _position: object = None) -> str:
    """Return a number with four significant digits, such as `1.3M`, `8.1k` or `0.02`."""
    if not np.isfinite(value):
        return MISSING
    power = min(int(np.log10(abs(value))) // 3, 4) if abs(value) >= 1000 else 0
    return f"{value / 1000**power:.4g}{('', 'k', 'M', 'B', 'T')[power]}"


def noisy(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[Line]:
    """Return the curve of a metric; with many steps a smoothed one over faint single steps."""
    raw = Line(column(rows, "step"), column(rows, key) * scale)
    if len(rows) < FEW_STEPS:
        return [raw]
    mean = smoothed(raw.values, min(len(rows) // 40, 400))
    return [replace(raw, values=mean), replace(raw, width=0.7, alpha=0.35)]


class Card(NamedTuple):
    """A figure with its title, caption and legend, for the macro `card` of parts.html.

    Attributes:
        title: Title, which no other card of the page has.
        caption: Unit, or another explanation.
        box: The `viewBox` of the SVG element.
        drawing: Its content and its end.
        legend: The lines to list, if they have a label.
    """

    title: str
    caption: str
    box: str
    drawing: Markup
    legend: Sequence[Line] = ()

    @classmethod
    def of(cls, title: str, caption: str, figure: Figure, legend: Sequence[Line] = ()) -> Card:
        """Return a card with a figure over training steps."""
        steps = MaxNLocator(6, integer=True, min_n_ticks=1)
        figure.axes[0].xaxis.set(major_locator=steps, major_formatter=short)
        file = io.StringIO()
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", metadata=none)
        drawing = file.getvalue().partition("<svg")[2].partition(">")[2]
        # Ids of all pictures of a page have to differ.
        name = re.sub(r"\W", "-", title)
        drawing = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", drawing)
        for colour, variable in VARIABLES.items():
            drawing = drawing.replace(colour, f"var(--{variable})")
        box = "0 0 {:g} {:g}".format(*figure.get_size_inches() * 72)
        return cls(title, caption, box, Markup(drawing), legend)


def chart(
    title: str, caption: str, lines: Sequence[Line], resumed: Floats, log: bool = False
) -> list[Card]:
    """Return a card with curves over steps, or nothing if no curve has a number.

    Args:
        title: Title of the card.
        caption: Unit, or another explanation.
        lines: The curves, the most important one first.
        resumed: Steps at which the run was resumed, drawn as dashed lines.
        log: Use a logarithmic axis if values differ by a factor of 20 or more.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return []
    figure = Figure()
    axes = figure.add_subplot()
    for line in reversed(lines):
        marker = "o" if np.isfinite(line.values).sum() < 30 and line.alpha == 1 else None
        style: dict[str, Any] = {"color": line.colour, "lw": line.width, "alpha": line.alpha}
        axes.plot(line.steps, line.values, marker=marker, ms=3, **style)
    for step in resumed:
        axes.axvline(step, color=MUTED, lw=0.9, ls=(0, (3, 3)))
    positive = np.concatenate([line.values[line.values > 0] for line in lines])
    wide = log and len(positive) > 0 and positive.max() > 20 * positive.min()
    axes.set_yscale("log" if wide else "linear")
    ticks = LogLocator(subs=(1, 2, 5), numticks=6) if wide else MaxNLocator(5)
    axes.yaxis.set(major_locator=ticks, major_formatter=short, minor_formatter=NullFormatter())
    axes.grid(axis="y")
    return [Card.of(title, caption, figure, lines)]


def render(template: str, **values: Any) -> Markup:
    """Return a template of this folder as HTML, with escaped values."""
    folder = FileSystemLoader(Path(__file__).parent)
    pages = Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"short": short, "number": lambda text: MISSING if "nan" in text else text}
    return Markup(pages.get_template(template).render(variables=VARIABLES, **values))
