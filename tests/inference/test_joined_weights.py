"""Joined weights: one product for leaves with one input, and the same model before and after."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import random_model, random_tokens, tiny_args
from transom.checkpoints.save import save
from transom.inference import compiled
from transom.inference.decode_args import DecodeArgs
from transom.inference.joined_weights import joined_weights
from transom.inference.loop import stream
from transom.layers.compiled import compile_forward
from transom.layers.inputs import TransformerInput
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.merge import merge_adapter
from transom.quantize.args import QuantizeArgs
from transom.quantize.leaves import quantized_leaves
from transom.quantize.methods import quantize_model

MLA = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
# Fields of a model, and the products that two layers save.
KINDS = {
    "biases": ({"qkv_bias": True}, 6),
    "no gate": ({"ffn_gated": False}, 4),
    "latent": ({"n_kv_heads": 4, "mla_args": MLA}, 4),
    "compressed queries": ({"n_kv_heads": 4, "mla_args": {**MLA, "q_lora_rank": 12}}, 4),
    "shared expert": (
        {"moe_args": {"num_experts": 4, "top_k": 2, "shared_expert": True}},
        6,
    ),
}


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function._schema.name in ("aten::mm", "aten::addmm")
        return function(*args, **(kwargs or {}))


def run(model):
    """Return the logits of a model, and the number of its products."""
    with torch.no_grad(), Products() as products:
        return model(TransformerInput(random_tokens(2, 7))).logits, products.count


@pytest.mark.parametrize("kind", KINDS)
def test_one_product_for_leaves_with_one_input(kind, tmp_path):
    fields, saved = KINDS[kind]
    model = random_model(tiny_args(**fields)).double()
    save(model, tmp_path / "before")
    parameters = dict(model.named_parameters())
    before = {name: one.clone() for name, one in model.state_dict().items()}
    expected, products = run(model)
    for _ in range(2):  # the second time they are side by side already
        with joined_weights(model):
            got, fewer = run(model)
            state = model.state_dict()
        assert fewer == products - saved
        torch.testing.assert_close(got, expected)
        assert run(model)[1] == products
    assert all(torch.equal(state[name], one) for name, one in before.items())
    assert {name: id(one) for name, one in model.named_parameters()} == {
        name: id(one) for name, one in parameters.items()
    }
    save(model, tmp_path / "after")
    for file in (tmp_path / "before").iterdir():
        assert (tmp_path / "after" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    ("args", "joins"),
    [
        (QuantizeArgs("int8", group=0), True),
        (QuantizeArgs("int4", group=32, zero_points=True), True),
        (QuantizeArgs("nf4", group=32, double_quant=True), False),  # blocks reach into other rows
    ],
)
def test_quantized_leaves_join_if_their_parts_are_rows(args, joins):
    model = quantize_model(random_model(tiny_args(hidden_dim=64, qkv_bias=True)), args)
    model = model.double()  # the products in C++ have other sums
    expected, _ = run(model)
    with joined_weights(model):
        assert [one.joined is not None for one in quantized_leaves(model).values()].count(True) == (
            4 if joins else 0
        )
        torch.testing.assert_close(run(model)[0], expected)


def test_training_goes_on_while_weights_are_joined():
    model = random_model(tiny_args()).double()
    model(TransformerInput(random_tokens(2, 7))).logits.sum().backward()
    expected = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with joined_weights(model):
        model(TransformerInput(random_tokens(2, 7))).logits.sum().backward()
        assert all(map(torch.equal, [one.grad for one in model.parameters()], expected))
        optimizer.step()
        trained, _ = run(model)
    torch.testing.assert_close(trained, run(model)[0])


CHANGES = {
    "cast": lambda model: model.float().double(),
    "move": lambda model: model.to_empty(device="cpu").load_state_dict(other_state()),
    "loaded in place": lambda model: model.load_state_dict(other_state()),
    "loaded by assignment": lambda model: model.load_state_dict(other_state(), assign=True),
    "merged": lambda model: merge_adapter(adapted(model)),
}


def other_state():
    return random_model(tiny_args(), seed=1).double().state_dict()


def adapted(model, targets=("attention",)):
    apply_lora(model, LoraArgs(rank=2, targets=targets))
    with torch.no_grad():
        for name, one in model.named_parameters():
            if name.endswith(".B"):
                one.fill_(0.1)
    return model


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_were_joined_change_like_others(change):
    logits = []
    for join in (False, True):
        model = random_model(tiny_args()).double()
        if join:
            with joined_weights(model):
                pass
        CHANGES[change](model)
        if join:
            with joined_weights(model):
                logits.append(run(model)[0])
        logits.append(run(model)[0])
    torch.testing.assert_close(logits[1], logits[0])
    torch.testing.assert_close(logits[2], logits[0])


def test_leaves_with_hooks_or_adapters_are_left_alone():
    model = random_model(tiny_args()).double()
    seen = []
    model.layers[0].attention.wk.register_forward_hook(lambda *_: seen.append(1))
    adapted(model, (r"layers\.1\.(attention|feed_forward)\.\w+",))
    expected, products = run(model)
    with joined_weights(model):
        got, fewer = run(model)
    assert len(seen) == 2 and fewer == products - 1
    assert torch.equal(got, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_steps_read_joined_weights(monkeypatch):
    """One row leaves gate and value to the compiler, which makes one kernel of two equal sums."""
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(
        compiled, "compile_forward", lambda forward, **_: compile_forward(forward, counting)
    )
    model = random_model(tiny_args()).double()
    for prompts, products in (([[7, 8]], 5), ([[7, 8], [3]], 4)):
        expected = list(stream(model, prompts, max_new_tokens=4))
        graphs.clear()
        with joined_weights(model):
            decode = DecodeArgs(compile=True)
            assert list(stream(model, prompts, max_new_tokens=4, decode=decode)) == expected
        block = graphs[0].graph
        assert sum("linear" in str(node.target) for node in block.nodes) == products
