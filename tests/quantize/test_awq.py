"""AWQ: folded scales change no function, and rounding changes less with them."""

import pytest
import torch

from tests.quantize.test_gptq import BATCHES
from tests.quantize.test_leaves import MLA, MOE, base, logits
from transom.layers.linear import GroupedLinear, Linear
from transom.layers.moe import Experts
from transom.quantize import methods
from transom.quantize.args import QuantizeArgs
from transom.quantize.awq import Fold, folds, scale_inputs
from transom.quantize.calibration import block_inputs
from transom.quantize.formats import requested
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

AWQ = QuantizeArgs(kind="int4", group=32, method="awq")
# Changes of the tiny model, and how many leaves of a block are not scaled.
MODELS = {
    "grouped heads": ({}, 0),
    "biases": ({"qkv_bias": True, "ffn_bias": True, "out_bias": True}, 0),
    "1 + weight": ({"norm": "rms_plus_one"}, 0),
    "layer norm": ({"norm": "layer"}, 0),
    "norms after": ({"norm_placement": "post"}, 5),
    "norms of queries": ({"qk_norm": "head"}, 0),
    "no gate": ({"ffn_gated": False}, 1),
    "experts": ({"moe_args": MOE}, 0),
    "scaled inputs of experts": ({"moe_args": {**MOE, "routing": "sigmoid"}}, 0),
    "clamped experts": ({"moe_args": {**MOE, "expert_activation": "clamped"}}, 1),
    "latent": ({"mla_args": MLA}, 1),
    "tied": ({"tie_embeddings": True}, 0),
}


def scaled(model):
    """Fold the scales of every block; return them by the name of the leaf."""
    leaves = {
        path: leaf
        for path, leaf in model.named_modules()
        if path.startswith("layers.") and isinstance(leaf, Linear | GroupedLinear)
    }
    made = {}
    for part, own, found in block_inputs(model, BATCHES, leaves):
        if part is not model:
            sums = {own[path]: one for path, one in found.items()}
            formats = {own[path]: requested(AWQ, torch.float32) for path in found}
            scales = scale_inputs(part, sums, formats)
            made |= {path: scales[leaf] for path, leaf in own.items() if leaf in scales}
    return made, leaves


@torch.no_grad()
@pytest.mark.parametrize(("changes", "unscaled"), MODELS.values(), ids=MODELS)
def test_folded_scales_change_no_function(changes, unscaled):
    model = base(**changes)
    before = logits(model)
    made, leaves = scaled(model)
    assert any(float((scales - 1).abs().max()) > 0.01 for scales in made.values())
    assert float((logits(model) - before).abs().max()) < 2e-5 * float(before.abs().max())
    # wkv_b is not called where absorbing is cheaper, so it may have no sums.
    missing = set(leaves) - set(made)
    missing -= {path for path in missing if path.endswith("wkv_b")}
    assert len(missing) == 2 * unscaled, missing


@torch.no_grad()
def test_a_scale_that_is_not_divided_out_is_noticed(monkeypatch):
    """The test above can fail."""
    model = base()
    before = logits(model)
    monkeypatch.setattr("transom.quantize.awq._divide", lambda producer, scales: None)
    scaled(model)
    assert float((logits(model) - before).abs().max()) > 0.01


def test_queries_of_one_head_share_its_scales():
    fold = Fold(None, (), repeats=2, width=3)
    channels = torch.arange(12.0)[None]  # two heads of the producer, each seen twice
    assert fold.pooled(channels).tolist() == [[1.5, 2.5, 3.5, 7.5, 8.5, 9.5]]
    spread = fold.spread(torch.arange(6.0)[None])
    assert spread.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]]


def test_experts_have_scales_of_their_own():
    made, leaves = scaled(base(moe_args=MOE))
    shapes = {path.split(".", 3)[-1]: tuple(scales.shape) for path, scales in made.items()}
    assert shapes["experts.w_out"] == (4, 32)
    assert shapes["experts.w_value"] == shapes["shared_expert.w_value"] == (1, 32)
    assert any(isinstance(one, Experts) for one in base(moe_args=MOE).modules()) and leaves


@torch.no_grad()
@pytest.mark.parametrize("outputs", [8, 256])
def test_large_inputs_are_rounded_better(outputs, monkeypatch):
    """A few channels of the norms are large, as in real models; few outputs show it as well."""
    monkeypatch.setattr("transom.quantize.awq.OUTPUTS", outputs)
    errors = {}
    for method in ("rtn", "awq"):
        model = base(dim=64, n_layers=1)
        block = model.layers[0]
        for norm in (block.attention_norm, block.ffn_norm):
            norm.weight[::16] *= 12
        before = logits(model)
        args = QuantizeArgs(kind="int4", group=32, method=method, fit_scales=method == "rtn")
        quantize_model(model, args, BATCHES if method == "awq" else None)
        errors[method] = float((logits(model) - before).norm())
    assert errors["awq"] < 0.8 * errors["rtn"]


def test_leaves_that_cannot_be_scaled_are_counted(capsys):
    model = quantize_model(base(norm_placement="post"), AWQ, BATCHES)
    words = "awq: 10 leaves have inputs that no norm or linear can be divided by"
    assert words in capsys.readouterr().err
    assert len(quantized_leaves(model)) == 14


@torch.no_grad()
def test_a_skipped_leaf_is_scaled_with_the_others():
    """It reads the same norm."""
    model = base()
    before = model.layers[0].attention.wk.weight.detach().clone()
    args = QuantizeArgs(kind="int4", group=32, method="awq", skip=("wk", "output"))
    quantize_model(model, args, BATCHES)
    ratio = model.layers[0].attention.wk.weight / before
    assert float(ratio.std(0).max()) < 1e-5 and float(ratio[0].std()) > 0.01


def test_every_leaf_of_a_block_is_in_one_fold():
    for changes, _ in MODELS.values():
        model = base(**changes)
        block = model.layers[0]
        readers = [reader for fold in folds(block) for reader in fold.readers]
        leaves = [m for m in block.modules() if isinstance(m, Linear | GroupedLinear)]
        own = [one for one in leaves if any(one is reader for reader in readers)]
        assert len(set(readers)) == len(readers)
        missing = set(leaves) - set(own)
        assert missing == ({block.attention.wo} if "mla_args" in changes else set())


def test_ranges_are_chosen_by_the_squares_of_scaled_inputs(monkeypatch):
    """They are those of the model after folding."""
    folded, seen = base(n_layers=1), []
    _, leaves = scaled(folded)
    *_, (_, _, rest) = [one for one in block_inputs(folded, BATCHES, leaves) if one[2]]
    expected = [sums.hessians[0].diagonal() / sums.rows[0] for sums in rest.values()]
    real = methods.fitted_parts

    def recorded(groups, format, importance):
        seen.append(importance.flatten())
        return real(groups, format, importance)

    monkeypatch.setattr(methods, "fitted_parts", recorded)
    quantize_model(base(n_layers=1), AWQ, BATCHES)
    assert len(seen) == len(expected) == 7
    assert all(torch.allclose(*pair, rtol=1e-3) for pair in zip(seen, expected, strict=True))
