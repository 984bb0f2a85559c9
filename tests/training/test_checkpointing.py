"""Recomputing or moving activations changes memory and nothing else: no gradient bit, no key, no
statistic.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from tests.helpers import random_model, random_tokens, tiny_args
from tests.training.runs import losses, tiny_config
from tests.training.runs import tiny_args as tiny_run
from transom.base.errors import RequestError
from transom.layers.inputs import TransformerInput
from transom.training.loop import blocks
from transom.training.loop.blocks import arrange_blocks
from transom.training.loop.setup import open_run

CHOICES = ("full", "selective", "every-2", "every-3")
MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 32, "jitter": 0.3, "expert_capacity": 1.0}
MODELS = {
    "dense": {},
    "window": {"sliding_window": 5},
    "softcap": {"attn_softcap": 2.0},
    "moe": {"moe_args": MOE},
}
INPUTS = TransformerInput(random_tokens(2, 30), sizes=[[10, 20], [30]])


def trained(changes, **options):
    """A model in training mode with arranged blocks: (output, gradients by name)."""
    model = random_model(tiny_args(n_layers=3, **changes)).train()
    arrange_blocks(model, **options)
    torch.manual_seed(3)  # jitter draws from torch's generator
    output = model(INPUTS)
    output.logits.square().sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("how", CHOICES)
@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_gradients_and_statistics_are_bit_equal(changes, how):
    plain, expected = trained(changes)
    output, got = trained(changes, checkpointing=how)
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert torch.equal(output.logits, plain.logits)
    for ours, theirs in zip(output.router, plain.router, strict=True):
        assert all(
            torch.equal(a, vars(theirs)[name])
            for name, a in vars(ours).items()
            if torch.is_tensor(a)
        )


@pytest.mark.parametrize("how", CHOICES)
def test_bfloat16_autocast_is_bit_equal(how):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, expected = trained({})
        _, got = trained({}, checkpointing=how)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def forwards(how):
    """How often each block's feed-forward ran in one forward and backward."""
    model = random_model(tiny_args(n_layers=4)).train()
    arrange_blocks(model, checkpointing=how)
    counts = [0] * 4

    def count(index):
        counts[index] += 1

    for i, block in enumerate(model.layers):
        block.ffn_norm.register_forward_pre_hook(lambda *_, i=i: count(i))
    model(INPUTS).logits.sum().backward()
    return counts


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("none", [1, 1, 1, 1]),
        ("full", [2, 2, 2, 2]),
        ("every-2", [2, 1, 2, 1]),
        ("every-3", [2, 1, 1, 2]),
        ("selective", [2, 2, 2, 2]),
    ],
)
def test_the_chosen_blocks_run_twice(how, expected):
    assert forwards(how) == expected


def products(how, monkeypatch):
    """How many products ran in one forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Count.seen += function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            return function(*args, **(kwargs or {}))

    model = random_model(tiny_args(n_layers=3)).train()
    arrange_blocks(model, checkpointing=how)
    with Count():
        model(INPUTS).logits.sum().backward()
    return Count.seen


def test_selective_makes_no_product_again(monkeypatch):
    none, selective, full = (products(how, monkeypatch) for how in ("none", "selective", "full"))
    assert none == selective < full


def kept_bytes(how):
    """What one forward keeps for backward, each storage once."""
    model = random_model(tiny_args(n_layers=4, dim=64, hidden_dim=256)).train()
    arrange_blocks(model, checkpointing=how)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model(TransformerInput(random_tokens(2, 64), logits="none"))
    return sum(size for size, _ in sizes.values())


def test_less_is_kept():
    none, every, full = (kept_bytes(how) for how in ("none", "every-2", "full"))
    assert full < 0.2 * none
    assert full < every < 0.7 * none


def test_frozen_weights_get_no_gradient_and_the_others_theirs():
    def gradients(how):
        model = random_model(tiny_args(n_layers=3)).train()
        model.requires_grad_(False)
        model.layers[1].attention.wq.requires_grad_(True)
        arrange_blocks(model, checkpointing=how)
        model(INPUTS).logits.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients("none"), gradients("full")
    assert list(got) == list(expected) == ["layers.1.attention.wq.weight"]
    assert torch.equal(*got.values(), *expected.values())


@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning"
)  # of torch's own code, when it loads its compiler
def test_no_key_changes_and_everything_can_be_put_back():
    model = random_model(tiny_args(n_layers=3))
    keys, modules = list(model.state_dict()), [name for name, _ in model.named_modules()]
    attend = model.attend
    arrange_blocks(model, compiled=True, checkpointing="full", offload_min_bytes=0, backend="eager")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_modules()] == modules
    arrange_blocks(model, compiled=True)  # instead of what was there, not on top of it
    arrange_blocks(model)
    assert all("forward" not in vars(block) for block in model.layers)
    assert model.attend is attend


def test_a_copy_runs_its_own_weights():
    model = random_model(tiny_args())
    arrange_blocks(model, checkpointing="full", offload_min_bytes=0)
    twin = copy.deepcopy(model)
    before = twin(INPUTS).logits
    with torch.no_grad():
        model.layers[0].attention.wo.weight.zero_()
    assert torch.equal(twin(INPUTS).logits, before)


def test_nothing_is_recomputed_or_moved_without_gradients(monkeypatch):
    model = random_model(tiny_args())
    arrange_blocks(model, checkpointing="full", offload_min_bytes=0)
    monkeypatch.setattr(blocks, "checkpoint", None)
    monkeypatch.setattr(blocks, "saved_tensors_hooks", None)
    cache = model.make_cache(2)
    model(TransformerInput(random_tokens(2, 5)), cache)
    assert model(TransformerInput(random_tokens(2, 5)), cache, inference=True).logits.shape == (
        2,
        5,
        61,
    )


def test_large_activations_travel_and_weights_do_not(monkeypatch):
    """The hooks of a GPU, with the host standing for it."""
    gone, back = [], []

    def to_host(min_bytes, tensor):
        moves = not blocks.is_weight(tensor) and tensor.nbytes >= min_bytes
        gone.append((moves, tensor.nbytes))
        return tensor.device, tensor.clone() if moves else tensor

    real = blocks.to_device
    monkeypatch.setattr(blocks, "to_host", to_host)
    monkeypatch.setattr(blocks, "to_device", lambda packed: (back.append(1), real(packed))[1])
    _, expected = trained({})
    _, got = trained({}, offload_min_bytes=4096)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert len(back) == len(gone)
    assert {moves for moves, _ in gone} == {True, False}
    moved_alone = sum(size for moves, size in gone if moves)
    gone.clear()
    _, got = trained({}, offload_min_bytes=4096, checkpointing="full")
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    moved = [size for moves, size in gone if moves]
    assert moved == [2 * 30 * 32 * 4] * 3  # each block's input
    assert sum(moved) < moved_alone / 3


@pytest.mark.parametrize("shape", ["small", "weight", "view of a weight", "on the host"])
def test_what_stays_where_it_is(shape):
    weight = torch.nn.Parameter(torch.ones(64, 64))
    tensor = {
        "small": torch.ones(2),
        "weight": weight,
        "view of a weight": weight.t(),
        "on the host": torch.ones(64, 64),
    }[shape]
    device, packed = blocks.to_host(1024, tensor)
    assert packed is tensor and device == tensor.device
    assert blocks.to_device((device, packed)) is tensor


@pytest.mark.parametrize("half", [False, True])
def test_weights_are_told_from_activations(half):
    """By their shapes: no activation of this model has that of a weight."""
    model = random_model(tiny_args(n_layers=1)).train()
    shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(p.t().shape) for p in model.parameters()
    }
    seen = []

    def pack(tensor):
        seen.append((tuple(tensor.shape), blocks.is_weight(tensor)))
        return tensor

    cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=half)
    with saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        model(TransformerInput(random_tokens(2, 29), logits="none"))
    assert {weight for _, weight in seen} == {True, False}
    assert all((shape in shapes) == weight for shape, weight in seen)


def test_a_device_tensor_is_copied():
    meta = torch.empty(64, 64, device="meta")  # stands for any device that is not the host
    with pytest.raises(NotImplementedError, match="meta"):  # which has nothing to copy
        blocks.to_host(1024, meta)


@pytest.mark.parametrize("how", ["full", "every-2", "selective"])
def test_a_run_is_the_same_run(tmp_path, how):
    model = {**tiny_config(tmp_path)["model"], "moe_args": MOE}
    for name, choice in (("plain", "none"), ("other", how)):
        words = [f"out={tmp_path}/{name}", f"activation_checkpoint={choice}"]
        open_run(tiny_run(tmp_path, *words, model=model, steps=6), quiet=True).fit()
    assert losses(tmp_path / "other") == losses(tmp_path / "plain")


def test_offload_on_the_cpu_is_said_to_do_nothing(tmp_path, capsys):
    trainer = open_run(tiny_run(tmp_path, "activation_offload=true"), quiet=True)
    assert capsys.readouterr().err.count("activation_offload") == 1
    assert all("forward" not in vars(block) for block in trainer.model.layers)


@pytest.mark.parametrize("how", ["some", "every", "every-0", "every--1", "every-2.5", "Full", ""])
def test_other_choices_are_refused(tmp_path, how):
    with pytest.raises(
        RequestError,
        match=r"activation_checkpoint: got .*; expected none, full, selective or every-K",
    ):
        tiny_run(tmp_path, activation_checkpoint=how)


def test_selective_with_compile_is_refused(tmp_path):
    with pytest.raises(RequestError, match="expected none, full or every-K with compile"):
        tiny_run(tmp_path, activation_checkpoint="selective", compile=True)


def test_dropout_in_a_hook_draws_the_same_again():
    def gradients(how):
        model = random_model(tiny_args()).train()
        arrange_blocks(model, checkpointing=how)
        model.layers[0].ffn_norm.register_forward_pre_hook(
            lambda module, x: (F.dropout(x[0], 0.5),)
        )
        torch.manual_seed(7)
        model(INPUTS).logits.sum().backward()
        return model.layers[0].feed_forward.w_gate.weight.grad

    assert torch.equal(gradients("full"), gradients("none"))
