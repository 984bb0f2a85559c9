"""GPTQ against the formulas of the paper in float64, and what happens on inputs that are hard."""

import copy
import itertools

import pytest
import torch

from tests.helpers import random_tokens
from tests.quantize.test_leaves import MLA, MOE, base, logits
from transom.base.errors import RequestError, WorkError
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.calibration import block_inputs
from transom.quantize.fitting import fitted_parts
from transom.quantize.formats import dequantize, quantize, requested, unpack
from transom.quantize.gptq import gptq
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import mean_bits, quantize_model

INT4 = {"kind": "int4", "group": 32}
KINDS = {
    "int4": INT4,
    "int4, zeros": {**INT4, "zero_points": True},
    "int4, one scale": {"kind": "int4", "group": 0},
    "int8": {"kind": "int8", "group": 64},
    "nf4": {"group": 32},
    "fp4": {"kind": "fp4", "group": 32},
}
BATCHES = [random_tokens(4, 24, seed=seed) for seed in range(3)]


def problem(outputs=24, inputs=192, rows=400):
    """A weight and correlated inputs, some of which are much larger than the rest."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    mixed = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    x = torch.randn(rows, inputs, generator=generator) @ (mixed + 0.5 * torch.eye(inputs))
    x[:, ::17] *= 6
    return weight, x


def twin(weight, hessian, scales, zeros, group, levels, act_order, damping):
    """Codes by the steps of section 3 of the paper, one input after the other, in float64.

    `scales(g, weights)` gives the scale and zero of group g when it is reached.
    """
    w, h = weight.double().clone(), hessian.double().clone()
    inputs = w.size(1)
    h += damping * h.diagonal().mean() * torch.eye(inputs)
    order = list(range(inputs))
    if act_order:
        order = sorted(order, key=lambda j: -float(hessian[j, j]))
    codes = torch.zeros(w.shape, dtype=torch.int64)
    nearness = torch.full(w.shape, torch.inf, dtype=torch.float64)
    table = torch.tensor(levels, dtype=torch.float64)
    left = list(order)
    for j in order:
        inverse = torch.linalg.inv(h[left][:, left])
        scale, zero = scales(j // group, w), zeros(j // group, w)
        units = w[:, j] / scale + zero
        distances = (units[:, None] - table).abs()
        two = distances.topk(2, largest=False)
        codes[:, j], nearness[:, j] = two.indices[:, 0], two.values[:, 1] - two.values[:, 0]
        error = w[:, j] - scale * (table[codes[:, j]] - zero)
        at = left.index(j)
        w[:, left] -= error[:, None] * inverse[at] / inverse[at, at]
        left.remove(j)
    return codes, nearness


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_codes_are_those_of_the_paper(fields, act_order):
    weight, x = problem()
    args = QuantizeArgs(**fields)
    format, hessian = requested(args, torch.float32), x.T @ x
    parts = gptq(weight, hessian, format, act_order=act_order)
    levels = format.levels or tuple(range(-128, 128))

    def part(name):
        return lambda g, _: parts[name][:, g].double() if name in parts else 0.0

    group = format.group or weight.size(1)
    expected, nearness = twin(
        weight, hessian, part("scales"), part("zeros"), group, levels, act_order, 0.01
    )
    codes = unpack(parts["codes"]) if format.levels else parts["codes"].int() + 128
    values = torch.tensor(levels)  # fp4 has two codes for 0
    # A code that differs moves all later weights of its row, so rows are compared up to there.
    compared = 0
    for row, (found, wanted, near) in enumerate(zip(codes.int(), expected, nearness, strict=True)):
        differs = (values[found] != values[wanted]).nonzero().flatten().tolist()
        assert not differs or float(near[differs].min()) < 1e-2, f"row {row}"
        compared += not differs
    assert compared >= len(weight) - 2, "near-ties are rare"


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)
def test_outputs_change_less_than_by_rounding(fields, act_order):
    weight, x = problem()
    format = requested(QuantizeArgs(**fields), torch.float32)
    exact = x @ weight.T

    def error(parts):
        return float((x @ dequantize(parts, format).T - exact).norm() / exact.norm())

    found = error(gptq(weight, x.T @ x, format, act_order))
    rounded = error(quantize(weight, format, fitted_parts))
    assert found < 0.75 * rounded


def test_scales_of_a_group_are_chosen_when_it_is_reached():
    """Without act_order: from weights that have the errors of earlier groups."""
    weight, x = problem()
    format = requested(QuantizeArgs(**INT4), torch.float32)
    before = gptq(weight, x.T @ x, format, act_order=False)
    changed = weight.clone()
    changed[:, :32] += 0.01
    after = gptq(changed, x.T @ x, format, act_order=False)
    assert not torch.equal(before["scales"][:, 1:], after["scales"][:, 1:])
    fixed = [gptq(one, x.T @ x, format, act_order=True)["scales"] for one in (weight, changed)]
    assert torch.equal(fixed[0][:, 1:], fixed[1][:, 1:])


def test_inputs_that_are_always_zero_are_rounded():
    weight, x = problem()
    x[:, 40:44] = 0
    format = requested(QuantizeArgs(**INT4), torch.float32)
    parts = gptq(weight, x.T @ x, format)
    made = dequantize(parts, format)[:, 40:44]
    scales = parts["scales"][:, 1].abs()[:, None]
    inside = weight[:, 40:44].abs() < 7 * scales
    assert float(((made - weight[:, 40:44]).abs() / scales)[inside].max()) <= 0.5 + 1e-4


def test_fewer_rows_than_inputs_are_enough_with_damping():
    weight, x = problem(rows=20)
    format = requested(QuantizeArgs(**INT4), torch.float32)
    parts = gptq(weight, x.T @ x, format, damping=1e-6)
    exact = x @ weight.T
    assert float((x @ dequantize(parts, format).T - exact).norm() / exact.norm()) < 0.02


def test_a_group_of_zeros_stays_zero():
    weight, x = problem()
    weight[3, 32:64] = 0
    for act_order in (True, False):
        format = requested(QuantizeArgs(**INT4), torch.float32)
        made = dequantize(gptq(weight, x.T @ x, format, act_order), format)
        assert bool(made.isfinite().all())
        assert not act_order or not made[3, 32:64].any()


@pytest.mark.parametrize("kind", ["int4", "nf4", "fp4"])
def test_fitted_scales_have_smaller_errors(kind):
    weight, _ = problem()
    args = QuantizeArgs(kind=kind, group=32)
    format = requested(args, torch.float32)
    errors = [
        float((dequantize(quantize(weight, format, fit), format) - weight).norm())
        for fit in (None, fitted_parts)
    ]
    assert errors[1] < 0.97 * errors[0]


def hessians_by_hand(model, batches, path):
    """The sum of x x^T over one call with all rows."""
    seen = []
    leaf = model.get_submodule(path)
    hook = leaf.register_forward_pre_hook(lambda _, given: seen.append(given))
    for batch in batches:
        model(TransformerInput(batch))
    hook.remove()
    return seen


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"moe_args": MOE}, {"mla_args": MLA}], ids=str)
def test_statistics_are_those_of_the_inputs_of_each_leaf(changes):
    model = base(**changes)
    leaves = {
        path: leaf
        for path, leaf in model.named_modules()
        if path.startswith("layers.") and hasattr(leaf, "weight") and leaf.weight.ndim > 1
        if "router" not in path
    }
    found = {}
    for *_, sums in block_inputs(model, BATCHES, leaves):
        found |= sums
    for path in found:
        expected = 0.0
        for x, *ends in hessians_by_hand(model, BATCHES, path):
            rows = x.flatten(0, -2).double()
            bounds = [0, *ends[0].tolist()] if ends else [0, len(rows)]
            parts = [rows[a:b] for a, b in itertools.pairwise(bounds)]
            expected = expected + torch.stack([part.T @ part for part in parts])
        assert torch.allclose(found[path].hessians.double(), expected, rtol=1e-4, atol=1e-4)
    assert set(found) == set(leaves) or "mla_args" in changes


@pytest.mark.parametrize("changes", [{}, {"moe_args": MOE}, {"tie_embeddings": True}], ids=str)
def test_later_blocks_see_the_quantized_ones_before(changes):
    """The inputs of the last block are those of the model that results."""
    model = base(**changes)
    seen = {}
    args = QuantizeArgs(**INT4, method="gptq", embeddings=True, skip=())
    made = quantize_model(model, args, BATCHES)
    wq = made.layers[-1].attention.wq
    again = copy.deepcopy(made)
    leaves = {"layers.1.attention.wq": again.layers[1].attention.wq}
    for *_, sums in block_inputs(again, BATCHES, leaves):
        seen |= sums
    dense = base(**changes).layers[1].attention.wq.weight.detach()
    expected = gptq(dense, seen["layers.1.attention.wq"].hessians[0], wq.format)
    assert float((expected["codes"] != wq.codes).float().mean()) < 0.02
    assert torch.allclose(expected["scales"], wq.scales, rtol=1e-3)
    assert "tok_embeddings" in quantized_leaves(made)
    assert mean_bits(made) == 5.0


def test_experts_without_tokens_are_rounded_and_counted(capsys):
    moe = {**MOE, "num_experts": 4, "top_k": 1, "router_bias": True}
    model = base(moe_args=moe)
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.router.bias[2] = -1e4
    dense = model.layers[0].feed_forward.experts.w_value.weight[2].detach().clone()
    quantize_model(model, QuantizeArgs(**INT4, method="gptq"), BATCHES)
    assert (
        "gptq: 6 matrices that multiply nothing of the text are rounded" in capsys.readouterr().err
    )
    leaf = model.layers[0].feed_forward.experts.w_value
    expected = quantize(dense, leaf.format, fitted_parts)
    assert torch.equal(leaf.codes[2], expected["codes"])
    assert bool(logits(model).isfinite().all())


@torch.no_grad()
@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_half_precision_inputs_do_not_overflow(dtype, method):
    """The squares of these inputs exceed the largest number of float16."""
    model = base(n_layers=1).to(dtype)
    model.layers[0].attention_norm.weight.mul_(300)
    model.layers[0].attention.wq.weight.div_(300)
    model.layers[0].attention.wk.weight.div_(300)
    model.layers[0].attention.wv.weight.div_(300)
    before = logits(model).float()
    quantize_model(model, QuantizeArgs(**INT4, method=method), BATCHES)
    assert model.layers[0].attention.wq.scales.dtype == dtype
    assert float((logits(model).float() - before).norm() / before.norm()) < 0.4


def with_nan(model):
    with torch.no_grad():
        model.layers[1].attention_norm.weight[3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (None, "batches: got 0 tokens of calibration text; expected at least 64, as many as"),
        ([], "batches: got 0 tokens"),
        ([random_tokens(1, 40)], "batches: got 40 tokens of calibration text; expected at least"),
        ([random_tokens(1, 400)], "tokens: got 400; expected at most max_seq_len"),
        ([random_tokens(1, 99), torch.full((1, 9), -1)], r"batches: got \[-1, 59\]; .* 0 to 60"),
        ([torch.full((1, 99), 61)], r"batches: got \[61, 61\]; expected ids from 0 to 60"),
        ([random_tokens(1, 99)[0]], r"tokens: got \[99\]; expected a shape"),
    ],
)
def test_wrong_texts_are_one_sentence_and_change_nothing(batches, words):
    model = base()
    with pytest.raises(RequestError, match=words):
        quantize_model(model, QuantizeArgs(**INT4, method="gptq"), batches)
    assert not quantized_leaves(model)


def test_inputs_that_are_not_finite_are_an_error_that_names_the_leaf():
    with pytest.raises(WorkError, match=r"layers\.1\.attention\.wq: got NaN or infinite inputs"):
        quantize_model(with_nan(base()), QuantizeArgs(**INT4, method="gptq"), BATCHES)


def test_text_that_a_method_does_not_read_is_refused():
    with pytest.raises(RequestError, match="batches: got some; expected none"):
        quantize_model(base(), QuantizeArgs(**INT4), BATCHES)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"double_quant": True, "method": "gptq"}, "double_quant"),
        ({"method": "gptq", "fit_scales": True}, "fit_scales"),
        ({"kind": "fp4", "zero_points": True}, "zero_points"),
        ({"method": "awq", "fit_scales": True}, "fit_scales"),
        ({"method": "gptq", "damping": 0.0}, "damping"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, words):
    with pytest.raises(RequestError, match=words):
        QuantizeArgs(**fields)
