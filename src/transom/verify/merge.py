"""Merging: what is in the weights says what the adapter beside them said, and comes out again
without a trace.

Merged weights are made a second time here, from the formula in float64, and share no code with
`lora/merge.py`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice
from transom.base.fields import write
from transom.base.files import read_json
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.fingerprint import fingerprint, read_facts, write_facts
from transom.checkpoints.load import load
from transom.checkpoints.merge import Form, Merge, named_folders
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.config.model_args import ModelArgs
from transom.evaluation.agreement import Agreement, agreement, logits_of
from transom.evaluation.merging import BASE_ALONE, REPORT, adapter_hashes, merge_folders
from transom.evaluation.token_rows import BUILT_IN, HELD_OUT, RANDOM, STDLIB, TokenRows, token_rows
from transom.layers.inputs import TransformerInput
from transom.layers.linear import Embedding
from transom.lora.adapters import Adapters, adapted_modules
from transom.lora.apply import apply_lora
from transom.lora.args import CombineArgs, LoraArgs
from transom.lora.merge import merge_adapter, unmerge_adapter
from transom.lora.weights import LEAVES, Leaf, LoraWeights
from transom.models.llm import LLM
from transom.names.transforms import turn_rotary
from transom.quantize.args import QuantizeArgs
from transom.verify.findings import TOLERANCES, Finding, difference, same_bytes
from transom.verify.sample_models import BASE, SAMPLES, random_tokens, sample_model
from transom.verify.tiny_runs import quiet

TOKENS = 512  # that built-in cases are measured on
LENGTH = 64  # random tokens that merged and unmerged logits are compared on
# of a tensor's largest weight: what the order of a float32 sum may change before it is rounded
SLACK = 4e-6
# how far a divergence measured again may be from the reported one, relative; another order of sums
SAME = 0.02
LEAST = 1e-6  # nats per token: below, divergences are rounding


@dataclass(frozen=True)
class Example:
    """A built-in case: a model, its adapters, and how they are merged."""

    fields: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]] = ({},)
    args: CombineArgs = field(default_factory=CombineArgs)
    quantize: QuantizeArgs | None = None


_SMALL = {
    **BASE,
    "dim": 32,
    "hidden_dim": 32,
    "max_seq_len": 128,
}  # square where a transpose would fit
EXAMPLES: dict[str, Example] = {
    "llama": Example({**_SMALL, "rope_layout": "halves"}, ({"targets": ("all-linear", "output")},)),
    "tied with biases, DoRA": Example(
        {**SAMPLES["qwen3"], **_SMALL, "moe_args": None}, ({"dora": True},)
    ),
    "experts": Example(
        {**SAMPLES["mixtral"], **_SMALL, "rope_layout": "halves"}, ({"scaling": "rslora"},)
    ),
    "two adapters": Example(_SMALL, ({}, {"targets": ("ffn",)}), CombineArgs(weights=(0.7, -0.4))),
    "four bits": Example(_SMALL, quantize=QuantizeArgs(group=32)),
}


def check_merge() -> Iterator[Finding]:
    """Tiny models with drawn adapters: merged in memory, merged into a folder, in float32 and half
    precision.
    """
    for name, example in EXAMPLES.items():
        with tempfile.TemporaryDirectory(prefix="transom-verify-") as scratch, quiet():
            found = [*_compare_example(name, example, Path(scratch))]
        yield from found


def _compare_example(name: str, example: Example, scratch: Path) -> Iterator[Finding]:
    base = scratch / "base"
    save(
        sample_model(ModelArgs.from_dict(dict(example.fields)), dtype=torch.bfloat16),
        base,
        "native",
    )
    mark, adapters = fingerprint(base, fresh=True), []
    for index, fields in enumerate(example.adapters):
        model = load(base, dtype="float32")
        apply_lora(model, LoraArgs.from_dict({"rank": 3, "alpha": 5.0, **fields}))
        draws = torch.Generator().manual_seed(index)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if ".lora." in key:
                    weight.add_(0.1 * torch.randn(weight.shape, generator=draws))
        adapters.append(scratch / f"adapter{index}")
        save_adapter(model, adapters[-1], base=str(base))
        write_facts(
            adapters[-1],
            base,
            mark,
            write(example.quantize) if example.quantize is not None else None,
        )
    yield from compare_adapter(ModelLocation(base, adapters[0]), name)
    save(
        sample_model(ModelArgs.from_dict(dict(example.fields)), seed=1, dtype=torch.bfloat16),
        scratch / "other",
        "native",
    )
    try:
        Merge.plan(scratch / "other", adapters, example.args)
        accepted = True
    except RequestError:
        accepted = False
    yield Finding(
        "another base is refused", name, float(accepted), 0.0, "it was accepted" if accepted else ""
    )
    for dtype in ("float32", "bfloat16"):
        out = scratch / dtype
        merge_folders(base, adapters, out, args=example.args, dtype=dtype, tokens=TOKENS)
        yield from compare_merged(out, f"{name} in {dtype}")


def compare_folders(names: Sequence[str]) -> Iterator[Finding]:
    """BASE ADAPTER, an adapter or a run of one on the base it names, or a merged folder with its
    report.
    """
    if len(names) == 1 and (Path(names[0]) / REPORT).exists():
        return compare_merged(Path(names[0]), names[0])
    if len(names) == 1:
        found = find_model(names[0])
    else:
        base, (adapter,) = named_folders(names[0], names[1:])
        found = ModelLocation(base, adapter)
    if found.adapter is None:
        raise RequestError(
            f"{names[0]}: neither an adapter nor a folder with {REPORT}; expected one of these"
        )
    return compare_adapter(found, str(found.adapter))


# -- in memory
# --------------------------------------------------------------------------------------------


def compare_adapter(found: ModelLocation, name: str) -> Iterator[Finding]:
    """An adapter on its base: merged and unmerged, in float32 and in the files' own dtype."""
    assert found.adapter is not None, "what is merged"
    facts = read_facts(found.adapter)
    if facts is None:
        notice(f"{name}: no file says on which weights it was trained; taken is {found.model}")
    else:
        other = fingerprint(found.model, fresh=True) != facts.base_fingerprint
        detail = f"trained on {facts.base} ({facts.base_fingerprint[:12]})" if other else ""
        yield Finding("base = the one of training", name, float(other), 0.0, detail)
    model = load_adapter(load(ModelLocation(found.model), dtype="float32"), found.adapter)
    tokens = random_tokens(model.args, 1, min(LENGTH, model.args.max_seq_len))
    expected = _outputs(model, tokens)
    merge_adapter(model)
    for path, (leaf, held) in _changed(model).items():
        assert held.base is not None, "what merging leaves behind"
        share = _off(_by_hand(leaf, held.base, held.active_lora()), leaf.weight.detach())
        yield _finding("merged weights = by hand", f"{name}, {path}", share)
    yield from _outputs_agree(expected, _outputs(model, tokens), name)
    del model
    model = load_adapter(load(ModelLocation(found.model)), found.adapter)
    unmerge_adapter(merge_adapter(model))
    replaced = {
        f"{path}.{key}" for path, _, held in adapted_modules(model) for key in held.replaced
    }
    args = read_args(found.model)
    for key, stored in open_parameters(found.model, args).items():
        same = same_bytes(model.get_parameter(key).detach(), stored.read()) or key in replaced
        detail = "" if same else "other bits than in the base's files"
        yield Finding(
            "unmerged = base, bit for bit", f"{name}, {key}", 0.0 if same else math.inf, 0.0, detail
        )


def _outputs(model: LLM, tokens: Tensor) -> Tensor:
    """Logits, or the vectors of a model that gives none."""
    with torch.no_grad():
        output = model(TransformerInput(tokens))
    made = output.pooled_BD if output.logits is None else output.logits
    assert made is not None, "one of the two"
    return made.float()


def _outputs_agree(expected: Tensor, said: Tensor, name: str) -> Iterator[Finding]:
    """Numbers within the rounding of float32, and the same first choice wherever the best two are
    further apart.
    """
    tolerance = TOLERANCES[torch.float32]
    error = difference(said, expected)
    yield Finding("merged = unmerged, logits", name, error, tolerance)
    first, second = expected.argmax(-1, keepdim=True), said.argmax(-1, keepdim=True)
    gaps = (expected.gather(-1, first) - expected.gather(-1, second)).abs() / expected.abs().max()
    near = int(((first != second) & (gaps <= tolerance)).sum())
    wrong = int(((first != second) & (gaps > tolerance)).sum())
    if near:
        notice(
            f"{name}: {near} of {first.numel()} first choices fall otherwise between two that "
            f"are nearly equal"
        )
    detail = f"{wrong} of {first.numel()} differ" if wrong else ""
    yield Finding("merged = unmerged, first choices", name, float(wrong), 0.0, detail)


# -- by hand
# ----------------------------------------------------------------------------------------------


def _changed(model: LLM) -> dict[str, tuple[Leaf, Adapters]]:
    """The leaves that active adapters change, by the name of their weight."""
    return {
        f"{path}.weight": (leaf, held)
        for path, leaf, held in adapted_modules(model)
        if isinstance(leaf, LEAVES) and held.active_lora()
    }


@torch.no_grad()
def _by_hand(leaf: Leaf, weight: Tensor, parts: Sequence[LoraWeights]) -> Tensor:
    """The leaf's `weight` with these adapters in it, in float64: W + scale B A, and DoRA's length
    (2402.09353).
    """
    whole = weight.double()
    for lora in parts:
        scale = {"direct": 1.0, "alpha_over_rank": 1 / lora.rank, "rslora": lora.rank**-0.5}[
            lora.scaling
        ] * lora.alpha
        change = torch.einsum("...or,...ri->...oi", lora.B.double(), lora.A.double())
        whole = whole + scale * (change.T if isinstance(leaf, Embedding) else change)
    (first, *_) = parts
    if first.magnitude is None:
        return whole
    inputs = 0 if isinstance(leaf, Embedding) else -1  # the axis that a length is taken over
    return whole / whole.norm(dim=inputs, keepdim=True) * first.magnitude.double().unsqueeze(inputs)


def _finding(comparison: str, where: str, share: float) -> Finding:
    """Of a weight: `share` of its numbers are not what the sum rounds to."""
    return Finding(
        comparison, where, share, 0.0, f"{share:.1%} of its numbers are off" if share else ""
    )


def _off(exact: Tensor, found: Tensor) -> float:
    """Share of numbers that no float32 sum of `exact` rounds to in the dtype of `found`."""
    if exact.shape != found.shape:
        return math.inf
    slack = SLACK * float(exact.abs().max())
    low, high = ((exact + way * slack).to(found.dtype).double() for way in (-1, 1))
    right = (found.double() >= low) & (found.double() <= high)  # false for NaN
    return float((~right).double().mean())


# -- folders
# ----------------------------------------------------------------------------------------------


def compare_merged(out: Path, name: str) -> Iterator[Finding]:
    """A merged folder against its report: base, adapters, every weight, and what it says on the
    same text.
    """
    report = read_json(out / REPORT)
    merge = _planned(report, out)
    for what, reported, found in (
        ("base = reported", report["base"]["fingerprint"], merge.base_fingerprint),
        ("merged folder = reported", report["out"]["fingerprint"], fingerprint(out, fresh=True)),
        *(
            ("adapter = reported", one["sha256"], adapter_hashes(part.folder))
            for one, part in zip(report["adapters"], merge.parts, strict=True)
        ),
    ):
        detail = "" if reported == found else f"reported {reported}, found {found}"
        yield Finding(what, name, float(reported != found), 0.0, detail)
    form = next((form for form in merge.forms if merge.name_of(form) == report["kept"]), None)
    if form is None:
        raise RequestError(
            f"{out / REPORT}: kept: got {report['kept']!r}; expected a base that its adapters allow"
        )
    yield from _written(merge, form, out, name)
    kept = next(one for one in report["candidates"] if one["name"] == report["kept"])
    if "kl" in kept:
        yield from _said(merge, report, kept, out, name)


def _planned(report: Mapping[str, Any], out: Path) -> Merge:
    """The merge that a report tells of; what it lacks, or what is gone since, is a
    `RequestError`.
    """
    try:
        adapters = [one["folder"] for one in report["adapters"]]
        args = CombineArgs(
            **report["combine"], weights=tuple(one["weight"] for one in report["adapters"])
        )
        return Merge.plan(report["base"]["folder"], adapters, args, report["out"]["dtype"])
    except (KeyError, TypeError) as error:
        raise RequestError(f"{out / REPORT}: not a report of a merge ({error})") from None


def _written(merge: Merge, form: Form, out: Path, name: str) -> Iterator[Finding]:
    """Every weight in the folder: rounded once from the sum made by hand, or the base's own."""
    model = merge.unmerged(form)
    changed = _changed(model) if merge.args.method == "linear" else {}
    if not changed:  # TIES and DARE are not written down a second time
        model = merge.merged(model)
    args = read_args(out)
    for key, stored in open_parameters(out, args).items():
        here = turn_rotary(key, stored.read(), args, model.args.rope_layout)
        if key == "output.weight" and model.output is None:  # a format without tying
            key = "tok_embeddings.weight"
        own = model.get_parameter(key).detach()
        leaf, held = changed.get(key, (None, None))
        exact = (
            own.double()
            if leaf is None or held is None
            else _by_hand(leaf, own, held.active_lora())
        )
        yield _finding("written weights = by hand", f"{name}, {key}", _off(exact, here))


def _said(
    merge: Merge, report: Mapping[str, Any], kept: Mapping[str, Any], out: Path, name: str
) -> Iterator[Finding]:
    """The divergence from the unmerged model, measured again on the text of the report."""
    rows = _rows(merge, report)
    if rows is None:
        return
    model = merge.unmerged(merge.trained)
    if merge.args.method != "linear":
        model = merge.merged(model)
    reference = [*logits_of(model, rows.rows)]
    del model
    found: Agreement = agreement(reference, logits_of(load(out, dtype=merge.wide), rows.rows))
    apart = abs(found.kl - kept["kl"])
    detail = f"reported {kept['kl']:.3g}, found {found.kl:.3g} nats per token"
    allowed = SAME * kept["kl"] + LEAST
    yield Finding("divergence = reported", name, apart, allowed, detail if apart > allowed else "")
    effect = report["controls"][BASE_ALONE]["kl"]
    nearer = found.kl <= effect + LEAST
    detail = (
        ""
        if nearer
        else f"{found.kl:.3g} nats per token from the unmerged model, the base alone {effect:.3g}"
    )
    yield Finding("nearer than the base alone", name, float(not nearer), 0.0, detail)


def _rows(merge: Merge, report: Mapping[str, Any]) -> TokenRows | None:
    """The same rows of tokens; None where the text is not there any more, which is said."""
    source, expected = report["data"]["source"], report["data"]["sha256"]
    named = not source.startswith((RANDOM, BUILT_IN, HELD_OUT))
    if named and source != STDLIB and not Path(source).exists():
        notice(f"{source}: not there any more, so what the merged model says is not compared")
        return None
    given, tokens = source if named else None, report["data"]["tokens"]
    rows = token_rows(merge.found, read_args(merge.base), given, merge.run, tokens)
    if rows.sha256 != expected:
        notice(
            f"{source}: not the text that was measured on: what the merged model says is not "
            f"compared"
        )
        return None
    return rows
