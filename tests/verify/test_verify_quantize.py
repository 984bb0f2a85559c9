"""The twins of quantized weights: words by hand, values of bitsandbytes, optimal codes."""

import itertools

import pytest
import torch

from tests.checkpoints.adapters.folders import write_base
from transom.base.errors import RequestError
from transom.quantize.formats import FP4, NF4
from transom.verify import codes
from transom.verify.checks import run
from transom.verify.codes import Grid


def test_words_of_a_gptq_folder_are_read_as_by_hand():
    stored = {
        "qweight": torch.tensor([[0x76543210, 0x0000000F]], dtype=torch.int32),
        "qzeros": torch.tensor([[0x00000017], [0x00000002]], dtype=torch.int32),
        "scales": torch.tensor([[0.5, 2.0], [1.0, 4.0]]),
        "g_idx": torch.tensor([0, 0, 1, 1, 0, 0, 1, 1], dtype=torch.int32),
    }
    # Of output 0, group 0 has scale 0.5 and zero 7 + 1, group 1 scale 1 and zero 2 + 1.
    first = [-4.0, -3.5, -1.0, 0.0, -2.0, -1.5, 3.0, 4.0]
    # Of output 1, group 0 has scale 2 and zero 1 + 1, group 1 scale 4 and zero 0 + 1.
    second = [26.0, -4.0, -4.0, -4.0, -4.0, -4.0, -4.0, -4.0]
    assert codes.unpacked(stored, less_one=True).tolist() == [first, second]
    assert codes.unpacked(stored, less_one=False)[0, 0] == 0.5 * (0 - 7)


@pytest.mark.parametrize(("kind", "table"), [("nf4", NF4), ("fp4", FP4)])
def test_values_by_formula_are_those_of_bitsandbytes(kind, table):
    assert torch.allclose(codes.levels(kind), torch.tensor(table, dtype=torch.float64), atol=1e-7)


def test_elimination_loses_less_than_rounding_and_no_less_than_the_best_codes():
    draws = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 4, generator=draws).double()
    inputs = torch.randn(50, 4, generator=draws) @ torch.randn(4, 4, generator=draws)
    hessian = (inputs.T @ inputs).double()
    grid = Grid.of(weight, "int4", 4, False)

    def losses(found):
        change = found - weight
        return ((change @ hessian) * change).sum(1)

    made = losses(codes.eliminated(weight, hessian, grid, True, 1e-6))
    values = torch.stack([grid.values(i) for i in range(4)], 1)  # [out, in, 16]
    near = (values - weight[:, :, None]).abs().argsort(2)[:, :, :4]
    choices = itertools.product(range(4), repeat=4)
    some = [near[:, range(4), choice] for choice in choices]
    best = torch.stack([losses(values.gather(2, one[:, :, None])[:, :, 0]) for one in some]).amin(0)
    assert bool((best <= made + 1e-12).all())
    assert float(made.sum()) < 0.8 * float(losses(grid.rounded(weight)).sum())


def test_a_folder_that_is_not_quantized_is_refused(tmp_path):
    base = write_base(tmp_path / "base")
    with pytest.raises(RequestError, match="base: quantization: got 'dense weights'; expected"):
        next(run("quantize", model=str(base)))
