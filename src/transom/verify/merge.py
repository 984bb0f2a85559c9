"""Merged weights give the outputs of adapters beside their base, and unmerging restores the base.

The merged weights are computed a second time in float64 by `verify.adapters.merged_weight`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect, explained, notice
from transom.base.fields import write
from transom.base.files import read_json
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.files.location import ModelLocation, find_model
from transom.checkpoints.fingerprint import fingerprint, read_facts, write_facts
from transom.checkpoints.load import load
from transom.checkpoints.merge import Merge, named_folders
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.config.model_args import ModelArgs
from transom.evaluation.merging import REPORT, merge_folders
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import Adapters, adapted_modules
from transom.lora.apply import apply_lora
from transom.lora.args import CombineArgs, LoraArgs
from transom.lora.merge import merge_adapter, unmerge_adapter
from transom.lora.weights import LEAVES, Leaf
from transom.models.llm import LLM
from transom.names.transforms import permute_rotary
from transom.quantize.args import QuantizeArgs
from transom.verify.adapters import merged_weight, randomize_adapters
from transom.verify.findings import TOLERANCES, Finding, close, exact, same_bits
from transom.verify.sample_models import BASE, SAMPLES, random_tokens, sample_model
from transom.verify.tiny_runs import quiet, temporary_folder

TOKENS = 512  # on which the merges of the examples are measured
LENGTH = 64  # random tokens on which merged and unmerged logits are compared
# How much the order of a float32 sum may change a weight before it is rounded, relative to the
# largest weight of its tensor.
SLACK = 4e-6


@dataclass(frozen=True)
class MergeExample:
    """A model, its adapters and how they are merged."""

    fields: Mapping[str, Any]
    adapters: Sequence[Mapping[str, Any]] = ({},)
    args: CombineArgs = field(default_factory=CombineArgs)
    quantize: QuantizeArgs | None = None


# Some matrices are square, so that a transposed update fits.
_SMALL = {**BASE, "dim": 32, "hidden_dim": 32, "max_seq_len": 128}
_HALVES = {"rope_layout": "halves"}
EXAMPLES = {
    "llama": MergeExample({**_SMALL, **_HALVES}, ({"targets": ("all-linear", "output")},)),
    "tied with biases, DoRA": MergeExample(
        {**SAMPLES["qwen3"], **_SMALL, "moe_args": None}, ({"dora": True},)
    ),
    "experts": MergeExample({**SAMPLES["mixtral"], **_SMALL, **_HALVES}, ({"scaling": "rslora"},)),
    "two adapters": MergeExample(
        _SMALL, ({}, {"targets": ("ffn",)}), CombineArgs(weights=(0.7, -0.4))
    ),
    "four bits": MergeExample(_SMALL, quantize=QuantizeArgs(group=32)),
}


def check(model: str | None = None, *, adapter: str | None = None) -> Iterator[Finding]:
    """Compare merges in memory and in folders.

    Args:
        model: An adapter on the base that it names, a base with `adapter`, or a merged folder
            with its report. Without it, examples are merged and compared.
        adapter: The adapter of the base.

    Raises:
        RequestError: If the folders are none of these.
    """
    if model is None:
        for name, example in EXAMPLES.items():
            with temporary_folder() as scratch, quiet():
                findings = [*_compare_example(name, example, scratch)]
            yield from findings
    elif adapter is None and (Path(model) / REPORT).exists():
        yield from compare_merged(Path(model), model)
    else:
        found = find_model(model)
        if adapter is not None:
            base, (folder,) = named_folders(model, [adapter])
            found = ModelLocation(base, folder)
        if found.adapter is None:
            raise RequestError(f"{model}: expected an adapter or a merged folder with {REPORT}")
        yield from compare_adapter(found, str(found.adapter))


def _compare_example(name: str, example: MergeExample, scratch: Path) -> Iterator[Finding]:
    """Write an example, and compare its merge in memory and in folders of two dtypes."""
    base, other = scratch / "base", scratch / "other"
    args = ModelArgs.from_dict(dict(example.fields))
    for seed, folder in enumerate((base, other)):
        save(sample_model(args, seed, torch.bfloat16), folder, "native")
    adapters = []
    for index, fields in enumerate(example.adapters):
        model = load(base, dtype="float32")
        apply_lora(model, LoraArgs.from_dict({"rank": 3, "alpha": 5.0, **fields}))
        randomize_adapters(model, seed=index)
        adapters.append(scratch / f"adapter{index}")
        save_adapter(model, adapters[-1], base=str(base))
        quantize = None if example.quantize is None else write(example.quantize)
        write_facts(adapters[-1], base, fingerprint(base, fresh=True), quantize)
    yield from compare_adapter(ModelLocation(base, adapters[0]), name)
    accepted = True
    try:
        Merge.plan(other, adapters, example.args)
    except RequestError:
        accepted = False
    yield exact("another base is refused", name, accepted, "it was accepted")
    for dtype in ("float32", "bfloat16"):
        out = scratch / dtype
        merge_folders(base, adapters, out, args=example.args, dtype=dtype, tokens=TOKENS)
        yield from compare_merged(out, f"{name} in {dtype}")


def compare_adapter(found: ModelLocation, name: str) -> Iterator[Finding]:
    """Merge an adapter into its base in memory, and unmerge it.

    The merge is compared in float32, the weights after unmerging in the dtype of the files.
    """
    assert found.adapter is not None, "there is an adapter to merge"
    facts = read_facts(found.adapter)
    if facts is None:
        notice(f"{name}: no file says which base it was trained on; compared with {found.model}")
    else:
        other = fingerprint(found.model, fresh=True) != facts.base_fingerprint
        detail = f"trained on {facts.base} ({facts.base_fingerprint[:12]})"
        yield exact("base = base of the training", name, other, detail)
    base = ModelLocation(found.model)
    model = load_adapter(load(base, dtype="float32", keep_quantized=False), found.adapter)
    tokens = random_tokens(model.args, 1, min(LENGTH, model.args.max_seq_len))
    expected = _outputs(model, tokens)
    merge_adapter(model)
    for path, (leaf, adapters) in _adapted_leaves(model).items():
        assert adapters.base is not None, "merging keeps the base"
        formula = merged_weight(leaf, adapters.base, adapters.active_lora())
        yield _rounded("merged weights = formula", f"{name}, {path}", leaf.weight, formula)
    tolerance = TOLERANCES[torch.float32]
    yield close("merged logits = unmerged", name, _outputs(model, tokens), expected, tolerance)
    del model
    model = load_adapter(load(base, keep_quantized=False), found.adapter)
    unmerge_adapter(merge_adapter(model))
    replaced = {
        f"{path}.{key}" for path, _, adapters in adapted_modules(model) for key in adapters.replaced
    }
    args = read_args(found.model)
    for key, stored in open_parameters(found.model, args).items():
        if key not in replaced:
            case, detail = f"{name}, {key}", "other bits than in the files of the base"
            weight, comparison = model.get_parameter(key), "unmerged = base, bit for bit"
            # `load` rounds the weights of quantized GGUF files.
            written = stored.read().to(weight.dtype)
            yield same_bits(comparison, case, weight, written, detail)


def _outputs(model: LLM, tokens: Tensor) -> Tensor:
    """Return the logits, or the pooled vectors of a model without logits."""
    with torch.no_grad():
        output = model(TransformerInput(tokens))
    return (output.pooled_BD if output.logits is None else output.logits).float()


def _adapted_leaves(model: LLM) -> dict[str, tuple[Leaf, Adapters]]:
    """Return the leaves with active adapters by the name of their weight."""
    return {
        f"{path}.weight": (leaf, adapters)
        for path, leaf, adapters in adapted_modules(model)
        if isinstance(leaf, LEAVES) and adapters.active_lora()
    }


def _rounded(comparison: str, case: str, measured: Tensor, expected: Tensor) -> Finding:
    """Return the share of numbers that no float32 sum of the exact weight rounds to."""
    share = math.inf
    if expected.shape == measured.shape:
        expected, found = expected.detach().double(), measured.detach().double()
        slack = SLACK * float(expected.abs().max())
        low, high = ((expected + way * slack).to(measured.dtype).double() for way in (-1, 1))
        share = float((~((found >= low) & (found <= high))).double().mean())  # NaN is outside
    return exact(comparison, case, share, f"{share:.1%} of the numbers differ")


def compare_merged(out: Path, name: str) -> Iterator[Finding]:
    """Compare every weight of a merged folder with the formula of the merge that its report states.

    Merges by TIES and DARE are computed a second time by the code of the merge.

    Raises:
        RequestError: If the report is incomplete, if the base or an adapter is gone, or if the base
            is not the one that an adapter was trained on.
    """
    report = read_json(out / REPORT)
    with explained(f"{out / REPORT}: not the report of a merge", KeyError, TypeError):
        folders = [one["folder"] for one in report["adapters"]]
        weights = tuple(one["weight"] for one in report["adapters"])
        args = CombineArgs(**report["combine"], weights=weights)
        base, dtype, kept = report["base"]["folder"], report["out"]["dtype"], str(report["kept"])
    merge = Merge.plan(base, folders, args, dtype)
    known = {str(form): form for form in merge.forms}
    expect(kept in known, f"{out / REPORT}: kept", kept, ", ".join(known))
    model = merge.unmerged(known[kept])
    adapted = _adapted_leaves(model) if merge.args.method == "linear" else {}
    if not adapted:
        model = merge.merged(model)
    args_out = read_args(out)
    for key, stored in open_parameters(out, args_out).items():
        written = permute_rotary(key, stored.read(), args_out, model.args.rope_layout)
        if key == "output.weight" and model.output is None:  # the format has no tied output
            key = "tok_embeddings.weight"
        expected_weight: Tensor = model.get_parameter(key)
        if key in adapted:
            leaf, adapters = adapted[key]
            expected_weight = merged_weight(leaf, expected_weight, adapters.active_lora())
        yield _rounded("written weights = formula", f"{name}, {key}", written, expected_weight)
