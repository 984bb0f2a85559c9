"""The report of a run: one HTML page with its numbers, pictures and samples, whole without a
network. No torch.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from numpy.typing import ArrayLike, NDArray

from transom.base.errors import WorkError
from transom.base.files import read_json
from transom.base.locks import FolderLock
from transom.training.loop.progress import duration

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
Kinds = Mapping[str, Sequence[Row]]

# Pictures are drawn in these colours, which become the page's variables, so that they follow its
# light or dark.
MUTED, GRID = "#606162", "#d0d1d2"
SERIES = ("#2563c9", "#b34d05", "#0f7b5f", "#8a3ab9", "#b4234c", "#6b6f1d")
VARIABLES = {MUTED: "muted", GRID: "line"} | {colour: f"s{i}" for i, colour in enumerate(SERIES)}
DRAWING: dict[Any, Any] = {
    "font.size": 9.0,
    "path.simplify_threshold": 0.5,
    "svg.hashsalt": "transom",
}
DRAWING |= {
    "figure.figsize": (5.4, 2.3),
    "figure.constrained_layout.use": True,
    "text.parse_math": False,
}
DRAWING |= dict.fromkeys(("svg.fonttype", "figure.facecolor", "axes.facecolor"), "none")
DRAWING |= dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.spines.left"), False)
DRAWING |= dict.fromkeys(
    [f"{axis}tick.{part}.size" for axis in "xy" for part in ("major", "minor")], 0.0
)
DRAWING |= {
    "axes.edgecolor": GRID,
    "grid.color": GRID,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
}
MISSING = "\N{EM DASH}"
# What held-out scores are called that are no bits per byte: of labels, answers, pairs and rewards.
OWN_SCORES = ("head", "answers", "preference", "policy")
SCORES = {"bits_per_byte": ",.3f", "perplexity": ",.2f", "tokens": ",.0f", "bytes": ",.0f"}
STYLE = """
:root{color-scheme:light dark;--page:#f5f6f8;--card:#fff;--ink:#16191d;--muted:#59616b;--line:#dfe3e8;
--soft:#eaeff6;--s0:#2563c9;--s1:#b34d05;--s2:#0f7b5f;--s3:#8a3ab9;--s4:#b4234c;--s5:#6b6f1d}
@media(prefers-color-scheme:dark){:root{--page:#101317;--card:#191d23;--ink:#e8ebef;--muted:#a0a9b4;--line:#2f353d;
--soft:#262d38;--s0:#7db0ff;--s1:#ffa563;--s2:#4fd1a5;--s3:#d19bff;--s4:#ff8aa8;--s5:#d6d86a}}
*{box-sizing:border-box}body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1120px;margin:auto;padding:32px 20px 64px}h1{font-size:28px;margin:0}h3{font-size:15px;margin:0}
h2{font-size:18px;margin:32px 0 10px}p,small,th,dt,li{font-size:13px;margin:2px 0 8px}small{display:block;margin:0}
p,small,th,dt,summary{color:var(--muted)}header div{display:flex;flex-wrap:wrap;gap:4px 14px;align-items:center}
.pill{border:1px solid;border-radius:99px;padding:1px 11px;font-weight:600;color:var(--s1)}.done{color:var(--s2)}
dl,.grid{display:grid;gap:12px;grid-template-columns:repeat(auto-fit,minmax(146px,1fr))}dd,dt,.card p,li{margin:0}
.grid{grid-template-columns:repeat(auto-fill,minmax(min(400px,100%),1fr))}dd b{font-size:23px;line-height:1.4}
dl>div,.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 16px;margin:0}
ul{list-style:none;display:flex;flex-wrap:wrap;gap:0 14px;padding:0;margin:2px 0}ul:empty{height:20px}
i{display:inline-block;min-width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
svg{display:block;width:100%;margin-top:6px}svg text{font-family:inherit!important}.card{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}tr:last-child{font-weight:650}
th,td{padding:6px 16px 6px 0;text-align:left}td{border-top:1px solid var(--line)}th+th,td+td{text-align:right}
pre{white-space:pre-wrap;overflow-wrap:anywhere;font:13px/1.55 ui-monospace,Menlo,Consolas,monospace;margin:12px 0}
.said{border-left:3px solid var(--line);padding:2px 0 2px 14px}.said b{color:var(--s0);background:var(--soft)}
"""


@dataclass(frozen=True)
class Line:
    """One curve of a chart; without a label it has no place in the legend."""

    steps: Floats
    values: Floats
    colour: str = SERIES[0]
    label: str = ""
    width: float = 1.7
    alpha: float = 1.0


def write_report(run: Path) -> Path:
    """Write `run/report.html` from the run's metrics.jsonl, run.json and config.yaml, whole or not
    at all.
    """
    with FolderLock(run):
        return _write_report(run)


def _write_report(run: Path) -> Path:
    (rows, unreadable), facts = read_metrics(run / "metrics.jsonl"), read_json(run / "run.json")
    file, page, temporary = run / "config.yaml", run / "report.html", run / "report.html.tmp-"
    config = (
        file.read_text(encoding="utf-8")
        if file.exists()
        else json.dumps(facts.get("config"), indent=2)
    )
    with matplotlib.rc_context(DRAWING):
        text = _page(run.resolve().name, facts, rows, unreadable, config)
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(page)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise WorkError(f"{page}: could not be written ({error})") from None
    return page


def read_metrics(path: Path) -> tuple[dict[str, list[Row]], int]:
    """Rows by the key that tells their kind, and how many lines cannot be read: a kill may cut the
    last one.
    """
    kinds: dict[str, list[Row]] = {
        "loss": [],
        "held_out": [],
        "final": [],
        "samples": [],
        "event": [],
    }
    kinds |= {key: [] for key in OWN_SCORES}
    kinds |= {"expert_tokens": []}
    unreadable = 0
    for line in filter(bytes.strip, (path.read_bytes() if path.exists() else b"").split(b"\n")):
        try:
            row = json.loads(line)
            row["step"] = step = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            unreadable += 1
            continue
        for kind in kinds.keys() & row.keys():
            # A run resumed from an earlier checkpoint takes the same steps again; the later rows
            # are the model's.
            while kind != "event" and kinds[kind] and kinds[kind][-1]["step"] >= step:
                kinds[kind].pop()
            kinds[kind].append(row)
    return kinds, unreadable


def smoothed(values: ArrayLike, width: int) -> Floats:
    """Mean over a centred window of about `width` values, shorter at the ends; non-finite values
    are left out.
    """
    array = np.asarray(values, dtype=np.float64)
    finite, half = np.isfinite(array), min(width, len(array)) // 2
    window = np.ones(2 * half + 1)
    total = np.convolve(np.where(finite, array, 0.0), window)[half : half + len(array)]
    count = np.convolve(finite.astype(np.float64), window)[half : half + len(array)]
    return np.divide(total, count, out=np.full(len(array), np.nan), where=count > 0.5)


def _column(rows: Sequence[Row], *keys: str) -> Floats:
    """The numbers under a path of keys; NaN where a row has none, or one that is not finite."""
    values: Sequence[Any] = rows
    for key in keys:
        values = [value.get(key) if isinstance(value, dict) else None for value in values]
    numbers = np.array(
        [each if isinstance(each, int | float) else np.nan for each in values], dtype=np.float64
    )
    return np.where(np.isfinite(numbers), numbers, np.nan)


def _short(value: float, _position: object = None) -> str:
    """`1.3M`, `8.1k` or `0.02`: four significant digits."""
    power = min(int(np.log10(abs(value))) // 3, 4) if 1000 <= abs(value) < np.inf else 0
    return (
        f"{value / 1000**power:.4g}{('', 'k', 'M', 'B', 'T')[power]}"
        if np.isfinite(value)
        else MISSING
    )


def _card(title: str, caption: str, figure: Figure, legend: Sequence[Line] = ()) -> str:
    figure.axes[0].xaxis.set(
        major_locator=MaxNLocator(6, integer=True, min_n_ticks=1), major_formatter=_short
    )
    file = io.StringIO()
    figure.savefig(
        file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
    )
    body = file.getvalue().partition("<svg")[2].partition(">")[2]
    # Two pictures on one page may not share an id.
    body = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{title.replace(' ', '-')}-", body)
    for colour, variable in VARIABLES.items():
        body = body.replace(colour, f"var(--{variable})")
    box = "0 0 {:g} {:g}".format(*figure.get_size_inches() * 72)
    swatch = '<li><i style="background:var(--{})"></i>{}</li>'
    keys = "".join(
        swatch.format(VARIABLES[line.colour], escape(line.label)) for line in legend if line.label
    )
    return (
        f'<figure class="card"><figcaption><h3>{title}</h3><p>{caption}</p><ul>{keys}</ul></figcaption>'
        f'<svg viewBox="{box}" role="img" aria-label="{title} over training steps: '
        f'{caption}">{body}</figure>'
    )


def _chart(
    title: str, caption: str, lines: Sequence[Line], resumed: Floats, log: bool = False
) -> str:
    """A card with curves over steps, or nothing when no curve has a number; `log` applies to wide
    ranges only.
    """
    lines = [line for line in lines if np.isfinite(line.values).any()]
    if not lines:
        return ""
    figure = Figure()
    axes = figure.add_subplot()
    for line in reversed(lines):
        marker = "o" if np.isfinite(line.values).sum() < 30 and line.alpha == 1 else None
        axes.plot(
            line.steps,
            line.values,
            color=line.colour,
            lw=line.width,
            alpha=line.alpha,
            marker=marker,
            ms=3,
        )
    for step in resumed:
        axes.axvline(step, color=MUTED, lw=0.9, ls=(0, (3, 3)))
    positive = np.concatenate([line.values[line.values > 0] for line in lines])
    wide = log and len(positive) > 0 and positive.max() > 20 * positive.min()
    axes.set_yscale("log" if wide else "linear")
    ticks = LogLocator(subs=(1, 2, 5), numticks=6) if wide else MaxNLocator(5)
    axes.yaxis.set(major_locator=ticks, major_formatter=_short, minor_formatter=NullFormatter())
    axes.grid(axis="y")
    return _card(title, caption, figure, lines)


def _noisy(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[Line]:
    raw = Line(_column(rows, "step"), _column(rows, key) * scale)
    if len(rows) < 80:
        return [raw]
    mean = smoothed(raw.values, min(len(rows) // 40, 400))
    return [replace(raw, values=mean), replace(raw, width=0.7, alpha=0.35)]


def _own_scores(rows: Kinds) -> list[tuple[str, str, list[Line], bool]]:
    """Held-out loss and share right, and what training shows of rewards and margins."""
    charts = []
    for key in (key for key in OWN_SCORES if rows[key]):
        at = _column(rows[key], "step")
        loss, right = (
            Line(at, _column(rows[key], key, name), width=2.2) for name in ("loss", "accuracy")
        )
        charts += [
            ("Held-out loss", "lower is better", [loss], False),
            ("Held-out share right", "of 1", [right], False),
        ]
    for key, what in (("reward", "mean of the answers drawn"), ("margin", "chosen over rejected")):
        charts.append((key.capitalize(), what, _noisy(rows["loss"], key), False))
    return charts


def _charts(rows: Kinds) -> str:
    training, scored = rows["loss"], rows["held_out"]
    steps, at = _column(training, "step"), _column(scored, "step")
    resumed = _column([row for row in rows["event"] if row["event"] == "resumed"], "step")
    held = [Line(at, _column(scored, "held_out", "bits_per_byte"), label="all text", width=2.2)]
    sources = list(
        dict.fromkeys(name for row in scored for name in row["held_out"].get("sources", {}))
    )
    for name, colour in (
        zip(sources, SERIES[1:], strict=False) if 1 < len(sources) < len(SERIES) else ()
    ):
        held.append(
            Line(
                at, _column(scored, "held_out", "sources", name, "bits_per_byte"), colour, name, 1.1
            )
        )
    rates: dict[
        bytes, Line
    ] = {}  # by value: groups with equal rates would hide each other, so they share a line
    for name in dict.fromkeys(name for row in training for name in row.get("learning_rates", {})):
        line = Line(
            steps, _column(training, "learning_rates", name), SERIES[len(rates) % len(SERIES)], name
        )
        same = rates.setdefault(line.values.tobytes(), line)
        rates[line.values.tobytes()] = (
            same if same is line else replace(same, label=f"{same.label}, {name}")
        )
    notes = "; faint: single steps" * (len(steps) >= 80) + "; dashed: resumed" * (len(resumed) > 0)
    charts = (
        ("Training loss", f"nats per token{notes}", _noisy(training, "loss"), True),
        ("Held-out bits per byte", "lower is better", held, False),
        *_own_scores(rows),
        ("Learning rate", "per group of parameters", list(rates.values()), False),
        ("Gradient norm", "before clipping", _noisy(training, "grad_norm"), True),
        ("Throughput", "trained tokens per second", _noisy(training, "tokens_per_second"), False),
        (
            "MFU",
            "% of this machine's peak matrix-product speed",
            _noisy(training, "mfu", 100),
            False,
        ),
    )
    return "".join(
        _chart(title, caption, lines, resumed, log) for title, caption, lines, log in charts
    )


def _best_score(rows: Kinds, best: Row | None) -> tuple[str, str, str]:
    """The tile of the best held-out score: bits per byte, or the loss of labels, answers, pairs or
    rewards.
    """
    for key in (key for key in OWN_SCORES if rows[key]):
        losses = _column(rows[key], key, "loss")
        if np.isfinite(losses).any():
            at = int(np.nanargmin(losses))
            return "Held-out loss", f"{losses[at]:.3f}", f"{key}, step {rows[key][at]['step']:,}"
    if best is None:
        return "Held-out bits per byte", MISSING, "not scored"
    return (
        "Held-out bits per byte",
        f"{best['held_out']['bits_per_byte']:.3f}",
        f"{best['what']}, step {best['step']:,}",
    )


def _header(name: str, facts: Row, rows: Kinds, best: Row | None) -> str:
    def finite(key: str) -> Floats:
        values = _column(rows["loss"], key)
        return values[np.isfinite(values)] if np.isfinite(values).any() else np.array([np.nan])

    tokens, seconds, memory = (
        float(finite(key)[-1]) for key in ("tokens", "seconds", "memory_bytes")
    )
    speed, mfu = (float(np.median(finite(key))) for key in ("tokens_per_second", "mfu"))
    tiles = (
        _best_score(rows, best),
        ("Tokens trained", _short(tokens), f"{tokens:,.0f}"),
        (
            "Training time",
            MISSING if np.isnan(seconds) else duration(seconds),
            "without evaluation",
        ),
        ("Tokens per second", f"{speed:,.0f}", "median"),
        ("MFU", f"{mfu:.1%}", "median"),
        ("Memory", f"{memory / 1e9:.2f} GB", "at the last step"),
    )
    cells = "".join(
        f"<div><dt>{a}</dt><dd><b>{b}</b><small>{c}</small></dd></div>" for a, b, c in tiles
    )
    machine = facts.get("machine", {})
    words = [str(machine.get("gpu") or machine.get("processor")), f"transom {facts.get('transom')}"]
    words += [f"{key} {machine.get(key)}" for key in ("threads", "torch", "python")] + [
        f"seed {facts.get('seed')}"
    ]
    step = max((row["step"] for kind in rows.values() for row in kind), default=0)
    done = " done" * (step >= facts["steps"])
    return (
        f"<header><div><h1>{escape(name)}</h1><span>{_short(facts['parameters'])} parameters</span>"
        f'<span class="pill{done}">step {step:,} of {facts["steps"]:,}</span></div>'
        f"<p>{escape(' · '.join(words))}</p></header><dl>{cells.replace('nan', MISSING)}</dl>"
    )


def _sources(row: Row) -> str:
    lines = ""
    for name, score in (*row["held_out"].get("sources", {}).items(), ("all text", row["held_out"])):
        cells = "".join(
            f"<td>{_column([score], key)[0]:{form}}</td>" for key, form in SCORES.items()
        )
        lines += f"<tr><td>{escape(name)}</td>{cells.replace('nan', MISSING)}</tr>"
    heads = "".join(f"<th>{key.replace('_', ' ')}</th>" for key in ("source", *SCORES))
    return (
        f"<h2>Held out, step {row['step']:,}</h2><div "
        f'class="card"><table><tr>{heads}</tr>{lines}</table></div>'
    )


def _samples(rows: Sequence[Row]) -> str:
    blocks = []
    for row in reversed(rows):
        texts = [
            f'<pre class="said"><b>{escape(x["prompt"])}</b>{escape(x["text"])}</pre>'
            for x in row["samples"]
        ]
        blocks.append(f"<p>step {row['step']:,}</p>{''.join(texts)}")
    older = (
        f"<details><summary>Earlier samples</summary>{''.join(blocks[1:])}</details>"
        if blocks[1:]
        else ""
    )
    return f'<h2>Samples</h2><div class="card">{blocks[0]}{older}</div>' if blocks else ""


def _events(rows: Kinds, unreadable: int) -> str:
    training = rows["loss"]
    skips = np.flatnonzero(
        np.diff(np.nan_to_num(_column(training, "skipped_steps")), prepend=0.0) > 0
    )
    wrong = np.flatnonzero(np.isnan(_column(training, "loss")))
    events = [(row["step"], escape(str(row["event"]))) for row in rows["event"]]
    events += [
        (training[i]["step"], "skipped, float16 gradients overflowed") for i in skips.tolist()
    ]
    events += [
        (training[i]["step"], f"loss not finite ({len(wrong)} rows in all)")
        for i in wrong[:1].tolist()
    ]
    texts = [f"step {step:,}: {text}" for step, text in sorted(events)]
    texts += [f"lines of metrics.jsonl left out because they cannot be read: {unreadable}"] * (
        unreadable > 0
    )
    return f'<h2>Events</h2><div class="card">{"<br>".join(texts)}</div>' if texts else ""


def _page(name: str, facts: Row, rows: Kinds, unreadable: int, config: str) -> str:
    from transom.training.report.experts import expert_panel  # which draws with what stands above

    scored = [
        row for row in rows["held_out"] if np.isfinite(_column([row], "held_out", "bits_per_byte"))
    ]
    best = min(scored, key=lambda row: row["held_out"]["bits_per_byte"], default=None)
    if best:
        best = {**best, "what": "best"}
    if rows["final"]:  # over all held-out text, where the scores on the way were over a part of it
        best = {
            "step": rows["final"][-1]["step"],
            "held_out": rows["final"][-1]["final"],
            "what": "all text",
        }
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(name)}: '
        f"Transom run</title>"
        f'<meta name="viewport" '
        f'content="width=device-width"><style>{STYLE}</style></head><body><main>'
        f"{_header(name, facts, rows, best)}<h2>Over the training steps</h2>"
        f'<div class="grid">{_charts(rows) or "No step has been logged."}</div>'
        f"{expert_panel(rows['loss'], rows['expert_tokens'])}"
        f"{_sources(best) if best else ''}{_samples(rows['samples'])}{_events(rows, unreadable)}<h2>Config</h2>"
        f"<details "
        f'class="card"><summary>Show</summary><pre>{escape(config)}</pre></details></main></body></html>'
    )
