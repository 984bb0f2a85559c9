"""The part of the report on mixtures of experts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from transom.training.report.charts import (
    SERIES,
    Card,
    Floats,
    Line,
    Row,
    chart,
    column,
    render,
    short,
    smoothed,
)

HEAT_COLUMNS, HEAT_MAP, HEAT_LIMIT = 200, matplotlib.colormaps["RdBu_r"], 2.0
# The metrics of a layer in its table, by their heads.
STATE = {"entropy": "router_entropy", "dropped tokens": "dropped_tokens"}
DEAD_STEPS = 100  # an expert that nobody chose in as many logged steps is called dead


def expert_panel(training: Sequence[Row], tokens: Sequence[Row]) -> str:
    """Return heat maps, curves and tables of experts as HTML; nothing for a dense model.

    Args:
        training: Rows of training steps.
        tokens: Rows with the most frequent tokens of each expert.
    """
    rows = [row for row in training if row.get("expert_load")]
    if not rows:
        return ""
    load_LSE = np.array([row["expert_load"] for row in rows], dtype=np.float64).swapaxes(0, 1)
    steps = column(rows, "step")
    maps = [_heat_map(layer, steps, load_SE) for layer, load_SE in enumerate(load_LSE)]
    window = min(len(rows), DEAD_STEPS)
    return render(
        "experts.html",
        colours=",".join(matplotlib.colors.to_hex(HEAT_MAP(part)) for part in np.linspace(0, 1, 9)),
        limit=f"{HEAT_LIMIT:g}",
        charge=short(column(rows, "aux_loss")[-1]),
        cards=[*maps, *_curves(rows, load_LSE)],
        step=rows[-1]["step"],
        heads=("layer", "dead, last step", f"dead, last {window} steps", *STATE),
        lines=_lines(rows, load_LSE),
        tokens=tokens[-1] if tokens else None,
    )


def _heat_map(layer: int, steps: Floats, load_SE: Floats) -> Card:
    """Return the load of one layer: experts from top to bottom, steps from left to right."""
    share_SE = load_SE * load_SE.shape[-1]
    shown = np.linspace(steps[0], steps[-1], min(len(steps), HEAT_COLUMNS))
    image = [
        np.interp(shown, steps, smoothed(share_S, len(steps) // HEAT_COLUMNS))
        for share_S in share_SE.T
    ]
    extent = (steps[0] - 0.5, steps[-1] + 0.5, len(image) - 0.5, -0.5)
    figure = Figure(figsize=(5.4, 1.9))
    axes = figure.add_subplot()
    axes.imshow(
        image, HEAT_MAP, aspect="auto", interpolation="none", vmin=0, vmax=HEAT_LIMIT, extent=extent
    )
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    caption = f"last step: busiest expert {share_SE[-1].max():.2f}, idlest {share_SE[-1].min():.2f}"
    return Card.of(f"MoE layer {layer + 1}", caption, figure)


def _per_layer(rows: Sequence[Row], key: str, layers: int) -> Floats:
    """Return a metric with one entry per layer [steps, layers]; NaN in rows without one."""
    return np.stack([column(rows, key, layer) for layer in range(layers)], axis=1)


def _curves(rows: Sequence[Row], load_LSE: Floats) -> list[Card]:
    steps, (layers, _, experts) = column(rows, "step"), load_LSE.shape
    entropy_SL, dropped_SL = (_per_layer(rows, key, layers) for key in STATE.values())
    lines = [Line(steps, entropy_SL.mean(1), label="mean of layers")]
    if layers > 1:
        lines.append(Line(steps, entropy_SL.min(1), SERIES[1], "surest layer", 1.1))
    caption = f"nats per token; ln {experts} = {np.log(experts):.2f} is undecided"
    charts = chart("Router entropy", caption, lines, np.array([]))
    if np.nanmax(dropped_SL, initial=0.0) > 0:
        dropped = [Line(steps, 100 * dropped_SL.mean(1))]
        caption = "% of tokens that lost an expert to its capacity, mean of layers"
        charts += chart("Dropped tokens", caption, dropped, np.array([]))
    return charts


def _lines(rows: Sequence[Row], load_LSE: Floats) -> list[tuple[str, ...]]:
    """Return a line of the table for each layer: dead experts, entropy and dropped tokens."""
    layers, _, experts = load_LSE.shape
    unused_LSE = load_LSE[:, -DEAD_STEPS:] == 0
    dead_L2 = np.stack((unused_LSE[:, -1].sum(1), unused_LSE.all(1).sum(1)), axis=1)
    state_2L = np.stack([_per_layer(rows[-1:], key, layers)[0] for key in STATE.values()])

    def line(name: str, of: int, dead_2: NDArray[Any], state_2: Floats) -> tuple[str, ...]:
        dead = (f"{count} of {of}" for count in dead_2)
        return (name, *dead, f"{state_2[0]:.3f}", f"{state_2[1]:.2%}")

    per_layer = (
        line(f"MoE layer {layer + 1}", experts, dead_L2[layer], state_2L[:, layer])
        for layer in range(layers)
    )
    return [*per_layer, line("all layers", layers * experts, dead_L2.sum(0), state_2L.mean(1))]
