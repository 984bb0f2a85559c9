"""Products that compiled graphs use on a GPU: equal to the dense weight, and traced as one graph."""

import pytest
import torch
import torch.nn.functional as F

from tests.quantize.test_leaves import FORMATS
from transom.layers.linear import Linear
from transom.quantize import ggml, traced
from transom.quantize.formats import dequantize, quantize, requested
from transom.quantize.leaves import replace_weight


def made(name):
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    format = requested(FORMATS[name], torch.float32)
    return quantize(weight, format), format


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 64)])
def test_equals_the_dense_product(name, shape):
    parts, format = made(name)
    x, bias = torch.randn(shape), torch.randn(24)
    expected = F.linear(x, dequantize(parts, format), bias)
    torch.testing.assert_close(traced.product(x, bias, parts, format), expected)


def test_minimums_of_ggml():
    blocks = ggml.quantize("Q4_1", torch.randn(16, 64))
    parts, format = ggml.parts("Q4_1", blocks), ggml.format_of("Q4_1")
    x = torch.randn(3, 64)
    expected = F.linear(x, dequantize(parts, format))
    torch.testing.assert_close(traced.product(x, None, parts, format), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_is_one_graph_of_which_tables_are_constants(name, monkeypatch):
    torch._dynamo.reset()
    parts, format = made(name)
    leaf = Linear(64, 24)
    replace_weight(leaf, parts, format)
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(traced, "takes", lambda x: torch.compiler.is_compiling())
    x = torch.randn(1, 1, 64)
    with torch.inference_mode():
        expected = leaf(x)
        got = torch.compile(leaf, backend=counting, fullgraph=True)(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    assert "torch.tensor" not in graph.code
