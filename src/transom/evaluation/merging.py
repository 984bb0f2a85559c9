"""Adapters merged into their base, with a receipt: every way to do it is measured, and the best is
written.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from transom.base.errors import WorkError, notice, require
from transom.base.files import json_text, sha256_of, write_text
from transom.base.runtime import machine
from transom.base.version import __version__
from transom.checkpoints.convert import carry_companions, config_ids
from transom.checkpoints.files.layout import Format, folder_format
from transom.checkpoints.files.lazy_tensors import LazyTensor
from transom.checkpoints.files.staging import staged
from transom.checkpoints.fingerprint import fingerprint
from transom.checkpoints.merge import Form, Merge
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import FolderLayout, plan_layout
from transom.checkpoints.state import meta_model
from transom.evaluation.agreement import Agreement, agreement, logits_of, next_tokens
from transom.evaluation.token_rows import TOKENS, TokenRows, token_rows
from transom.lora.adapters import activate_adapters, plain_weights
from transom.lora.combine_args import CombineArgs
from transom.models.llm import LLM

REPORT = "merge_report.json"
BASE_ALONE = "base alone"
NOTABLE = (
    0.05  # share of what an adapter does, as divergence, that is worth a word when a merge loses it
)


@dataclass(frozen=True)
class Candidate:
    """A merged model: on which form of the base, and how it agrees with the unmerged one (None: not
    measured).
    """

    name: str
    form: Form
    agreement: Agreement | None

    @property
    def divergence(self) -> float:
        """Nats per token."""
        return 0.0 if self.agreement is None else self.agreement.kl


@dataclass(frozen=True)
class Measured:
    """Controls by name, all candidates, and the one kept."""

    controls: dict[str, Agreement]
    candidates: tuple[Candidate, ...]
    kept: Candidate


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
    """Write the merged model into `out`, with `merge_report.json`, whose content is returned.

    Sums are made in float32 or better and cast once, to `dtype` (the base's own by default). Of
    several candidates the one that diverges least from the unmerged model is kept; `data` is the
    text to measure on, for so many `tokens` (`token_rows`).
    """
    started = time.perf_counter()
    merge = Merge.plan(base, adapters, CombineArgs() if args is None else args, dtype, device)
    for folder in merge.found.folders:
        require(
            Path(out).resolve() != folder.resolve(),
            "out",
            str(out),
            "expected none of the folders read",
        )
    model_args = read_args(merge.base)
    empty = {
        name: LazyTensor.of(weight) for name, weight in meta_model(model_args).named_parameters()
    }
    plan_layout(
        model_args, empty, format or folder_format(merge.base), merge.dtype
    )  # it refuses before the work
    rows = token_rows(merge.found, model_args, data, merge.run, tokens)
    measured, model = measure(merge, rows)
    if measured.kept is not measured.candidates[-1]:
        del model  # or two would be in memory
        model = merge.rounded(merge.merged(merge.unmerged(measured.kept.form)))
    layout = _layout(merge, model, format)
    with staged(Path(out)) as folder:
        layout.write(folder)
        carry_companions(merge.found, folder)
        report = {
            **_asked(merge, rows),
            **_found(measured),
            "out": {
                "format": layout.format,
                "dtype": merge.dtype,
                "fingerprint": fingerprint(folder, fresh=True),
            },
            "versions": {"transom": __version__, **machine()},
            "seconds": round(time.perf_counter() - started, 2),
        }
        write_text(folder / REPORT, json_text(report, indent=2))
    say_loss(measured)
    return report


def measure(merge: Merge, rows: TokenRows) -> tuple[Measured, LLM]:
    """Compare every candidate with the unmerged model, one in memory at a time; the one made last
    comes along.

    TIES and DARE have none; their sum before it is rounded stands for it. A model that gives
    vectors has no logits to compare, which is said, and its adapters are merged on the base that
    they saw.
    """
    head = read_args(merge.base).head
    if head is not None and not head.outputs:
        notice("a model that gives vectors has no logits to compare: the merge is not measured")
        only = Candidate(merge.name_of(merge.trained), merge.trained, None)
        return Measured({}, (only,), only), merge.rounded(
            merge.merged(merge.unmerged(merge.trained))
        )
    adds_up = merge.args.method == "linear"
    reference: list[Tensor] = []
    if not adds_up:
        reference = [
            part.cpu() for part in logits_of(merge.merged(merge.unmerged(merge.trained)), rows.rows)
        ]
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
    activate_adapters(model, merge.names)
    candidates = []
    for index, form in enumerate(merge.forms):
        if index:
            del model
            model = merge.unmerged(form)
        model = merge.rounded(merge.merged(model))
        found = compare(model)
        if not math.isfinite(found.kl):
            raise WorkError(
                f"{merge.name_of(form)}: logits are NaN or infinite; nothing was written"
            )
        candidates.append(Candidate(merge.name_of(form), form, found))
    kept = min(candidates, key=lambda one: one.divergence)
    return Measured(controls, tuple(candidates), kept), model


def say_loss(measured: Measured) -> None:
    """One line where rounding, or the form of the base, takes a notable share of what the adapter
    does.
    """
    effect, lost = measured.controls.get(BASE_ALONE), measured.kept.divergence
    if effect is not None and lost > NOTABLE * effect.kl:
        notice(
            f"the merged model is {lost:.2g} nats per token from the unmerged one, the base "
            f"alone {effect.kl:.2g}: a wider dtype keeps more of a small adapter"
        )


def _layout(merge: Merge, model: LLM, format: Format | None) -> FolderLayout:
    """All that is to be written; ids that a Hugging Face config holds for other tools stay
    there.
    """
    ours = {name: LazyTensor.of(weight.detach()) for name, weight in plain_weights(model).items()}
    kind = folder_format(merge.base)
    layout = plan_layout(model.args, ours, format or kind, merge.dtype)
    if layout.format == "hf":
        layout.config.update(config_ids(merge.found))
    return layout


def _asked(merge: Merge, rows: TokenRows) -> dict[str, Any]:
    """The part of the report that says what was merged, and on what it was measured."""
    parts = [
        {"folder": str(part.folder), "weight": part.weight, "sha256": adapter_hashes(part.folder)}
        for part in merge.parts
    ]
    return {
        "base": {
            "folder": str(merge.base),
            "fingerprint": merge.base_fingerprint,
            "in_training": str(merge.trained),
        },
        "adapters": parts,
        "combine": {name: getattr(merge.args, name) for name in ("method", "density", "seed")},
        "reference": "base and adapters"
        if merge.args.method == "linear"
        else "the sum, not rounded",
        "data": {
            "source": rows.source,
            "sha256": rows.sha256,
            "rows": len(rows.rows),
            "tokens": rows.tokens,
        },
    }


def adapter_hashes(adapter: Path) -> dict[str, str]:
    """SHA-256 of each file of an adapter's weights, without the state of the run that wrote it."""
    files = [
        path for pattern in ("*.safetensors", "*.bin") for path in sorted(adapter.glob(pattern))
    ]
    files = [path for path in files if not path.name.startswith("trainer.")]
    return {path.name: sha256_of(path) for path in files}


def _found(measured: Measured) -> dict[str, Any]:
    """The part of the report that says what was measured."""
    alone = len(measured.candidates) == 1
    return {
        "controls": {name: asdict(one) for name, one in measured.controls.items()},
        "candidates": [
            {"name": one.name, **({} if one.agreement is None else asdict(one.agreement))}
            for one in measured.candidates
        ],
        "kept": measured.kept.name,
        "why": "the only candidate" if alone else "the lowest divergence from the unmerged model",
    }
