"""Few rows on the CPU run in C++ where it covers a block, and the numbers are those of PyTorch."""

from dataclasses import replace

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.inference.decode_plan import decode_plan
from transom.inference.loop import generate, stream
from transom.inference.step_times import PARTS, measured_steps, table
from transom.layers.inputs import TransformerInput
from transom.ops import block as ops
from transom.ops.build import SWITCH
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model, quantized_leaves, replace_weight
from transom.quantize.methods import quantize_model

PROMPTS = [[1, 2, 3, 4, 5, 6], [9, 8, 7]]


@pytest.fixture
def runs(monkeypatch):
    """(first layer, layer after the last one) of every run of blocks in C++."""
    found = []
    original = ops.run_blocks

    def run_blocks(x, positions, layers, start, end, *rest):
        found.append((start, end))
        original(x, positions, layers, start, end, *rest)

    monkeypatch.setattr(ops, "run_blocks", run_blocks)
    return found


def test_greedy_tokens_are_those_of_the_modules(runs, monkeypatch):
    model = random_model(tiny_args())
    got = generate(model, PROMPTS, max_new_tokens=20)
    assert runs == [(0, 2)] * 19
    monkeypatch.setenv(SWITCH, "0")
    assert torch.equal(got, generate(model, PROMPTS, max_new_tokens=20))
    assert len(runs) == 19


@pytest.mark.parametrize("kind", ["int4", "fp8", "nf4", "act-order"])
def test_blocks_of_quantized_weights_run_in_cpp(kind, runs, monkeypatch):
    model = random_model(tiny_args(dim=64, hidden_dim=96))
    quantize_model(model, QuantizeArgs(kind="int4" if kind == "act-order" else kind, group=32))
    for leaf in quantized_leaves(model).values() if kind == "act-order" else ():
        order = torch.randperm(leaf.shape[-1], generator=torch.Generator().manual_seed(0))
        form, parts = replace(leaf.format, ordered=True), {**leaf.parts, "order": order.int()}
        replace_weight(dequantize_model(leaf), parts, form)
    got = generate(model, PROMPTS, max_new_tokens=20)
    assert runs == [(0, 2)] * 19
    monkeypatch.setenv(SWITCH, "0")
    assert torch.equal(got, generate(model, PROMPTS, max_new_tokens=20))


def test_a_block_that_cpp_does_not_cover_runs_as_a_module(runs, capsys):
    model = random_model(tiny_args(n_layers=3))
    expected = generate(model, PROMPTS, max_new_tokens=8)
    runs.clear()
    seen = []
    model.layers[1].attention.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(generate(model, PROMPTS, max_new_tokens=8), expected)
    assert runs == [(0, 1), (2, 3)] * 7
    assert len(seen) == 8
    assert capsys.readouterr().err.count("1 of 3 layers run in PyTorch") == 1


@pytest.mark.parametrize("what", ["hook", "weight", "bias"])
def test_a_change_between_two_calls_counts(what):
    model = random_model(tiny_args(out_bias=True)).bfloat16()
    plan, cache = decode_plan(model), model.make_cache(1, 16)
    leaf = model.layers[0].attention.wo

    @torch.inference_mode()
    def logits(runner):
        made = model(TransformerInput(torch.tensor([[5]])), cache, runner=runner).logits
        if runner is plan:
            cache.rollback(1, 1)
        return made

    logits(None)  # the first call of a cache is not one of the plan
    before = logits(plan)
    if what == "hook":
        leaf.register_forward_hook(lambda module, args, y: y + 1)
    else:
        with torch.no_grad():
            getattr(leaf, what).mul_(-2)
    after = logits(plan)
    torch.testing.assert_close(after, logits(None), rtol=0.05, atol=0.05)
    assert not torch.allclose(after, before, rtol=0.05, atol=0.05)


def test_a_stream_keeps_the_numbers_that_cpp_points_to():
    """Memory that is freed in the middle of a stream gets other numbers soon."""
    model = random_model(tiny_args(attn_sinks=True, qk_norm="head"))
    expected = generate(model, PROMPTS[:1], max_new_tokens=8)[0, len(PROMPTS[0]) :].tolist()
    got = []
    for (id,) in stream(model, PROMPTS[:1], max_new_tokens=8):
        got.append(id)
        if len(got) == 2:
            sizes = [x.numel() for x in model.parameters() if x.ndim == 1]
            for x in model.parameters():
                x.data = x.data.clone()
            others = [torch.full((n,), float("nan")) for n in sizes for _ in range(8)]
    assert got == expected and len(others) > 0


def test_a_model_that_was_made_under_inference_mode_generates():
    args = tiny_args(out_bias=True)
    expected = generate(random_model(args).bfloat16(), PROMPTS, max_new_tokens=4)
    with torch.inference_mode():
        model = random_model(args).bfloat16()
    assert torch.equal(generate(model, PROMPTS, max_new_tokens=4), expected)


def test_the_parts_of_a_token_are_measured():
    model = random_model(tiny_args())
    model.layers[1].attention.register_forward_hook(lambda *_: None)
    with measured_steps() as seconds:
        generate(model, PROMPTS, max_new_tokens=4)
    assert set(seconds) == set(PARTS)
    before = dict(seconds)
    generate(model, PROMPTS, max_new_tokens=4)
    assert seconds == before
    *_, last = table(seconds, total=2 * sum(before.values()), tokens=3)
    assert last.startswith("Python and the rest") and last.endswith("50.0%")
