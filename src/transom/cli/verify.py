"""`transom verify`: every fast path against its slow, obvious twin, on this machine.

Exit code 1 where two things that should be equal are not.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.base.errors import RequestError, notice, require
from transom.base.fields import field_types
from transom.base.yaml_files import read_yaml
from transom.cli.inspect import find
from transom.cli.main import emit_json, user_path
from transom.config.model_args import ModelArgs
from transom.config.presets import PRESETS
from transom.planning.tables import heading, show, table
from transom.training.config import TrainArgs, read_config

if TYPE_CHECKING:
    from transom.verify.attention import Row
    from transom.verify.findings import Finding, Summary

# What takes a MODEL, and what has nothing to do with one.
WITH_MODEL = ("model", "cache", "checkpoint", "merge", "policy", "finetune", "resume")
ALONE = ("data", "step", "attention")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's options."""
    known = ", ".join((*WITH_MODEL, *ALONE))
    parser.add_argument("what", nargs="?", help=f"what to verify: {known}")
    parser.add_argument(
        "model",
        nargs="?",
        type=user_path,
        help="model or run folder, config of a model or a run (YAML or JSON), or preset: a "
        "shrunken copy of it is "
        "verified, of checkpoint and policy the folder itself, of finetune both, of merge an "
        "adapter, its base or what was merged; built-in models when absent",
    )
    parser.add_argument(
        "adapter",
        nargs="?",
        type=user_path,
        help="merge: an adapter for the base that stands before it",
    )
    parser.add_argument(
        "--full", action="store_true", help="cache: the folder's own weights, not a shrunken copy"
    )
    parser.add_argument(
        "--length", type=int, help="cache --full, checkpoint: longest sequence, tokens"
    )
    parser.add_argument(
        "--device", help="cache --full, policy, attention: where to run, default cpu for models"
    )
    parser.add_argument(
        "--dtype", help="cache --full, checkpoint: dtype of the weights, default float32"
    )
    parser.add_argument(
        "--data",
        type=user_path,
        metavar="FILE",
        help="finetune FOLDER: rows as finetune takes them, built-in otherwise",
    )
    parser.add_argument("--steps", type=int, help="resume: steps of the run, default 6")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead")


def run(options: argparse.Namespace) -> int:
    """Run one check and return the exit code: 1 if any comparison failed."""
    check_options(options)
    if options.what == "attention":
        return run_attention(options)
    from transom.base.runtime import one_thread
    from transom.verify.findings import summarize

    own = options.what in ("checkpoint", "merge", "policy", "finetune")
    real = options.full or (own and options.model is not None)
    with contextlib.nullcontext() if real else one_thread():
        lines = summarize(findings(options))
    if options.json:
        emit_json({"check": options.what, "model": options.model, **document(lines)})
    else:
        print_lines(options.what, " + ".join(filter(None, (options.model, options.adapter))), lines)
    return 1 if any(line.failed for line in lines) else 0


def check_options(options: argparse.Namespace) -> None:
    """Refuse what does not go together, before torch is imported."""
    known = (*WITH_MODEL, *ALONE)
    require(
        options.what in known,
        "verify",
        options.what,
        f"expected {', '.join(known)}",
    )
    fits = options.model is None or options.what in WITH_MODEL
    require(
        fits,
        "model",
        options.model,
        f"valid only with {', '.join(WITH_MODEL)}; {options.what} needs none",
    )
    pair = options.adapter is None or options.what == "merge"
    require(
        pair, "adapter", options.adapter, f"valid only with merge; {options.what} takes one model"
    )
    full = options.what == "cache" and options.full
    require(full or not options.full, "--full", options.full, "valid only with cache")
    require(
        not full or options.model is not None,
        "--full",
        True,
        "valid only with a model or run folder",
    )
    folder = options.what == "checkpoint" and options.model is not None
    for flag, fits in (
        ("length", full or folder),
        ("dtype", full or folder),
        ("device", full or options.what in ("policy", "attention")),
        ("data", options.what == "finetune" and options.model is not None),
        ("steps", options.what == "resume"),
    ):
        value = getattr(options, flag)
        whole = dict.fromkeys(("length", "dtype"), "cache --full and checkpoint FOLDER")
        expected = {
            **whole,
            "device": "cache --full, policy and attention",
            "data": "finetune FOLDER",
        }
        require(
            value is None or fits,
            f"--{flag}",
            value,
            f"valid only with {expected.get(flag, options.what)}",
        )


# -- which comparison
# -------------------------------------------------------------------------------------


def findings(options: argparse.Namespace) -> Iterator[Finding]:
    """The comparisons asked for, found one by one."""
    what, name = options.what, options.model
    if what == "resume":
        from transom.verify.resume import STEPS, compare_resumed_run

        if name is not None or options.steps is not None:
            args = read_run(name) if name is not None else TrainArgs(model="demo")
            expected = (
                "expected a run that trains a model; `transom verify finetune` stops and "
                "resumes fine-tuning"
            )
            require(args.finetune is None, "finetune", "given", expected)
            return compare_resumed_run(args, STEPS if options.steps is None else options.steps)
    if what == "checkpoint" and name is not None:
        from transom.verify.checkpoint import compare_folder

        return compare_folder(name, options.length, options.dtype or "float32")
    if what == "merge" and name is not None:
        from transom.verify.merge import compare_folders

        return compare_folders([name, *filter(None, [options.adapter])])
    if what == "cache" and options.full:
        from transom.checkpoints.load import load
        from transom.verify.cache import compare_whole

        subject = find(name)
        if subject.found is None:
            raise RequestError(
                f"--full: {subject.name} has no weights; expected a model or run folder"
            )
        model = load(
            subject.found, device=options.device or "cpu", dtype=options.dtype or "float32"
        )
        return compare_whole(model, subject.name, options.length)
    if what == "finetune" and name is not None:
        return finetune_findings(name, options.data)
    if what == "policy":
        from transom.verify.policy import check_policy

        device = options.device or "cpu"
        return check_policy(device) if name is None else drawn_from(name, device)
    from transom.verify.checks import CHECKS

    return CHECKS[what].run() if name is None else shrunken(what, name)


def drawn_from(name: str, device: str) -> Iterator[Finding]:
    """A folder's own weights, adapters among them, or a copy in small of what has none."""
    from transom.checkpoints.load import load
    from transom.verify.policy import compare_policies
    from transom.verify.sample_models import sample_model, small_copy

    if is_folder(name):
        return compare_policies([(name, load(name, device, "float32"))])
    copy = small_copy(read_model(name))
    for line in copy.left_out:
        notice(f"{name}: {line}")
    return compare_policies([(name, sample_model(copy.args).to(device))])


def finetune_findings(name: str, data: str | None) -> Iterator[Finding]:
    """A folder's own texts and weights on rows of `data`, and a copy in small of any model."""
    from transom.verify.finetune import compare_folder, compare_model
    from transom.verify.sample_models import small_copy

    own = is_folder(name)
    require(
        own or data is None,
        "--data",
        data,
        f"valid only with a model folder, and {name} has no tokenizer",
    )
    if own:
        yield from compare_folder(name, data)
    copy = small_copy(read_model(name))
    for line in copy.left_out:
        notice(f"{name}: {line}")
    yield from compare_model(copy.args, f"{name} in small")


def is_folder(name: str) -> bool:
    """Whether a name stands for weights: a folder, or what is neither file nor preset and may be a
    hub id.
    """
    path = Path(name)
    return path.is_dir() or not (path.exists() or name in PRESETS)


def shrunken(what: str, name: str) -> Iterator[Finding]:
    """A copy of the model in small, compared with the oracle or call by call."""
    from transom.verify.cache import compare_small
    from transom.verify.model import compare_with_oracle, unspoken
    from transom.verify.sample_models import sample_model, small_copy

    copy = small_copy(read_model(name), context=what == "cache")
    for line in copy.left_out:
        notice(f"{name}: {line}")
    if what == "cache":
        return compare_small(sample_model(copy.args), name)
    if missing := unspoken(copy.args):
        raise RequestError(f"{name}: {'; '.join(missing)}")
    return compare_with_oracle(copy.args, name)


def read_model(name: str) -> ModelArgs:
    """Model arguments of a folder, a preset, a config.json, or a YAML or JSON file of a model or a
    run.
    """
    path = Path(name)
    if path.is_dir() or path.name == "config.json" or name in PRESETS or not path.exists():
        return find(name).args
    data = read_mapping(path)
    return read_config(path).model_args(None) if is_run(data) else ModelArgs.from_dict(data)


def read_run(name: str) -> TrainArgs:
    """A run's config from its file or folder, or the default run around a model."""
    path = Path(name)
    if (path / "config.yaml").exists():
        path = path / "config.yaml"
    if path.is_file() and path.name != "config.json" and is_run(read_mapping(path)):
        return read_config(path)
    return TrainArgs(model=read_model(name).to_dict())


def is_run(data: Mapping[str, Any]) -> bool:
    """Whether a config is that of a run: a model's has none of its fields."""
    return bool(set(data) & (set(field_types(TrainArgs)) - set(field_types(ModelArgs))))


def read_mapping(path: Path) -> dict[str, Any]:
    """The fields in a YAML or JSON file (which is YAML too); an empty file is refused."""
    data = read_yaml(path)
    require(bool(data), str(path), None, "expected a mapping of fields")
    return data


# -- what is shown
# ----------------------------------------------------------------------------------------


def print_lines(what: str, model: str, lines: Iterable[Summary]) -> None:
    """One row per comparison, then where each failing one begins to differ."""
    rows, failing, cases = [], [], 0
    for line in lines:
        verdict = "equal" if not line.failed else f"{line.failed} differ"
        error, tolerance = (
            f"{line.worst.error:.1e}",
            f"{line.worst.tolerance:.0e}" if line.worst.tolerance else "0",
        )
        rows.append((line.comparison, verdict, line.worst.case, str(line.cases), error, tolerance))
        cases += line.cases
        if line.first_failure is not None:
            failing.append(line.first_failure)
    heading(f"verify {what}: {model or 'built-in models'}")
    show(
        table(("comparison", "verdict", "worst case"), ("cases", "largest error", "accepted"), rows)
    )
    for bad in failing:
        print(f"{bad.comparison}: {bad.case}: error {bad.error:.2e}, {bad.detail}")
    print(f"\n{'all equal' if not failing else 'NOT EQUAL'}: {cases} comparisons")


def document(lines: Iterable[Summary]) -> dict[str, Any]:
    """The same as plain data."""
    rows = [
        {
            "comparison": line.comparison,
            "cases": line.cases,
            "failed": line.failed,
            "worst": plain(line.worst),
            "first_failure": None if line.first_failure is None else plain(line.first_failure),
        }
        for line in lines
    ]
    return {"ok": not any(row["failed"] for row in rows), "comparisons": rows}


def plain(finding: Finding) -> dict[str, Any]:
    """A finding as JSON takes it, which has no infinity."""
    error = finding.error if finding.error < float("inf") else None
    return {
        "case": finding.case,
        "error": error,
        "tolerance": finding.tolerance,
        "detail": finding.detail,
    }


# -- attention
# --------------------------------------------------------------------------------------------


def run_attention(options: argparse.Namespace) -> int:
    """The support matrix of this machine; refuses backends that fail, and accepts again those that
    no longer do.
    """
    import torch

    from transom.attention.backends import machine_key, refuse, refused_file
    from transom.base.runtime import one_thread, pick_device
    from transom.verify.attention import failures, matrix, plain, save_matrix, verify_attention

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    if options.device is not None:
        devices = [pick_device(options.device).type]
    with one_thread():
        outcomes = list(verify_attention(devices))
    rows, failed = matrix(outcomes), failures(outcomes)
    saved = ""
    if options.device is None:
        try:
            refuse(failed)
            saved = str(save_matrix(rows))
        except OSError as error:  # the comparisons took minutes; they are shown all the same
            notice(
                f"{refused_file()}: could not be written ({error.strerror}), so no backend is "
                f"refused"
            )
    else:
        notice(
            f"--device {options.device}: one part of this machine, so nothing is refused or saved"
        )
    if options.json:
        facts = {"machine": machine_key(), "jobs": len(outcomes), "saved": saved}
        emit_json(
            {
                "check": "attention",
                "ok": not failed,
                **facts,
                "failed": failed,
                "rows": [*map(plain, rows)],
            }
        )
        return 1 if failed else 0
    print_matrix(machine_key(), rows)
    for name, why in failed.items():
        print(f"{name}: {why}{'; refused on this machine from now on' if saved else ''}")
    told = "NOT EQUAL" if failed else "all equal: no backend is refused"
    print(f"\n{told}; {len(outcomes)} comparisons{f', saved in {saved}' if saved else ''}")
    return 1 if failed else 0


def print_matrix(machine: str, rows: Sequence[Row]) -> None:
    """Largest error per backend, dtype and kind of job; what declines everything is one line with
    its reason.
    """
    shown: list[tuple[str, ...]] = []
    declined: dict[str, str] = {}
    columns: tuple[str, ...] = ()
    active = {(row.backend, row.device) for row in rows if not row.declined}
    for row in rows:
        name = f"{row.backend} on {row.device}"
        if row.declined:
            partly = (row.backend, row.device) in active
            declined.setdefault(f"{name} in {row.dtype}" if partly else name, row.declined)
            continue
        cells = []
        for group, error in row.errors.items():
            word = "-" if error is None else f"{error:.1e}"
            cells.append(f"FAILS {word}" if row.failed[group] else word)
        shown.append((name, row.dtype, *cells))
        columns = tuple(row.errors)
    heading(f"verify attention: largest error against the float64 reference, {machine}")
    show(table(("backend", "dtype"), columns, shown))
    print("-: declines such jobs\n")
    for name, why in declined.items():
        print(f"{name}: {why}")
