"""Formats within a mean number of bits: arithmetic, and what is sensitive."""

import pytest
import torch

from tests.quantize.test_gptq import BATCHES
from tests.quantize.test_leaves import MOE, base, logits
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.quantize import budget
from transom.quantize.args import QuantizeArgs
from transom.quantize.budget import choose_formats
from transom.quantize.formats import dequantize, quantize
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import mean_bits, quantize_model


def args(bits, **fields):
    given = {"kind": "int4", "scales": "float16", "skip": (), "embeddings": True, **fields}
    return QuantizeArgs(bits_budget=bits, **given)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("bits", [4.5, 5.0, 6.5])
@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True}, {"moe_args": MOE}], ids=str)
def test_the_budget_is_used_and_not_exceeded(changes, bits, method):
    model = quantize_model(base(**changes), args(bits, method=method), BATCHES)
    assert bits - 0.35 < mean_bits(model) <= bits
    assert bool(logits(model).isfinite().all())
    assert "tok_embeddings" in quantized_leaves(model)


def test_a_budget_for_all_leaves_in_8_bits_takes_them():
    model = quantize_model(base(), args(8.6), BATCHES)
    assert {leaf.format.levels for leaf in quantized_leaves(model).values()} == {None}


@torch.no_grad()
def test_predicted_losses_are_the_divergence_that_rounding_causes():
    """Each leaf alone, against the KL divergence of the model with it rounded."""
    model = base(tie_embeddings=True)
    # The inputs of the formula: sensitivity of every leaf to each format.
    chosen = {
        path: leaf
        for path, leaf in model.named_modules()
        if hasattr(leaf, "weight") and leaf.weight.ndim == 2
    }
    settings = args(5.0)
    formats = {path: [*budget._candidates(leaf, settings)][:1] for path, leaf in chosen.items()}
    losses = budget._losses(model, formats, chosen, BATCHES)
    rows = torch.cat(BATCHES)
    exact = all_logits(model, rows).log_softmax(-1)
    ratios = []
    for path, leaf in chosen.items():
        dense = leaf.weight.detach().clone()
        leaf.weight.copy_(dequantize(quantize(dense, formats[path][0]), formats[path][0]))
        found = all_logits(model, rows).log_softmax(-1)
        leaf.weight.copy_(dense)
        divergence = float((exact.exp() * (exact - found)).sum(-1).mean())
        ratios.append(losses[path][formats[path][0]] / divergence)
    middle = sorted(ratios)[len(ratios) // 2]
    assert 0.5 < middle < 2, ratios
    assert min(ratios) > 0.25 and max(ratios) < 4, ratios


def all_logits(model, rows):
    return model(TransformerInput(rows)).logits


def test_sensitive_leaves_get_more_bits():
    """A leaf whose outputs hardly matter keeps the smallest format."""
    model = base()
    with torch.no_grad():
        model.layers[0].feed_forward.w_out.weight.mul_(1e-4)
    settings = args(5.5, skip=("output",), embeddings=False)
    chosen = {
        path: leaf
        for path, leaf in model.named_modules()
        if path.startswith("layers.") and isinstance(leaf, torch.nn.Linear)
    }
    formats = choose_formats(model, settings, chosen, BATCHES)
    bits = {path: 8 if format.levels is None else 4 for path, format in formats.items()}
    groups = {path: format.group for path, format in formats.items()}
    assert bits["layers.0.feed_forward.w_gate"] == 4
    assert groups["layers.0.feed_forward.w_gate"] == 0
    assert max(bits.values()) == 8


def test_weights_train_as_before():
    model = base()
    model.layers[0].attention.wq.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]
    chosen = {"layers.0.attention.wk": model.layers[0].attention.wk}
    choose_formats(model, args(6.0), chosen, BATCHES)
    assert [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"bits": 3.9}, r"bits_budget: got 3\.9; expected at least 4\.4\d\d, the smallest formats"),
        ({"bits": 5.0, "kind": "nf4"}, "bits_budget: got 5.0; expected kind int4"),
        ({"bits": 5.0, "group": 32}, "bits_budget: got 5.0; .*no group"),
        ({"bits": 5.0, "method": "awq"}, "bits_budget: got 5.0; .*rtn or gptq"),
        ({"bits": -1.0}, "bits_budget: got -1.0; expected a number of more than 0"),
    ],
)
def test_wrong_budgets_are_one_sentence(fields, words):
    model = base()
    with pytest.raises(RequestError, match=words):
        quantize_model(model, args(**fields), BATCHES)
    assert not quantized_leaves(model)
