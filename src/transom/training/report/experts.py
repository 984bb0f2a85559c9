"""The report's part on mixtures of experts: who does the work, how sure the routers are, what is
lost. No torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from transom.training.report.report import (
    MISSING,
    SERIES,
    Floats,
    Line,
    Row,
    _card,
    _chart,
    _column,
    _short,
    smoothed,
)

HEAT_COLUMNS, HEAT_MAP, HEAT_LIMIT = 200, matplotlib.colormaps["RdBu_r"], 2.0
DEAD_STEPS = 100  # an expert that nobody chose in as many logged steps is called dead


def expert_panel(training: Sequence[Row], tokens: Sequence[Row]) -> str:
    """Heat maps, entropy, dropped tokens, a table of layers, and each expert's tokens; nothing for
    dense runs.
    """
    rows = [row for row in training if row.get("expert_load")]
    if not rows:
        return ""
    load_LSE = np.array([row["expert_load"] for row in rows], dtype=np.float64).swapaxes(0, 1)
    steps = _column(rows, "step")
    cards = "".join(_heat_map(layer, steps, load_SE) for layer, load_SE in enumerate(load_LSE))
    stops = ",".join(matplotlib.colors.to_hex(HEAT_MAP(part)) for part in np.linspace(0, 1, 9))
    scale = f'<i style="width:120px;height:10px;background:linear-gradient(90deg,{stops})"></i>'
    key = (
        f"Share of the tokens times experts (the rows): 0 {scale}{HEAT_LIMIT:g} or more; 1 is a "
        f"fair share."
    )
    charge = f"Balancing loss at the last step: {_short(_column(rows, 'aux_loss')[-1])}."
    return (
        f"<h2>Expert load</h2><p>{key} {charge}</p><div "
        f'class="grid">{cards}{_curves(rows, load_LSE)}</div>'
        f"{_table(rows, load_LSE)}{_tokens(tokens)}"
    )


def _heat_map(layer: int, steps: Floats, load_SE: Floats) -> str:
    """Experts from top to bottom, steps from left to right."""
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
    return _card(f"MoE layer {layer + 1}", caption, figure)


def _per_layer(rows: Sequence[Row], key: str, layers: int) -> Floats:
    """The numbers of a list with one entry per layer [steps, layers]; NaN in rows without such a
    list.
    """
    lists: list[list[object]] = []
    for row in rows:
        value = row.get(key)
        lists.append(value if isinstance(value, list) and len(value) == layers else [None] * layers)
    return np.stack([_column([{"x": each} for each in one], "x") for one in lists])


def _curves(rows: Sequence[Row], load_LSE: Floats) -> str:
    steps, (layers, _, experts) = _column(rows, "step"), load_LSE.shape
    entropy_SL, dropped_SL = (
        _per_layer(rows, key, layers) for key in ("router_entropy", "dropped_tokens")
    )
    lines = [Line(steps, entropy_SL.mean(1), label="mean of layers")]
    if layers > 1:
        lines.append(Line(steps, entropy_SL.min(1), SERIES[1], "surest layer", 1.1))
    caption = f"nats per token; ln {experts} = {np.log(experts):.2f} is undecided"
    charts = _chart("Router entropy", caption, lines, np.array([]))
    if np.nanmax(dropped_SL, initial=0.0) > 0:
        dropped = [Line(steps, 100 * dropped_SL.mean(1))]
        caption = "% of tokens that lost an expert to its capacity, mean of layers"
        charts += _chart("Dropped tokens", caption, dropped, np.array([]))
    return charts


def _table(rows: Sequence[Row], load_LSE: Floats) -> str:
    """One line per layer, the last one for all: dead experts now and over the last steps, dropped
    tokens.
    """
    layers, count, experts = load_LSE.shape
    window = min(count, DEAD_STEPS)
    dead_L = (load_LSE[:, -1] == 0).sum(1)
    long_dead_L = (load_LSE[:, -window:] == 0).all(1).sum(1)
    entropy_L, dropped_L = (
        _per_layer(rows[-1:], key, layers)[0] for key in ("router_entropy", "dropped_tokens")
    )
    heads = ("layer", "dead, last step", f"dead, last {window} steps", "entropy", "dropped tokens")
    body = "".join(f"<th>{head}</th>" for head in heads)
    lines = [
        (
            f"MoE layer {layer + 1}",
            dead_L[layer],
            long_dead_L[layer],
            entropy_L[layer],
            dropped_L[layer],
            experts,
        )
        for layer in range(layers)
    ]
    mean = (entropy_L.mean(), dropped_L.mean())
    lines.append(("all layers", dead_L.sum(), long_dead_L.sum(), *mean, layers * experts))
    for name, dead, long_dead, entropy, dropped, of in lines:
        cells = (f"{dead} of {of}", f"{long_dead} of {of}", f"{entropy:.3f}", f"{dropped:.2%}")
        body_cells = "".join(
            f"<td>{MISSING if 'nan' in cell else cell}</td>" for cell in (name, *cells)
        )
        body += f"</tr><tr>{body_cells}"
    return (
        f"<h3>Experts, step {rows[-1]['step']:,}</h3><div "
        f'class="card"><table><tr>{body}</tr></table></div>'
    )


def _tokens(rows: Sequence[Row]) -> str:
    """The most frequent tokens of each expert when they were last collected, in the order of their
    share.
    """
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
