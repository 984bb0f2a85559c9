"""Quantized weights against float64 twins of rounding, GPTQ, AWQ and the layouts of files.

The twins are in `verify.codes`.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transom.base.errors import expect, notice
from transom.base.files import read_json
from transom.checkpoints.files.layout import CONFIG, weight_files
from transom.checkpoints.files.location import find_model
from transom.checkpoints.files.safetensors_files import open_safetensors
from transom.checkpoints.load import load
from transom.checkpoints.quantized.config import stated_quantization
from transom.checkpoints.save import save
from transom.config.model_args import ModelArgs
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import Parts
from transom.quantize.leaves import Quantized, product, quantized_leaves
from transom.quantize.methods import quantize_model
from transom.verify import codes
from transom.verify.codes import Grid
from transom.verify.file_tensors import place_of
from transom.verify.findings import TOLERANCES, Finding, close
from transom.verify.sample_models import BASE, SAMPLES, random_tokens, sample_model
from transom.verify.tiny_runs import quiet, temporary_folder

_HALVES = {"max_seq_len": 128, "rope_layout": "halves"}
_SIZES = {"dim": 64, "n_heads": 8, "n_kv_heads": 4, "hidden_dim": 96, **_HALVES}
_MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 32}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**BASE, **_SIZES},
    "experts": {**SAMPLES["mixtral"], **_SIZES, "moe_args": _MOE},
}
ROUNDED = {
    "int4": QuantizeArgs("int4", 32),
    "int4, zero points": QuantizeArgs("int4", 32, zero_points=True),
    "int8": QuantizeArgs("int8", 0),
    "int8, zero points": QuantizeArgs("int8", 32, zero_points=True),
    "nf4": QuantizeArgs("nf4", 32),
    "fp4": QuantizeArgs("fp4", 32),
    "fp8": QuantizeArgs("fp8", 0),
}
METHODS = {
    "GPTQ, int4": QuantizeArgs("int4", 32, method="gptq"),
    "GPTQ, int4, zero points": QuantizeArgs("int4", 32, method="gptq", zero_points=True),
    "GPTQ, int4, inputs in order": QuantizeArgs("int4", 32, method="gptq", act_order=False),
    "GPTQ, int8": QuantizeArgs("int8", 0, method="gptq"),
    "GPTQ, nf4": QuantizeArgs("nf4", 32, method="gptq"),
    "AWQ, int4": QuantizeArgs("int4", 32, method="awq"),
}
ROUNDING = 1e-4  # of scales and quotients in float32, which decides between two codes
FLIPS = 0.02  # share of codes that rounding in float32 may move to a neighbour in GPTQ
LENGTH = 64  # tokens of a row


def check(model: str | None = None) -> Iterator[Finding]:
    """Compare codes, products, logits and files of small models, or those of a quantized folder.

    Args:
        model: A folder in the layout of GPTQ, or of 8-bit floats.

    Raises:
        RequestError: The folder is not quantized in this layout.
    """
    if model is not None:
        folder = find_model(model).model
        stated = stated_quantization(folder)
        method = "dense weights" if stated is None else stated.method
        expected = "a folder in the layout of gptq or fp8"
        expect(method in ("gptq", "fp8"), f"{model}: quantization", method, expected)
        with quiet():
            made = load(folder, dtype="float32")
        if method == "gptq":
            yield from _unpacked(folder, model, made)
        yield from compare_decoded(model, made)
        return
    for name, fields in MODELS.items():
        dense = sample_model(ModelArgs.from_dict(fields), dtype=torch.float32)
        for kind, args in ROUNDED.items():
            with quiet():
                made = quantize_model(copy.deepcopy(dense), args)
            yield from _rounding(f"{name}, {kind}", dense, made, args)
            yield from compare_decoded(f"{name}, {kind}", made)
    yield from _calibrated()
    yield from _files()


class Matrix(NamedTuple):
    """One quantized matrix [out, in]: that of a leaf, or of one of its experts."""

    path: str
    leaf: Quantized
    parts: Parts
    expert: int | None = None

    def decoded(self) -> Tensor:
        """Return the weight that its parts stand for, by the twin."""
        format = self.leaf.format
        floats = format.codes.is_floating_point
        return codes.decoded(self.parts, "fp8" if floats else codes.kind_of(format.levels))

    def of(self, weight: Tensor) -> Tensor:
        """Return the matrix in a weight of the leaf, in float64."""
        return (weight if self.expert is None else weight[self.expert]).detach().double()


def matrices(model: LLM, case: str) -> Iterator[tuple[str, Matrix]]:
    """Yield every quantized matrix of a model and its name, which begins with the case."""
    for path, leaf in quantized_leaves(model).items():
        if len(leaf.shape) == 2:
            yield f"{case}, {path}", Matrix(path, leaf, leaf.parts)
        for e in range(leaf.shape[0] if len(leaf.shape) > 2 else 0):
            parts = {name: part[e] for name, part in leaf.parts.items()}
            yield f"{case}, {path}, expert {e}", Matrix(path, leaf, parts, e)


def _rounding(case: str, dense: LLM, made: LLM, args: QuantizeArgs) -> Iterator[Finding]:
    """Compare scales, zero points and codes with the formulas of round-to-nearest."""
    for name, one in matrices(made, case):
        weight, stored = (
            one.of(dense.get_parameter(f"{one.path}.weight")),
            Grid.stored(one.parts, args.kind),
        )
        expected = Grid.of(weight, args.kind, stored.group, args.zero_points)
        yield close("scales = formula", name, stored.scales, expected.scales, ROUNDING / 10)
        beyond = float((stored.zeros - expected.zeros).abs().max()) - 0.5
        yield Finding("zero points = formula", name, max(0.0, beyond), ROUNDING, "of a step")
        yield _nearest(name, weight, stored, one)


def _nearest(name: str, weight: Tensor, grid: Grid, one: Matrix) -> Finding:
    """Compare the values of a matrix with the nearest to a weight [out, in]."""
    beyond = grid.beyond(weight, one.decoded())
    return Finding("codes = nearest", name, beyond, ROUNDING, "of a step from the nearest")


def compare_decoded(case: str, model: LLM) -> Iterator[Finding]:
    """Compare weights, products of few and many rows and logits with decoded weights."""
    tolerance, draws = TOLERANCES[torch.float32], torch.Generator().manual_seed(0)
    leaves = quantized_leaves(model)
    weights = {f"{path}.weight": torch.empty(leaf.shape).double() for path, leaf in leaves.items()}
    for name, one in matrices(model, case):
        expected = one.decoded()
        one.of(weights[f"{one.path}.weight"]).copy_(expected)
        yield close("weights = twin", name, one.of(one.leaf.weight), expected, tolerance / 10)
        for rows in (3, 70):
            x = torch.randn(rows, expected.size(1), generator=draws)
            measured, products = product(x, None, one.leaf, one.parts), x.double() @ expected.T
            yield close("products = twin", f"{name}, {rows} rows", measured, products, tolerance)
    parts = {f"{path}.{name}" for path, leaf in leaves.items() for name in leaf.part_names}
    dense = {
        name: one.detach().double() for name, one in model.named_parameters() if name not in parts
    }
    twin, tokens = LLM(model.args).double().eval(), random_tokens(model.args, 2, LENGTH)
    twin.load_state_dict({**dense, **weights}, strict=True, assign=True)
    with torch.inference_mode():
        logits = [one(TransformerInput(tokens)).logits for one in (model, twin)]
    yield close("logits = twin", case, logits[0], logits[1], tolerance)


def _calibrated() -> Iterator[Finding]:
    """Compare the leaves that read the first norm, whose inputs are those of the dense model.

    The embeddings are drawn so that the inputs depend on each other and have different sizes.
    """
    dense = sample_model(ModelArgs.from_dict(MODELS["llama"]), dtype=torch.float32)
    draws = torch.Generator().manual_seed(1)
    weight, dim = dense.tok_embeddings.weight.data, dense.args.dim
    sizes = torch.arange(1, dim + 1).sqrt()
    weight.copy_(weight @ torch.randn(dim, dim, generator=draws).div(sizes))
    batches = [random_tokens(dense.args, 4, LENGTH, seed) for seed in range(4)]
    with torch.inference_mode():
        norm = dense.get_submodule("layers.0.attention_norm")
        states = norm(dense.tok_embeddings(torch.cat(batches)))
    inputs = states.flatten(0, -2).double()
    paths = [f"layers.0.attention.{name}" for name in ("wq", "wk", "wv")]
    weights = {path: dense.get_parameter(f"{path}.weight").detach().double() for path in paths}
    for case, args in METHODS.items():
        with quiet():
            made = quantize_model(copy.deepcopy(dense), args, batches)
        factors = torch.ones(inputs.size(1)).double()
        if args.method == "awq":
            factors = codes.enlarged([*weights.values()], inputs, args.kind, args.group)
            norms = [m.get_parameter("layers.0.attention_norm.weight") for m in (made, dense)]
            yield close("AWQ = search", case, norms[0], norms[1] / factors, ROUNDING)
        for name, one in matrices(made, case):
            if one.path not in weights:
                continue
            weight, grid = weights[one.path] * factors, Grid.stored(one.parts, args.kind)
            if args.method == "awq":
                if not one.path.endswith("wv"):  # its outputs have the factors of wo, too
                    yield _nearest(name, weight, grid, one)
                continue
            found, how = one.decoded(), (args.act_order, args.damping)
            expected = codes.eliminated(weight, inputs.T @ inputs, grid, *how)
            differ = (found - expected).abs() > ROUNDING * expected.abs().max()
            share = float(differ.double().mean())
            yield Finding("GPTQ = elimination", name, share, FLIPS, f"{share:.1%} of codes differ")


def _files() -> Iterator[Finding]:
    """Write models in the layout of GPTQ, read them, and compare both with their folders."""
    for name, fields in MODELS.items():
        for kind in ("int4", "int4, zero points", "int8, zero points"):
            made = sample_model(ModelArgs.from_dict(fields), dtype=torch.float32)
            with quiet(), temporary_folder() as scratch:
                save(quantize_model(made, ROUNDED[kind]), scratch / "folder", "hf")
                read = load(scratch / "folder", dtype="float32")
                for how, model in (("written", made), ("read", read)):
                    yield from _unpacked(scratch / "folder", f"{name}, {kind}, {how}", model)


def _unpacked(folder: Path, name: str, model: LLM) -> Iterator[Finding]:
    """Compare the weights of a model with the tensors of a GPTQ folder."""
    stated = read_json(folder / CONFIG)["quantization_config"]
    less_one = stated.get("checkpoint_format", "gptq") == "gptq"
    modules: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, lazy in open_safetensors(folder, weight_files(folder).files).items():
        module, _, part = key.rpartition(".")
        modules[module][part] = lazy.read()
    for module, stored in modules.items():
        names, expert = place_of(f"{module}.weight") if "qweight" in stored else ((), None)
        leaves: list[Any] = [model.get_submodule(one.removesuffix(".weight")) for one in names]
        if leaves:
            measured = torch.cat(
                [one.weight if expert is None else one.weight[expert] for one in leaves]
            )
            expected = codes.unpacked(stored, less_one)
            yield close("weights = files", f"{name}, {module}", measured, expected, ROUNDING / 10)
        elif "qweight" in stored:
            notice(f"{name}: {module} is not compared: the table of names for this check lacks it")
