"""`transom verify`: run one check of `transom.verify.checks` and print what was compared."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from transom.cli.main import emit_json, user_path
from transom.cli.options import option
from transom.planning.tables import counted, heading, show, table
from transom.verify.checks import CHECKS, valid_with
from transom.verify.checks import run as run_check

if TYPE_CHECKING:
    from transom.verify.findings import Finding, Summary

OPTIONS = ("model", "adapter", "full", "length", "device", "dtype", "data", "steps", "tokens")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    checks = [f"  {check.name:10}  {check.compares}" for check in CHECKS.values()]
    parser.epilog = "\n".join(["checks:", *checks])
    option(parser, "CHECK", "a check of the list below", nargs="?")
    model = (
        "model or run folder, GGUF file, hub id, smollm2, preset, or the config of a model or "
        "run in YAML or JSON. The check runs on a small copy of it; checkpoint, merge, policy and "
        "finetune run the folder as it is (default: built-in models)"
    )
    option(parser, "MODEL", model, user_path, nargs="?")
    words: dict[str, tuple[str, Callable[[str], Any]]] = {
        "length": ("longest sequence in tokens", int),
        "device": ("device to run on (default: cpu; attention: all devices)", str),
        "dtype": ("dtype of the weights (default: float32)", str),
        "data": ("rows as `transom finetune` takes them (default: built-in rows)", user_path),
        "steps": ("steps of the run (default: 6)", int),
        "tokens": ("tokens to run through a small model with windows, such as 1000000", int),
    }
    base = f"an adapter of the base MODEL; only with {valid_with('adapter')}"
    option(parser, "ADAPTER", base, user_path, nargs="?")
    option(parser, "--full", "run MODEL as it is, with its weights")
    for name, (text, kind) in words.items():
        option(parser, f"--{name} {name.upper()}", f"{text}; only with {valid_with(name)}", kind)
    option(parser, "--json", "print one JSON document, no tables")


def run(options: argparse.Namespace) -> int:
    """Run one check and return the exit code, 1 if a comparison failed."""
    findings = run_check(options.check, **{name: getattr(options, name) for name in OPTIONS})
    if options.check == "attention":
        return _run_attention(options)
    from transom.verify.findings import summarize

    summaries = summarize(findings)
    if options.json:
        rows = [_row(one) for one in summaries]
        ok = not any(one.failed for one in summaries)
        document = {"check": options.check, "model": options.model, "ok": ok, "comparisons": rows}
        emit_json(document)
    else:
        model = " + ".join(filter(None, (options.model, options.adapter)))
        _print_summaries(f"verify {options.check}: {model or 'built-in models'}", summaries)
    return 1 if any(one.failed for one in summaries) else 0


def _print_summaries(title: str, summaries: Sequence[Summary]) -> None:
    """Print one row for each comparison, then where each failed one begins to differ."""
    rows = []
    for one in summaries:
        worst = one.worst
        result = f"{one.failed} FAILED" if one.failed else "ok"
        error, tolerance = f"{worst.error:.1e}", f"{worst.tolerance:.0e}"
        if not worst.tolerance:  # a count, a share, or bits that must be equal
            error, tolerance = f"{worst.error:.3g}", "0"
        rows.append((one.comparison, result, worst.case, str(one.cases), error, tolerance))
    heading(title)
    show(table(("comparison", "result", "worst case"), ("cases", "error", "tolerance"), rows))
    for one in summaries:
        if bad := one.first_failure:
            print(f"{bad.comparison}: {bad.case}: error {bad.error:.2e}, {bad.detail}")
    cases, failed = sum(one.cases for one in summaries), sum(one.failed for one in summaries)
    comparisons = counted(cases, "comparison")
    result = f"FAILED: {failed:,} of {comparisons}" if failed else f"all {comparisons} passed"
    print(f"\n{result}")


def _row(one: Summary) -> dict[str, Any]:
    first = None if one.first_failure is None else _plain(one.first_failure)
    worst = _plain(one.worst)
    return {
        "comparison": one.comparison,
        "cases": one.cases,
        "failed": one.failed,
        "worst": worst,
        "first_failure": first,
    }


def _plain(finding: Finding) -> dict[str, Any]:
    """Return a finding for JSON, which has no infinity."""
    error = finding.error if finding.error < float("inf") else None
    detail = "" if finding.ok else finding.detail
    return {"case": finding.case, "error": error, "tolerance": finding.tolerance, "detail": detail}


def _run_attention(options: argparse.Namespace) -> int:
    """Compare all attention backends, refuse those that fail, and print the support matrix."""
    from transom.attention.backends import machine_key
    from transom.verify.attention import verify_machine

    report = verify_machine(options.device)
    if options.json:
        document = {"check": "attention", "ok": not report.failed, "machine": machine_key()}
        emit_json({**document, **vars(report)})
        return 1 if report.failed else 0
    _print_matrix(f"verify attention: error against float64, {machine_key()}", report.rows)
    for name, diagnosis in report.failed.items():
        print(f"{name}: {diagnosis}{'; refused on this machine from now on' * report.refused}")
    result = "FAILED" if report.failed else "all backends passed"
    print(f"\n{result}: {report.comparisons:,} comparisons")
    return 1 if report.failed else 0


def _print_matrix(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the largest error by backend, dtype and kind of job, and why the others declined."""
    cells: list[tuple[str, ...]] = []
    declined: dict[str, str] = {}
    columns: list[str] = []
    active = {(row["backend"], row["device"]) for row in rows if not row["declined"]}
    for row in rows:
        name = f"{row['backend']} on {row['device']}"
        if row["declined"]:
            partly = (row["backend"], row["device"]) in active
            declined.setdefault(f"{name} in {row['dtype']}" if partly else name, row["declined"])
            continue
        columns = list(row["errors"])
        words = []
        for group, error in row["errors"].items():
            word = f"{error:.1e}" if isinstance(error, float) else error or "-"
            words.append(f"FAILED {word}" if group in row["failed"] else word)
        cells.append((name, row["dtype"], *words))
    heading(title)
    show(table(("backend", "dtype"), columns, cells))
    print("-: the backend declines such jobs\n")
    for name, reason in declined.items():
        print(f"{name}: {reason}")
