"""The part of the report on mixtures of experts. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transom.training.report.charts import (
    SERIES,
    Floats,
    Line,
    Row,
    card,
    chart,
    column,
    short,
    smoothed,
    table,
)

HEAT_COLUMNS, HEAT_MAP, HEAT_LIMIT = 200, matplotlib.colormaps["RdBu_r"], 2.0
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
    cards = "".join(_heat_map(layer, steps, load_SE) for layer, load_SE in enumerate(load_LSE))
    stops = ",".join(matplotlib.colors.to_hex(HEAT_MAP(part)) for part in np.linspace(0, 1, 9))
    scale = f'<i style="width:120px;height:10px;background:linear-gradient(90deg,{stops})"></i>'
    key = (
        f"Share of the tokens times experts (the rows): 0 {scale}{HEAT_LIMIT:g} or more; 1 is a "
        f"fair share."
    )
    charge = f"Balancing loss at the last step: {short(column(rows, 'aux_loss')[-1])}."
    return (
        f'<h2>Expert load</h2><p>{key} {charge}</p><div class="grid">{cards}'
        f"{_curves(rows, load_LSE)}</div>"
        f"{_table(rows, load_LSE)}{_tokens(tokens)}"
    )


def _heat_map(layer: int, steps: Floats, load_SE: Floats) -> str:
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
    return card(f"MoE layer {layer + 1}", caption, figure)


def _per_layer(rows: Sequence[Row], key: str, layers: int) -> Floats:
    """Return a metric with one entry per layer [steps, layers]; NaN in rows without one."""
    lists: list[list[object]] = []
    for row in rows:
        value = row.get(key)
        lists.append(value if isinstance(value, list) and len(value) == layers else [None] * layers)
    return np.stack([column([{"x": each} for each in one], "x") for one in lists])


def _curves(rows: Sequence[Row], load_LSE: Floats) -> str:
    steps, (layers, _, experts) = column(rows, "step"), load_LSE.shape
    entropy_SL, dropped_SL = (
        _per_layer(rows, key, layers) for key in ("router_entropy", "dropped_tokens")
    )
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


def _table(rows: Sequence[Row], load_LSE: Floats) -> str:
    """Return a table with one line per layer: dead experts, entropy and dropped tokens."""
    layers, count, experts = load_LSE.shape
    window = min(count, DEAD_STEPS)
    numbers_LC = np.stack(
        (
            (load_LSE[:, -1] == 0).sum(1),
            (load_LSE[:, -window:] == 0).all(1).sum(1),
            _per_layer(rows[-1:], "router_entropy", layers)[0],
            _per_layer(rows[-1:], "dropped_tokens", layers)[0],
        ),
        axis=1,
    )
    total_C = np.concatenate((numbers_LC[:, :2].sum(0), numbers_LC[:, 2:].mean(0)))
    names = [*(f"MoE layer {layer + 1}" for layer in range(layers)), "all layers"]
    counts = [experts] * layers + [layers * experts]
    lines = [
        (name, f"{dead:.0f} of {of}", f"{long:.0f} of {of}", f"{entropy:.3f}", f"{dropped:.2%}")
        for name, of, (dead, long, entropy, dropped) in zip(
            names, counts, (*numbers_LC, total_C), strict=True
        )
    ]
    heads = ("layer", "dead, last step", f"dead, last {window} steps", "entropy", "dropped tokens")
    return f"<h3>Experts, step {rows[-1]['step']:,}</h3>{table(heads, lines)}"


def _tokens(rows: Sequence[Row]) -> str:
    """Return the most frequent tokens of each expert when they were last counted."""
    if not rows:
        return ""
    blocks = []
    for layer, experts in enumerate(rows[-1]["expert_tokens"]):
        lines = []
        for expert, most in enumerate(experts):
            words = ", ".join(f"{text!r} {share:.1%}" for text, share in most)
            lines.append(escape(f"expert {expert}: {words or 'was sent no token'}", quote=False))
        text = "\n".join(lines)
        blocks.append(
            f"<details><summary>MoE layer {layer + 1}</summary><pre>{text}</pre></details>"
        )
    title = f"<h3>Most frequent tokens of each expert, step {rows[-1]['step']:,}</h3>"
    return f'{title}<div class="card">{"".join(blocks)}</div>'
