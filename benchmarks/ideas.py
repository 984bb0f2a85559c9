"""The measured costs in the pages of docs/ideas, and the list of those pages."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COST = re.compile(r"(<!-- cost:(.+?) -->)\n(.*?)(<!-- /cost -->)", flags=re.DOTALL)
# Not figures, or said once for all rows.
ABOUT = {
    "benchmark",
    "case",
    "peer",
    "target",
    "transom",
    "torch",
    "processor",
    "threads",
    "commit",
    "date",
}

INTRODUCTION = """# Ideas

One page per idea: what it is, its formula, the paper, the files, when to use it, what it costs.
This list is generated from the pages, and the figures under Cost from `benchmarks/rows.jsonl`
(`python -m benchmarks --page`).

Unless a page says otherwise, a cost is that of one forward and backward of a small model (dim
512, 4 layers, 2 rows of 512 tokens) with the option, measured in turns with the same model
without it, the peer. `ratio` is the peer's time over the option's: 1 costs nothing, 0.5 takes
twice the time. `arithmetic_ratio` is the same of counted multiplications, `parameters_ratio` of
weights. Differences below 10% mean nothing."""

# The order of the index; a test compares it with what is there.
PAGES: dict[str, tuple[str, ...]] = {
    "Positions": ("rope", "partial-rotary", "rope-scaling", "nope-and-temperature"),
    "Attention": (
        "gqa-mqa",
        "latent-attention",
        "sliding-window",
        "chunked-attention",
        "qk-norm",
        "softcap-and-sinks",
        "cross-attention",
        "full-attention",
        "attention-backends",
        "packing",
    ),
    "Blocks": ("norms", "feed-forward", "scales"),
    "Experts": ("routers", "balancing", "grouped-matmul"),
    "Vision": ("early-fusion",),
    "Training": (
        "muon",
        "activation-checkpointing",
        "chunked-cross-entropy",
        "compile",
        "8-bit-adamw",
        "step-in-backward",
        "ema",
        "mup",
        "float8-training",
        "dry-run",
        "offload",
    ),
    "Many ranks": (
        "fsdp",
        "tensor-parallel",
        "expert-parallel",
        "context-parallel",
        "pipeline-parallel",
        "rehearsal",
    ),
    "Fine-tuning": (
        "lora",
        "qlora",
        "fine-tuning-data",
        "neftune",
        "preference-tuning",
        "distillation",
        "grpo",
        "merging",
        "evaluation",
    ),
    "Generation": (
        "decode-loop",
        "decoding-on-the-cpu",
        "kv-cache-in-8-bits",
        "prefix-caching",
        "speculative-decoding",
        "weight-streaming",
    ),
    "Quantization": ("quantization",),
    "Heads and loading": ("classification-and-embeddings", "load-hooks"),
}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the measured rows of a file, or none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def write_costs(pages_dir: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Write measured rows between `<!-- cost:BENCHMARK; CASE; CASE -->` and `<!-- /cost -->`.

    Without cases, all rows of the benchmark are written. A missing row reads "not measured yet".

    Returns:
        The pages that changed.
    """
    changed = []
    for path in sorted(pages_dir.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        written = COST.sub(
            lambda found: f"{found[1]}\n{measured(found[2], rows)}\n{found[4]}", text
        )
        if written != text:
            path.write_text(written, encoding="utf-8")
            changed.append(path)
    return changed


def measured(asked: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of "BENCHMARK; CASE; CASE" as a Markdown list, for every machine."""
    benchmark, *cases = asked.split("; ")
    chosen = [
        row for row in rows if row["benchmark"] == benchmark and (not cases or row["case"] in cases)
    ]
    if not chosen:
        return "not measured yet"
    lines, machine = [], None
    for row in sorted(
        chosen, key=lambda row: row["processor"]
    ):  # stable: cases stay in their order
        if row["processor"] != machine:
            machine = row["processor"]
            where = (
                f"{machine}, {row['threads']} threads, torch {row['torch']}, commit "
                f"{row['commit']}, {row['date']}"
            )
            lines += [*([""] if lines else []), f"{where}:", ""]
        figures = ", ".join(
            _named(*pair) for pair in row.items() if pair[0] not in ABOUT and pair[1] is not None
        )
        against = f" (peer: {row['peer']})" if row.get("peer") else ""
        lines.append(f"- {row['case']}: {figures}{against}")
    missing = [case for case in cases if case not in {row["case"] for row in chosen}]
    return "\n".join([*lines, *(f"- {case}: not measured yet" for case in missing)])


def _named(key: str, value: Any) -> str:
    return f"{key} ({figure(value)})" if isinstance(value, dict) else f"{key} {figure(value)}"


def figure(value: Any) -> str:
    """Return a value of a row as text: numbers with separators, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {figure(inner)}" for key, inner in value.items())
    return f"{value:,}" if isinstance(value, (int, float)) else str(value)


def write_index(pages_dir: Path) -> Path:
    """Write README.md of the pages: titles and first sentences in the order of `PAGES`."""
    lines = [INTRODUCTION]
    for group, names in PAGES.items():
        lines += ["", f"## {group}", ""]
        for name in names:
            title, _, rest = (pages_dir / f"{name}.md").read_text(encoding="utf-8").partition("\n")
            first = " ".join(rest.partition("## What it is")[2].split()).partition(". ")[0]
            lines.append(f"- [{title.removeprefix('# ')}]({name}.md): {first}.")
    path = pages_dir / "README.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
