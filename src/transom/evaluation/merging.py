"""Merge adapters into their base, measure what the merge changes, and write a report.

An adapter may have been trained beside a rounded or quantized base. It is merged into that form of
the base and into the base's own numbers, and the candidate that is closer to the unmerged model is
written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from transom.base.errors import WorkError, notice
from transom.base.files import json_text, shown_name, write_text
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.checkpoints.convert import config_ids
from transom.checkpoints.files.companions import carry_companions
from transom.checkpoints.files.layout import Format, folder_format
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.files.staging import staged
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.merge import BaseForm, Merge
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import check_out, plan_layout
from transom.evaluation.agreement import Agreement, agreement, logits_of, next_tokens
from transom.evaluation.eval_model import adapter_hash
from transom.evaluation.token_rows import TOKENS, TokenRows, token_rows
from transom.lora.adapters import activate_adapters, plain_weights
from transom.lora.args import CombineArgs
from transom.models.llm import LLM

REPORT = "merge_report.json"
BASE_ALONE = "base alone"
NOTABLE = 0.05  # a notice is printed if a merge loses more than this share of the adapter's effect


def merge_folders(
    base: str | Path | None,
    adapters: Sequence[str | Path],
    out: str | Path,
    *,
    args: CombineArgs | None = None,
    format: Format | None = None,
    dtype: str | None = None,
    data: str | None = None,
    tokens: int = TOKENS,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write a model with its adapters merged into the weights, and `merge_report.json` beside it.

    Sums are computed in float32 or better and rounded once.

    Args:
        base: Folder or hub id of the base; None takes the one that the adapters name.
        adapters: Folders, runs or hub ids of the adapters.
        out: The folder to write.
        args: How several adapters are combined; a weighted sum by default.
        format: Format of `out`; that of the base by default.
        dtype: Dtype of `out`; that of the base by default.
        data: Text or examples to measure on; see `token_rows`.
        tokens: The most tokens to measure on.
        device: Where to merge and to measure.

    Returns:
        The content of the report.

    Raises:
        RequestError: The folders do not belong together, or an argument is wrong.
        WorkError: The merged model computes NaN or infinite logits, or writing fails.
    """
    started = time.perf_counter()
    merge = Merge.plan(base, adapters, CombineArgs() if args is None else args, dtype, device)
    model_args, kind = read_args(merge.base), format or folder_format(merge.base)
    check_out(out, merge.location, model_args, kind, merge.dtype)
    rows = token_rows(merge.location, model_args, data, merge.run, tokens)
    controls, candidates, model = measure(merge, rows)
    kept = min(candidates, key=lambda form: _divergence(candidates[form]))
    if kept != list(candidates)[-1]:
        del model  # or two models would be in memory
        model = merge.rounded(merge.merged(merge.unmerged(kept)))
    weights = {name: LazyTensor.of(one.detach()) for name, one in plain_weights(model).items()}
    layout = plan_layout(model.args, weights, kind, merge.dtype)
    if kind == "hf":
        layout.config.update(config_ids(merge.location))  # for other tools
    alone = len(candidates) == 1
    with staged(Path(out)) as folder:
        layout.write(folder)
        carry_companions(merge.location, folder)
        mark = fingerprint(folder, fresh=True)
        report = {
            **_request(merge, rows),
            "controls": {name: asdict(one) for name, one in controls.items()},
            "candidates": [
                {"name": str(form), **({} if one is None else asdict(one))}
                for form, one in candidates.items()
            ],
            "kept": str(kept),
            "why": "the only candidate"
            if alone
            else "the lowest divergence from the unmerged model",
            "out": {"format": kind, "dtype": merge.dtype, "fingerprint": mark},
            "versions": {"transom": __version__, **machine()},
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_text(folder / REPORT, json_text(report, indent=2))
    lost, effect = _divergence(candidates[kept]), _divergence(controls.get(BASE_ALONE))
    if lost > NOTABLE * effect:
        notice(
            f"the merged model is {lost:.2g} nats per token from the unmerged one, the base "
            f"alone {effect:.2g}: a wider dtype keeps more of a small adapter"
        )
    return report


def _divergence(agreement: Agreement | None) -> float:
    """Return the divergence from the unmerged model in nats per token; 0 if not measured."""
    return 0.0 if agreement is None else agreement.kl


def measure(
    merge: Merge, rows: TokenRows
) -> tuple[dict[str, Agreement], dict[BaseForm, Agreement | None], LLM]:
    """Compare every candidate with the unmerged model, with one model in memory at a time.

    TIES and DARE have no unmerged model. Their merged weights before rounding take its place. A
    model that returns vectors has no logits to compare and is not measured.

    Returns:
        The agreement of the base alone and, of several adapters, of each one alone; the agreement
        of each candidate by the form of the base that it is merged into, None if not measured; and
        the candidate made last.
    """
    head = read_args(merge.base).head
    if head is not None and not head.outputs:
        notice("a model that returns vectors has no logits to compare: the merge is not measured")
        model = merge.rounded(merge.merged(merge.unmerged(merge.trained)))
        return {}, {merge.trained: None}, model
    reference: list[Tensor] = []
    if merge.args.method != "linear":
        exact = logits_of(merge.merged(merge.unmerged(merge.trained)), rows.rows)
        reference = [part.cpu() for part in exact]
    model = merge.unmerged(merge.trained)
    reference = reference or [part.cpu() for part in logits_of(model, rows.rows)]
    targets = None if head is not None else next_tokens(rows.rows)

    def compare(other: LLM) -> Agreement:
        return agreement(reference, logits_of(other, rows.rows), targets)

    activate_adapters(model, ())
    controls = {BASE_ALONE: compare(model)}
    for part in merge.parts if len(merge.parts) > 1 else ():
        activate_adapters(model, (part.name,))
        controls[f"{part.folder} alone"] = compare(model)
    activate_adapters(model, merge.weights)
    candidates: dict[BaseForm, Agreement | None] = {}
    for form in merge.forms:
        if candidates:
            del model
            model = merge.unmerged(form)
        model = merge.rounded(merge.merged(model))
        found = compare(model)
        if not math.isfinite(found.kl):
            name = str(form)
            raise WorkError(f"{name}: logits are NaN or infinite; nothing was written")
        candidates[form] = found
    return controls, candidates, model


def _request(merge: Merge, rows: TokenRows) -> dict[str, Any]:
    """Return the part of the report about what was merged, and on what it was measured."""
    base = {"folder": shown_name(merge.base), "fingerprint": merge.base_fingerprint}
    return {
        "base": {**base, "in_training": str(merge.trained)},
        "adapters": [
            {"folder": str(one.folder), "weight": one.weight, "sha256": adapter_hash(one.folder)}
            for one in merge.parts
        ],
        "combine": {name: getattr(merge.args, name) for name in ("method", "density", "seed")},
        "reference": "base and adapters"
        if merge.args.method == "linear"
        else "the sum, not rounded",
        "data": rows.facts(),
    }
