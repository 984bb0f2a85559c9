"""Adapters beside quantized weights: what they would be beside the dense ones, and where training
ends.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tests.checkpoints.adapters.twins import far
from tests.quantize.test_leaves import (
    FORMATS,
    MLA,
    MODELS,
    MOE,
    NF4,
    TOKENS,
    base,
    from_file,
    logits,
)
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import plain_weights
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.merge import merge_adapter, unmerge_adapter
from transom.lora.vocabulary import resize_vocabulary
from transom.models.llm import LLM
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import dequantize_model, quantized_leaves
from transom.quantize.methods import quantize_model
from transom.training.loop.blocks import arrange_blocks

KINDS = {
    "lora": {},
    "rslora": {"scaling": "rslora"},
    "dora": {"dora": True},
    "dropout": {"dropout": 0.5},
    "dora, dropout": {"dora": True, "dropout": 0.5},
}


def qlora(args: QuantizeArgs = NF4, changes=None, **fields) -> LLM:
    """A quantized model with a drawn adapter: B starts at zero."""
    model = quantize_model(base(**(changes or {})), args)
    apply_lora(model, LoraArgs(**{"rank": 3, "alpha": 4.0, **fields}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora." in key:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def gradients(model: LLM) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)  # dropout draws from torch's generator
    logits(model).square().sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert list(a) == list(b)
    return all(
        torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-3 * float(b[name].abs().max()))
        for name in a
    )


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_adapters_learn_what_they_would_beside_the_dense_twin(changes, kind):
    model = qlora(changes=changes, **kind).train()
    twin = dequantize_model(copy.deepcopy(model))
    found, expected = gradients(model), gradients(twin)
    assert set(found) == {name for name, _ in model.named_parameters() if ".lora." in name}
    assert all(parameter.dtype == torch.float32 for parameter in found.values())
    assert close(found, expected)
    assert far(logits(model.eval()), logits(twin.eval())) < 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_adapters_of_quantized_embeddings_learn_what_they_would_beside_the_dense_twin(tied):
    model = base(tie_embeddings=tied)
    from_file(model.tok_embeddings, "Q8_0")
    apply_lora(model, LoraArgs(rank=3, targets=("tok_embeddings", "wq")))
    with torch.no_grad():
        model.tok_embeddings.lora["default"].A.add_(0.1)
    twin = dequantize_model(copy.deepcopy(model))
    assert far(logits(model), logits(twin)) < 1e-4
    assert close(gradients(model), gradients(twin))


def test_a_new_adapter_changes_nothing():
    model = quantize_model(base(moe_args=MOE), NF4)
    before = logits(model)
    apply_lora(model, LoraArgs(rank=2, dora=True))
    assert far(logits(model), before) < 1e-5


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_no_dense_weight_waits_for_backward(kind):
    """By shape: no activation of this model has that of a weight, either way round."""
    seen = []

    def weights_saved_by(model: LLM) -> list[torch.Tensor]:
        seen.clear()
        with saved_tensors_hooks(
            lambda tensor: (seen.append(tensor), tensor)[1], lambda tensor: tensor
        ):
            model.train()(TransformerInput(TOKENS, logits="none"))
        return [
            tensor
            for tensor in seen
            if tensor.is_floating_point() and tuple(tensor.shape) in shapes
        ]

    model = qlora(changes={"qkv_bias": True}, **kind)
    weights = [leaf.weight for leaf in quantized_leaves(model).values()]
    shapes = {tuple(shape) for weight in weights for shape in (weight.shape, weight.mT.shape)}
    assert not weights_saved_by(model) and seen
    assert weights_saved_by(dequantize_model(model)), "so the shapes tell"


@pytest.mark.parametrize("args", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    "changes", [{}, {"moe_args": MOE}, {"mla_args": MLA}], ids=["dense", "moe", "latent"]
)
def test_merged_into_the_dense_model_is_what_ran(changes, args):
    model = qlora(args, changes, dora=True).eval()
    ran = logits(model)
    with pytest.raises(
        RequestError, match=r"is quantized, and its codes cannot hold the sum.*dequantize_model"
    ):
        merge_adapter(model)
    merge_adapter(dequantize_model(model))
    assert far(logits(model), ran) < 1e-4
    unmerge_adapter(model)
    assert far(logits(model), ran) < 1e-4


@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("how", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("changes", [{}, {"moe_args": MOE}], ids=["dense", "moe"])
def test_checkpointing_over_a_frozen_base_gives_the_same_gradients(
    changes, dropout, how, quantized
):
    def found(choice):
        model = qlora(changes=changes, dropout=dropout).train()
        model = model if quantized else dequantize_model(model)
        arrange_blocks(model, checkpointing=choice)
        return gradients(model)

    expected, got = found("none"), found(how)
    assert list(got) == list(expected) and all(".lora." in name for name in got)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_state_dicts_carry_codes_and_adapters(tmp_path):
    model, other = qlora(dora=True), qlora(dora=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert far(logits(other), logits(model)) == 0


@pytest.mark.parametrize(
    "changes", [{}, {"moe_args": MOE}, {"mla_args": MLA}], ids=["dense", "moe", "latent"]
)
def test_adapter_folders_are_those_of_the_dense_model(tmp_path, changes):
    model = qlora(changes=changes)
    save_adapter(model, tmp_path / "quantized")
    save_adapter(dequantize_model(copy.deepcopy(model)), tmp_path / "dense")
    files = [
        (tmp_path / name / "adapter_model.safetensors").read_bytes()
        for name in ("quantized", "dense")
    ]
    assert files[0] == files[1]
    other = load_adapter(quantize_model(base(**changes), NF4), tmp_path / "dense")
    assert far(logits(other), logits(model.eval())) < 1e-5


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (
            lambda: quantize_model(dequantize_model(qlora()), NF4),
            "got a leaf with an adapter",
        ),
        (
            lambda: apply_lora(
                quantize_model(base(), QuantizeArgs(group=32, skip=())),
                LoraArgs(modules_to_save=("output",)),
            ),
            "modules_to_save: got output, which is quantized",
        ),
        (
            lambda: plain_weights(quantize_model(base(), NF4)),
            "is quantized; expected a dense model",
        ),
        (
            lambda: resize_vocabulary(quantize_model(base(), QuantizeArgs(group=32, skip=())), 64),
            "vocabulary: got quantized embeddings or output",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(act, words):
    with pytest.raises(RequestError, match=words) as error:
        act()
    assert "\n" not in str(error.value)


def successors(step: int, rows: int = 8, seed: int = 0) -> torch.Tensor:
    """Rows [rows, 33] that go on by `step` (modulo 59), with a tenth of the tokens drawn anew."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(59, (rows, 1), generator=generator)
    tokens = (starts + step * torch.arange(33)) % 59
    noise = torch.rand(tokens.shape, generator=generator) < 0.1
    return torch.where(noise, torch.randint(59, tokens.shape, generator=generator), tokens)


def loss_of(model: LLM, tokens: torch.Tensor) -> torch.Tensor:
    found = model(TransformerInput(tokens[:, :-1])).logits
    return F.cross_entropy(found.flatten(0, 1), tokens[:, 1:].flatten())


def trained(model: LLM, step: int, steps: int, lr: float) -> float:
    """The mean held-out loss over 8 batches after `steps` of AdamW on whatever trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for index in range(steps):
        loss_of(model, successors(step, seed=1 + index)).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return float(
            torch.stack(
                [loss_of(model, successors(step, seed=10_000 + i)) for i in range(8)]
            ).mean()
        )


@pytest.mark.slow
def test_qlora_ends_where_lora_does():
    """A model of one rule of succession learns another through adapters, on exact and on quantized
    weights.
    """
    start = LLM(base(dim=64).args)
    start.init_weights()
    trained(start, 7, 150, 3e-3)
    ends = []
    for args in (None, QuantizeArgs(), QuantizeArgs(double_quant=True)):
        model = copy.deepcopy(start)
        if args is not None:
            quantize_model(model, args)
        apply_lora(model, LoraArgs(rank=8, alpha=16.0))
        first = trained(model, 11, 0, 3e-3)
        ends.append(trained(model, 11, 200, 3e-3))
        assert ends[-1] < 0.3 * first, "it learns"
    assert all(end == pytest.approx(ends[0], rel=0.02) for end in ends)
