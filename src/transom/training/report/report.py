"""The report of a run: one HTML page with its numbers, charts and samples. No torch.

The page needs nothing from a network. Every number of a row of metrics.jsonl gets a chart; a metric
that should have a better title than its name, or another scale, has an entry in `CHARTS`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np

from transom.base.files import read_json
from transom.base.locks import FolderLock
from transom.checkpoints.files.staging import staged
from transom.planning.tables import counted
from transom.training.loop.progress import duration
from transom.training.report.charts import (
    MISSING,
    SERIES,
    Card,
    Floats,
    Line,
    Row,
    chart,
    column,
    noisy,
    render,
    short,
)
from transom.training.report.experts import expert_panel

Kinds = Mapping[str, Sequence[Row]]

KINDS = ("loss", "held_out", "final", "samples", "event", "expert_tokens")
# Formats of the columns of the table of sources.
SCORES = {"bits_per_byte": ",.3f", "perplexity": ",.2f", "tokens": ",.0f", "bytes": ",.0f"}


class Chart(NamedTuple):
    """How a metric is drawn: its values times `scale`, on a logarithmic axis if `log`."""

    title: str
    caption: str = ""
    scale: float = 1.0
    log: bool = False


CHARTS = {
    "loss": Chart("Training loss", "nats per token", log=True),
    "held_out.bits_per_byte": Chart("Held-out bits per byte", "lower is better"),
    "held_out.loss": Chart("Held-out loss", "lower is better"),
    "held_out.accuracy": Chart("Held-out accuracy", "share of the items that are right"),
    "learning_rates": Chart("Learning rate", "per group of parameters"),
    "grad_norm": Chart("Gradient norm", "before clipping", log=True),
    "tokens_per_second": Chart("Throughput", "trained tokens per second"),
    "mfu": Chart("MFU", "% of the peak speed of matrix products on this machine", 100),
    "reward": Chart("Reward", "mean of the generated answers"),
    "margin": Chart("Margin", "of chosen answers over rejected ones"),
}
# Numbers that only the header or a table shows: they grow steadily, or count what was scored.
NOT_DRAWN = {
    *("step", "tokens", "seconds", "memory_bytes", "skipped_steps"),
    *("held_out.perplexity", "held_out.tokens", "held_out.bytes"),
    *("held_out.rows", "held_out.examples"),
}


def write_report(run: Path) -> Path:
    """Write `run/report.html` from metrics.jsonl, run.json and config.yaml; return its path.

    Raises:
        RequestError: If the folder is not a run, or another process writes to it.
        WorkError: If the page cannot be written. An earlier one is then unchanged.
    """
    page = run / "report.html"
    with FolderLock(run):
        rows, unreadable = read_metrics(run / "metrics.jsonl")
        facts, file = read_json(run / "run.json"), run / "config.yaml"
        config = json.dumps(facts.get("config"), indent=2)
        if file.exists():
            config = file.read_text(encoding="utf-8")
        with matplotlib.rc_context(fname=Path(__file__).with_name("charts.mplstyle")):
            text = _page(run.resolve().name, facts, rows, unreadable, config)
        with staged(page, file=page.name) as folder:
            (folder / page.name).write_text(text, encoding="utf-8")
    return page


def read_metrics(path: Path) -> tuple[dict[str, list[Row]], int]:
    """Read metrics.jsonl.

    Returns:
        The rows of each of `KINDS`, which are the keys that distinguish them, and the number of
        lines that cannot be read: a kill may cut the last one. If steps were taken again after a
        resume, only the later rows are returned.
    """
    kinds: dict[str, list[Row]] = {kind: [] for kind in KINDS}
    unreadable = 0
    for line in filter(bytes.strip, (path.read_bytes() if path.exists() else b"").split(b"\n")):
        try:
            row = json.loads(line)
            row["step"] = step = int(row["step"])
        except (ValueError, TypeError, KeyError, OverflowError):
            unreadable += 1
            continue
        for kind in kinds.keys() & row.keys():
            while kind != "event" and kinds[kind] and kinds[kind][-1]["step"] >= step:
                kinds[kind].pop()
            kinds[kind].append(row)
    return kinds, unreadable


def _metrics(rows: Kinds) -> Iterator[str]:
    """Yield the names of all numbers to draw: those of `CHARTS` first, others as they come."""
    yield from CHARTS
    names = (
        name
        for row in (*rows["loss"], *rows["held_out"])
        for prefix, values in (("", row), ("held_out.", row.get("held_out", {})))
        for name in (f"{prefix}{key}" for key, x in values.items() if isinstance(x, int | float))
    )
    yield from (name for name in dict.fromkeys(names) if name not in {*CHARTS, *NOT_DRAWN})


def _charts(rows: Kinds) -> list[Card]:
    training = rows["loss"]
    resumed = column([row for row in rows["event"] if row["event"] == "resumed"], "step")
    faint = "; faint: single steps" * (len(training) >= 80)
    notes = faint + "; dashed: resumed" * (len(resumed) > 0)
    cards: list[Card] = []
    for name in _metrics(rows):
        title = name.replace("held_out.", "held-out ").replace("_", " ").capitalize()
        shown = CHARTS.get(name, Chart(title))
        if name == "learning_rates":
            lines = _learning_rates(training)
        elif name.startswith("held_out."):
            lines = _held_out(rows["held_out"], name.removeprefix("held_out."))
        else:
            lines = noisy(training, name, shown.scale)
        caption = shown.caption + notes * (name == "loss")
        cards += chart(shown.title, caption, lines, resumed, shown.log)
    return cards


def _held_out(rows: Sequence[Row], name: str) -> list[Line]:
    """Return the curve of a held-out score, with those of its sources if they are few."""
    at = column(rows, "step")
    lines = [Line(at, column(rows, "held_out", name), width=2.2)]
    sources = list(dict.fromkeys(key for row in rows for key in row["held_out"].get("sources", {})))
    if 1 < len(sources) < len(SERIES):
        lines[0] = replace(lines[0], label="all text")
        for source, colour in zip(sources, SERIES[1:], strict=False):
            values = column(rows, "held_out", "sources", source, name)
            lines.append(Line(at, values, colour, source, 1.1))
    return lines


def _learning_rates(rows: Sequence[Row]) -> list[Line]:
    """Return one curve for all groups of parameters with the same rates, which would overlap."""
    names: dict[bytes, list[str]] = {}
    for name in dict.fromkeys(name for row in rows for name in row.get("learning_rates", {})):
        names.setdefault(column(rows, "learning_rates", name).tobytes(), []).append(name)
    return [
        Line(
            column(rows, "step"),
            column(rows, "learning_rates", alike[0]),
            SERIES[index % len(SERIES)],
            ", ".join(alike),
        )
        for index, alike in enumerate(names.values())
    ]


def _best(rows: Kinds) -> tuple[str, Row] | None:
    """Return the best held-out score and what it is, or the final score over all text."""
    if rows["final"]:
        last = rows["final"][-1]
        return "all text", {**last, "held_out": last["final"]}
    scored = [row for row in rows["held_out"] if np.isfinite(_value(row))]
    return ("best", min(scored, key=_value)) if scored else None


def _value(row: Row) -> float:
    """Return the number by which held-out scores are compared."""
    name = "bits_per_byte" if "bits_per_byte" in row["held_out"] else "loss"
    return float(column([row], "held_out", name)[0])


def _tiles(rows: Kinds, best: tuple[str, Row] | None) -> Iterator[tuple[str, str, str]]:
    """Yield title, number and note of each tile of the header."""

    def finite(key: str) -> Floats:
        values = column(rows["loss"], key)
        return values[np.isfinite(values)] if np.isfinite(values).any() else np.array([np.nan])

    tokens, seconds, memory = (
        float(finite(key)[-1]) for key in ("tokens", "seconds", "memory_bytes")
    )
    speed, mfu = (float(np.median(finite(key))) for key in ("tokens_per_second", "mfu"))
    if best is None:
        yield "Held-out bits per byte", MISSING, "not scored"
    else:
        what, row = best
        unit = "bits per byte" if "bits_per_byte" in row["held_out"] else "loss"
        yield f"Held-out {unit}", f"{_value(row):.3f}", f"{what}, step {row['step']:,}"
    yield "Tokens trained", short(tokens), f"{tokens:,.0f}"
    time = MISSING if np.isnan(seconds) else duration(seconds)
    yield "Training time", time, "without evaluation"
    yield "Tokens per second", f"{speed:,.0f}", "median"
    yield "MFU", f"{mfu:.1%}", "median"
    yield "Memory", f"{memory / 1e9:.2f} GB", "at the last step"


def _sources(total: Row) -> list[tuple[str, ...]]:
    """Return a line of the table for each source of text, and for all text."""
    if "bits_per_byte" not in total:
        return []
    return [
        (name, *(f"{column([score], key)[0]:{form}}" for key, form in SCORES.items()))
        for name, score in (*total.get("sources", {}).items(), ("all text", total))
    ]


def _events(rows: Kinds, unreadable: int) -> list[str]:
    training = rows["loss"]
    skipped = np.nan_to_num(column(training, "skipped_steps"))
    skips = np.flatnonzero(np.diff(skipped, prepend=0.0) > 0).tolist()
    wrong = np.flatnonzero(np.isnan(column(training, "loss"))).tolist()
    events = [(row["step"], str(row["event"])) for row in rows["event"]]
    events += [(training[i]["step"], "skipped, float16 gradients overflowed") for i in skips]
    if wrong:
        what = f"loss not finite ({counted(len(wrong), 'row')} in all)"
        events.append((training[wrong[0]]["step"], what))
    texts = [f"step {step:,}: {text}" for step, text in sorted(events)]
    if unreadable:
        texts.append(f"lines of metrics.jsonl that cannot be read: {unreadable}")
    return texts


def _page(name: str, facts: Row, rows: Kinds, unreadable: int, config: str) -> str:
    best, machine = _best(rows), facts.get("machine", {})
    setup = [str(machine.get("gpu") or machine.get("processor")), f"transom {facts.get('transom')}"]
    setup += [f"{key} {machine.get(key)}" for key in ("threads", "torch", "python")]
    return render(
        "report.html",
        name=name,
        facts=facts,
        step=max((row["step"] for kind in rows.values() for row in kind), default=0),
        setup=[*setup, f"seed {facts.get('seed')}"],
        tiles=_tiles(rows, best),
        cards=_charts(rows),
        experts=expert_panel(rows["loss"], rows["expert_tokens"]),
        best=None if best is None else best[1],
        heads=("source", *(key.replace("_", " ") for key in SCORES)),
        sources=[] if best is None else _sources(best[1]["held_out"]),
        samples=rows["samples"],
        events=_events(rows, unreadable),
        config=config,
    )
