"""Parts in tiles compute, move and are saved as those in rows."""

from copy import deepcopy

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.checkpoints.save import save
from transom.inference.loop import generate
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves, tile_weights
from transom.quantize.methods import quantize_model

MOE = {"num_experts": 3, "top_k": 2, "hidden_dim": 64}


@pytest.fixture(params=["int4", "int8", "nf4", "fp8"])
def models(request):
    """Return a model whose weights are in tiles, and the same one with rows."""
    args = tiny_args(dim=64, hidden_dim=96, moe_args=MOE)
    model = random_model(args)
    zeros = request.param in ("int4", "int8")
    quantize_model(model, QuantizeArgs(kind=request.param, group=32, zero_points=zeros))
    other = deepcopy(model)
    tile_weights(model)
    if not any("tiles" in leaf.part_names for leaf in quantized_leaves(model).values()):
        pytest.skip("this CPU does not multiply tiles")
    return model, other


def test_generation_brings_weights_into_tiles(models):
    _, model = models
    generate(model, [[1, 2, 3]], max_new_tokens=2)
    assert all("tiles" in leaf.part_names for leaf in quantized_leaves(model).values())


def test_saved_folders_have_rows(models, tmp_path):
    for model, name in zip(models, ("tiles", "rows"), strict=True):
        save(model, tmp_path / name, "hf")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("tiles", "rows")]
    assert files[0] == files[1]


def test_a_cast_brings_rows_back(models):
    model, other = (one.to(torch.bfloat16) for one in models)
    state = other.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(part, state[name]) for name, part in model.state_dict().items())


def test_gradients_pass_through_tiles_that_generation_has_made(models):
    generate(models[0].to(torch.float32), [[1, 2, 3]], max_new_tokens=2)
    assert any("tiles" in leaf.part_names for leaf in quantized_leaves(models[0]).values())
    gradients = []
    for model in models:
        leaf = model.layers[0].attention.wq
        x = torch.linspace(-1, 1, 3 * 64).view(3, 64).requires_grad_()
        leaf(x).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)
