"""Quantized leaves against the dense model they stand for: numbers, gradients, memory, names,
files.
"""

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tests.checkpoints.adapters.twins import far
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.layers.linear import Embedding, GroupedLinear, Linear
from transom.layers.moe import Router
from transom.models.llm import LLM
from transom.quantize import ggml, methods
from transom.quantize import leaves as surgery
from transom.quantize.args import QuantizeArgs
from transom.quantize.formats import Parts, empty_parts, quantize, requested
from transom.quantize.leaves import (
    Quantized,
    dense_names,
    dequantize_model,
    parameter_count,
    quantized_leaves,
    replace_weight,
)
from transom.quantize.methods import quantize_model
from transom.training.loop.blocks import arrange_blocks

NF4, DOUBLE = QuantizeArgs(group=32), QuantizeArgs(group=32, double_quant=True)
INT4, ZEROS = (
    QuantizeArgs(kind="int4", group=32),
    QuantizeArgs(kind="int4", group=32, zero_points=True),
)
INT8 = QuantizeArgs(kind="int8", group=0)
FORMATS = {
    "nf4": NF4,
    "nf4, double": DOUBLE,
    "int4": INT4,
    "int4, zeros": ZEROS,
    "int8": INT8,
    "fp8": QuantizeArgs(kind="fp8", group=0),
}
MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "shared_expert": True, "expert_bias": True}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
MODELS = {
    "dense": {},
    "biases": {"qkv_bias": True},
    "moe": {"moe_args": MOE},
    "latent": {"mla_args": MLA},
}
TOKENS = random_tokens(2, 9)


def base(**changes) -> LLM:
    fields = {"n_kv_heads": 4} if "mla_args" in changes else {}
    return random_model(tiny_args(hidden_dim=64, **fields, **changes))


def logits(model: LLM) -> torch.Tensor:
    return model(TransformerInput(TOKENS)).logits


def quantize_leaf(leaf: Linear | GroupedLinear, args: QuantizeArgs) -> None:
    format = requested(args, leaf.weight.dtype)
    replace_weight(leaf, quantize(leaf.weight, format), format)


def linear(args: QuantizeArgs = NF4, dtype=torch.float32, bias=True) -> tuple[Linear, Linear]:
    """A quantized leaf [40, 64] and its dense twin, both with a bias that trains."""
    leaf, generator = Linear(64, 40, bias=bias).to(dtype), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in leaf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    quantize_leaf(leaf, args)
    return leaf, dequantize_model(copy.deepcopy(leaf))


def grouped(bias=True) -> tuple[GroupedLinear, GroupedLinear]:
    """The same of four experts."""
    leaf, generator = GroupedLinear(4, 32, 16, bias=bias), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in leaf.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    quantize_leaf(leaf, NF4)
    return leaf, dequantize_model(copy.deepcopy(leaf))


def saved_by(run) -> list[torch.Tensor]:
    """What `run` keeps for backward, each storage once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return list(kept.values())


@pytest.mark.parametrize("args", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_a_quantized_model_computes_what_its_dense_twin_does(changes, args):
    model = base(**changes)
    modules, before = dict(model.named_modules()), logits(model)
    assert quantize_model(model, args) is model
    assert {name: id(module) for name, module in model.named_modules()} == {
        n: id(m) for n, m in modules.items()
    }
    found = logits(model)
    assert far(found, before) > 1e-4, "fewer bits change something"
    twin = dequantize_model(copy.deepcopy(model))
    assert set(dense_names(model)) == set(twin.state_dict())
    assert not quantized_leaves(twin) and far(logits(twin), found) < 1e-5
    assert set(twin.state_dict()) == set(base(**changes).state_dict())


def test_which_leaves_are_quantized_and_that_it_is_said(capsys):
    model = quantize_model(base(moe_args=MOE), NF4)
    assert all(name.startswith("layers.") for name in quantized_leaves(model))
    assert not any(isinstance(m, Quantized) for m in model.modules() if isinstance(m, Router))
    assert type(model.output) is Linear and model.tok_embeddings.weight.requires_grad
    held = sum(leaf.dequantize().numel() for leaf in quantized_leaves(model).values())
    total = sum(p.numel() for p in base(moe_args=MOE).parameters())
    said = f"nf4 in groups of 32 on 20 leaves: {held:,} of {total:,} weights in 5.00 bits each"
    assert said in capsys.readouterr().err
    assert parameter_count(model) == total
    assert sum(leaf.count for leaf in quantized_leaves(model).values()) == held + sum(
        p.numel()
        for name, p in model.named_parameters()
        if ".experts." in name and name.endswith("bias")
    )


@pytest.mark.parametrize(
    ("skip", "dense"),
    [
        (("attention",), {"wq", "wk", "wv", "wo"}),
        (("layers.0", "w_out"), {"wq", "wk", "wv", "wo", "w_gate", "w_value", "w_out"}),
        ((), set()),
    ],
)
def test_modules_can_be_skipped(skip, dense):
    model = quantize_model(base(), QuantizeArgs(group=32, skip=skip))
    kept = {name for name, module in model.named_modules() if type(module) is Linear}
    assert {name.rpartition(".")[2] for name in kept} == dense
    assert ("output" in quantized_leaves(model)) == (not skip or "output" not in kept)


@pytest.mark.parametrize("args", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_outputs_and_gradients_are_those_of_the_dense_leaf(args, dtype):
    leaf, twin = linear(args, dtype)
    assert leaf.weight.dtype == twin.weight.dtype == dtype
    found = []
    for one in (leaf, twin):
        x = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 64).to(dtype).requires_grad_()
        y = one(x)
        y.square().sum().backward()
        found.append((y, x.grad, one.bias.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_autocast_does_what_it_does_to_dense_leaves(kind):
    leaf, twin = linear() if kind == "linear" else grouped()
    found = []
    for one in (leaf, twin):
        x = torch.linspace(-1, 1, 6 * (64 if kind == "linear" else 32)).view(6, -1).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = one(x) if kind == "linear" else one(x, torch.tensor([1, 1, 4, 6]))
        y.float().square().sum().backward()
        found.append((y, x.grad))
    (y, of_x), (plain, of_plain) = found
    assert y.dtype == plain.dtype == torch.bfloat16 and torch.equal(y, plain)
    assert of_x.dtype == torch.float32 and torch.allclose(of_x, of_plain, rtol=0.02, atol=0.02)


def test_experts_agree_with_the_loop_over_dense_ones(monkeypatch):
    """An expert without rows, and rows that belong to none."""
    leaf, twin = grouped()
    ends, shapes = torch.tensor([2, 2, 5, 6]), []
    real = surgery.dequantize

    def recorded(parts, format, rows):
        shapes.append(tuple(parts["codes"].shape))
        return real(parts, format, rows)

    monkeypatch.setattr(surgery, "dequantize", recorded)
    found = []
    for call in (leaf, twin.loop):
        x = torch.linspace(-1, 1, 8 * 32).view(8, 32).requires_grad_()
        y = call(x, ends)
        y[:6].square().sum().backward()
        found.append((y[:6], x.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))
    assert torch.allclose(leaf.bias.grad, twin.bias.grad, atol=1e-5)
    assert shapes == [(16, 16)] * 6, "three experts, forward and backward, one at a time"
    empty = leaf(torch.ones(3, 32), torch.tensor([0, 0, 0, 0]))
    assert empty.shape == (3, 16) and not empty.any()


@pytest.mark.parametrize("kind", ["linear", "grouped"])
def test_only_codes_wait_for_backward(kind):
    leaf, twin = linear() if kind == "linear" else grouped()
    x = torch.ones(6, 64 if kind == "linear" else 32, requires_grad=True)
    inputs = (x,) if kind == "linear" else (x, torch.tensor([1, 1, 4, 6]))
    own = {part.untyped_storage().data_ptr() for part in leaf.parameters()}
    kept = saved_by(lambda: leaf(*inputs))
    floats = [tensor for tensor in kept if tensor.is_floating_point()]
    assert any(tensor.dtype is torch.uint8 for tensor in kept)
    assert all(tensor.untyped_storage().data_ptr() in own for tensor in floats)
    assert sum(t.untyped_storage().nbytes() for t in kept if t.ndim > 1) < 0.25 * twin.weight.nbytes


def test_one_leaf_is_dense_beside_the_model_at_a_time(monkeypatch):
    model = base()
    weights, alive = [weakref.ref(m.weight) for m in model.modules() if isinstance(m, Linear)], []
    real = methods.quantize

    def counted(weight, format, fit):
        alive.append(sum(ref() is not None for ref in weights))
        return real(weight, format, fit)

    monkeypatch.setattr(methods, "quantize", counted)
    quantize_model(model, NF4)
    assert alive == list(range(len(weights), 1, -1)), "the output stays"


@pytest.mark.parametrize("args", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("on_meta", [True, False])
def test_a_state_dict_fills_a_model_of_shapes(tmp_path, args, on_meta):
    model = quantize_model(base(moe_args=MOE), args)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    if on_meta:
        with torch.device("meta"):
            other = quantize_model(LLM(model.args), args)
        other.load_state_dict(state, assign=True)
    else:
        other = quantize_model(random_model(model.args, seed=5), args)
        other.load_state_dict(state)
    assert torch.equal(logits(other), logits(model))
    assert not any(
        p.requires_grad for leaf in quantized_leaves(other).values() for p in leaf.parts.values()
    )
    state.pop("layers.1.attention.wk.scales")
    with pytest.raises(RuntimeError, match=r"Missing key.*layers\.1\.attention\.wk\.scales"):
        other.load_state_dict(state)


def test_shapes_are_enough_for_a_forward_on_meta():
    with torch.device("meta"):
        model = quantize_model(LLM(tiny_args(hidden_dim=64, moe_args=MOE)), DOUBLE)
        assert model(TransformerInput(TOKENS.to("meta"))).logits.shape == (2, 9, 61)


def test_casting_the_model_casts_its_weights():
    model = quantize_model(base(), NF4)
    exact, half = logits(model), model.bfloat16()
    leaf = half.layers[0].attention.wq
    assert leaf.weight.dtype == torch.bfloat16 and leaf.codes.dtype == torch.uint8
    assert (logits(half).float() - exact).std() < 0.05 * exact.std()


@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_checkpointing_gives_the_same_gradients(changes, how):
    def gradients(choice):
        model = quantize_model(base(**changes), NF4).train()
        arrange_blocks(model, checkpointing=choice)
        logits(model).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, found = gradients("none"), gradients(how)
    assert list(found) == list(expected) and "tok_embeddings.weight" in found
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_compiled_blocks_agree():
    model = quantize_model(base(), NF4)
    block, x = model.layers[0].feed_forward, torch.randn(1, 4, 32, requires_grad=True)
    y = torch.compile(block, backend="eager", fullgraph=True)(x)
    assert far(y, block(x)) < 1e-6
    (found,), (expected,) = (torch.autograd.grad(out.square().sum(), x) for out in (y, block(x)))
    assert far(found, expected) < 1e-5


def test_a_second_derivative_is_right():
    leaf, _ = linear(dtype=torch.float64)
    x = torch.linspace(-1, 1, 2 * 64, dtype=torch.float64).view(2, 64).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: F.silu(leaf(x)), (x,))


def nan_in(model: LLM) -> LLM:
    with torch.no_grad():
        model.layers[1].attention.wv.weight[3, 5] = torch.inf
    return model


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda m: quantize_model(m, QuantizeArgs(group=64)),
            r"group: got 64.*layers\.0\.attention\.wq.*expected 32, or to skip 'wq'",
        ),
        (
            lambda m: quantize_model(random_model(tiny_args()), NF4),
            r"group: got 32.*layers\.0\.feed_forward\.w_out.*expected to skip 'w_out'",
        ),
        (
            lambda m: quantize_model(m, QuantizeArgs(skip=("atention",))),
            "skip: got 'atention'.*'attention'",
        ),
        (lambda m: quantize_model(m, QuantizeArgs(skip=("layers", "output"))), "at least one leaf"),
        (lambda m: quantize_model(quantize_model(m, NF4), INT4), "model: got a quantized one"),
        (
            lambda m: quantize_model(nan_in(m), NF4),
            r"layers\.1\.attention\.wv\.weight: got NaN",
        ),
        (dequantize_model, "model: got no quantized leaf"),
    ],
)
def test_wrong_requests_are_one_sentence_and_change_nothing(act, words):
    model = base()
    names = list(model.state_dict())
    with pytest.raises(RequestError, match=words) as error:
        act(model)
    assert "\n" not in str(error.value)
    assert quantized_leaves(model) or list(model.state_dict()) == names


def from_file(leaf: torch.nn.Module, name: str) -> Parts:
    """Replace a leaf's weight by parts as a file of ggml has them; return them."""
    parts = ggml.parts(name, ggml.quantize(name, leaf.weight.detach()))
    replace_weight(leaf, parts, ggml.format_of(name))
    return parts


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embeddings_can_be_quantized_and_be_the_output(monkeypatch, name, tied, dtype):
    model, computed = base(tie_embeddings=tied).to(dtype), []
    from_file(model.tok_embeddings, name)
    twin = dequantize_model(copy.deepcopy(model))
    assert type(twin.tok_embeddings) is Embedding and model.dtype == dtype == twin.dtype
    real = surgery.dequantize

    def recorded(*given):
        computed.append(real(*given))
        return computed[-1]

    monkeypatch.setattr(surgery, "dequantize", recorded)
    rows = model.tok_embeddings(TOKENS)
    assert torch.equal(rows, twin.tok_embeddings(TOKENS)) and rows.dtype == dtype
    assert [made.shape for made in computed] == [(TOKENS.numel(), 32)], "no other rows"
    assert torch.equal(logits(model), logits(twin))
    with pytest.raises(IndexError):
        model.tok_embeddings(torch.tensor([[61]]))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])
def test_a_cast_changes_the_dtype_of_the_weight_and_no_part(name):
    leaf, _ = linear()
    leaf = dequantize_model(leaf)
    parts = from_file(leaf, name)
    exact = leaf.weight
    leaf.bfloat16()
    assert all(torch.equal(leaf.parts[key], part) for key, part in parts.items())
    assert leaf.bias.dtype == torch.bfloat16 and torch.equal(leaf.weight, exact.bfloat16())
    assert torch.equal(leaf.double().weight, exact.double())
    assert leaf.to("meta").weight.is_meta and not leaf.codes.requires_grad


def test_products_are_computed_a_block_of_rows_at_a_time(monkeypatch):
    leaf, twin = linear(DOUBLE)
    monkeypatch.setattr(surgery, "CPU_BLOCK", 64 * 7)
    shapes, real = [], surgery.dequantize

    def recorded(*given):
        made = real(*given)
        shapes.append(tuple(made.shape))
        return made

    monkeypatch.setattr(surgery, "dequantize", recorded)
    found = []
    for one in (leaf, twin):
        x = torch.linspace(-1, 1, 2 * 64).view(2, 64).requires_grad_()
        y = one(x)
        y.square().sum().backward()
        found.append((y, x.grad, one.bias.grad))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(*found, strict=True))
    assert shapes == 2 * [*5 * [(7, 64)], (5, 64)], "forward and backward"


def test_gradients_of_many_blocks_are_summed_in_float32(monkeypatch):
    leaf = Linear(64, 1024)
    torch.nn.init.normal_(leaf.weight, generator=torch.Generator().manual_seed(0))
    quantize_leaf(leaf, NF4)
    twin = dequantize_model(copy.deepcopy(leaf)).bfloat16()
    monkeypatch.setattr(surgery, "CPU_BLOCK", 256)
    gradient = torch.randn(4, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = []
    for one in (leaf.bfloat16(), twin):
        x = torch.ones(4, 64, dtype=torch.bfloat16, requires_grad=True)
        one(x).backward(gradient)
        found.append(x.grad.float())
    # Both are rounded once, so they may be one step of bfloat16 apart: 2 ** -7 of the number.
    assert far(found[0], found[1]) <= 2**-7 * float(found[1].abs().max())


def test_parts_of_a_file_fill_a_model_of_shapes():
    """As a reader does it: leaves of different formats, one weight dtype, real parts by name."""
    model = base(tie_embeddings=True, moe_args=MOE)
    types = {"tok_embeddings": "Q8_0", "layers.1.feed_forward.experts.w_out": "Q4_0"}
    types["layers.0.attention.wq"] = "Q4_1"
    for path, name in types.items():
        from_file(model.get_submodule(path), name)
    with torch.device("meta"):
        other = LLM(model.args)
    for path, name in types.items():
        leaf, format = other.get_submodule(path), ggml.format_of(name)
        replace_weight(leaf, empty_parts(leaf.weight.shape, format, "meta"), format, torch.bfloat16)
    other.load_state_dict(model.state_dict(), assign=True)
    assert other.dtype == torch.bfloat16 and set(quantized_leaves(other)) == set(types)
    assert torch.equal(logits(other.float()), logits(model))
