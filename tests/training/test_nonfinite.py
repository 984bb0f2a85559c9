"""What went first, when numbers stop being numbers, is named."""

import pytest
import torch

from tests.helpers import random_model, random_tokens, tiny_args
from tests.training.runs import tiny_args as tiny_run
from transom.base.errors import WorkError
from transom.layers.inputs import TransformerInput
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model
from transom.training.loop.nonfinite import locate_nonfinite
from transom.training.loop.setup import open_run

ROWS = [TransformerInput(random_tokens(2, 8))]


def test_a_weight_that_is_no_number():
    model = random_model(tiny_args())
    with torch.no_grad():
        model.layers[1].feed_forward.w_out.weight[0, 0] = float("nan")
    assert "weight layers.1.feed_forward.w_out.weight is not finite" in locate_nonfinite(
        model, ROWS
    )


@pytest.mark.parametrize("kind", ["nf4", "fp8"])
def test_a_layer_whose_output_overflows(kind):
    model = random_model(tiny_args())
    quantize_model(model, QuantizeArgs(kind=kind, group=0, skip=("wo",)))
    with torch.no_grad():
        model.layers[1].attention.wo.weight.fill_(3e38)
    assert "the output of layers.1.attention.wo is the first" in locate_nonfinite(model, ROWS)


def test_of_gradients_the_one_nearest_to_the_loss():
    model = random_model(tiny_args())
    for name, weight in model.named_parameters():
        weight.grad = torch.zeros_like(weight)
        if "layers." in name or name.startswith("tok"):
            weight.grad.fill_(float("inf"))
    assert "the gradient of layers.1." in locate_nonfinite(model, ROWS)


def test_a_run_says_step_and_place_and_keeps_its_last_checkpoint(tmp_path):
    trainer = open_run(tiny_run(tmp_path, "dry_run=false", "save_every=1"), quiet=True)
    before = trainer.step()
    assert before.loss > 0
    trainer.save(None)
    with torch.no_grad():
        trainer.model.layers[0].attention.wo.weight[0, 0] = float("inf")
    with pytest.raises(
        WorkError, match=r"step 2: the loss is nan; the weight layers\.0\.attention\.wo"
    ):
        trainer.step()
    assert (tmp_path / "run" / "latest").read_text().strip() == "step_000001"
