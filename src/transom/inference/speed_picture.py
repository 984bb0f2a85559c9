"""A picture of measured speeds beside the limits of the machine, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from transom.inference.speed import Range, Speed


def draw_speeds(speeds: Sequence[Speed], file: Path, title: str) -> None:
    """Write a picture of decoding and prefill over the prompt length, or over the batch size.

    Bars show the lowest and the highest measurement. Dashed lines are the limits: the reads of a
    decode step at the bandwidth of the memory, and the products of a prefill at the matmul peak.

    Args:
        speeds: One result or more.
        file: The picture to write. Its suffix says the format, such as .svg or .png.
        title: The text above.
    """
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    figure.suptitle(title)
    for axes, decoding in zip(figure.subplots(1, 2), (True, False), strict=True):
        _draw(axes, speeds, decoding)
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(file)


def _draw(axes: Axes, speeds: Sequence[Speed], decoding: bool) -> None:
    by_length = len({one.prompt_length for one in speeds}) > 1
    curves: dict[int, list[tuple[int, Range, float]]] = {}
    for one in speeds:
        place, curve = (one.prompt_length, one.batch_size)[:: 1 if by_length else -1]
        rate, share = one.prefill_tokens_per_second, one.matmul_fraction
        if decoding:
            rate, share = one.decode_tokens_per_second, one.bandwidth_fraction
        curves.setdefault(curve, []).append((place, rate, rate.median / share))
    labels = ("prompt tokens", "batch size") if by_length else ("batch size", "prompt tokens")
    for number, (curve, points) in enumerate(curves.items()):
        places, rates, limits = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        middle = [one.median for one in rates]
        errors = [[rate.median - rate.low for rate in rates], [r.high - r.median for r in rates]]
        colour, name = f"C{number}", f"{labels[1]} {curve:,}"
        axes.errorbar(places, middle, errors, color=colour, marker="o", capsize=3, label=name)
        axes.plot(places, limits, "--", color=colour, marker="_", alpha=0.6)
    axes.plot([], [], "--", color="grey", label="limit")
    what = "decode tokens/s, limit: memory bandwidth", "prefill tokens/s, limit: matmul peak"
    axes.set(xlabel=labels[0], title=what[not decoding], xscale="log", yscale="log")
    ticks = sorted({place for points in curves.values() for place, *_ in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.xaxis.minorticks_off()
    axes.set_ylim(bottom=axes.get_ylim()[0] / 1.5)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(visible=True, alpha=0.25)
