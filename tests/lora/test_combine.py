"""Several adapters as one change of the weights: what PEFT makes of the same deltas, what folding
leaves behind.
"""

import copy
import math
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import merge_utils

from tests.checkpoints.adapters.twins import far, logits_of, save
from tests.checkpoints.families import tiny_hf
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.load import load
from transom.lora.adapters import activate_adapters, adapter_names, plain_weights
from transom.lora.apply import apply_lora
from transom.lora.args import CombineArgs, LoraArgs
from transom.lora.combine import combined, dare, ties
from transom.lora.merge import fold_adapters, merge_adapter

WEIGHTS = (0.7, -0.3, 1.5)
TOKENS = random_tokens(2, 9)


def deltas(shape=(24, 17), count=3):
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws) for _ in range(count)]


@pytest.mark.parametrize("shape", [(24, 17), (3, 8, 5)])
@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("method", ["linear", "ties", "dare"])
def test_methods_are_those_of_peft(method, density, shape):
    given, weights = deltas(shape), torch.tensor(WEIGHTS)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a density of 1
        expected = {
            "linear": lambda: merge_utils.task_arithmetic(given, weights),
            "ties": lambda: merge_utils.ties(given, weights, density),
            "dare": lambda: merge_utils.dare_linear(given, weights, density),
        }[method]()
    made = combined(
        given, WEIGHTS, CombineArgs(method, density=density), torch.Generator().manual_seed(5)
    )
    assert far(made, expected) < 1e-6


def test_ties_keeps_what_agrees_and_dare_keeps_the_mean():
    one, other = torch.tensor([3.0, -1.0, 0.1, 2.0]), torch.tensor([1.0, 4.0, -0.2, 0.1])
    assert far(ties([one, other], (1.0, 1.0), 0.75), torch.tensor([2.0, 4.0, -0.2, 2.0])) < 1e-6
    many = dare([torch.ones(100_000)], (1.0,), 0.25, torch.Generator().manual_seed(0))
    assert set(many.tolist()) == {0.0, 4.0} and abs(float(many.mean()) - 1) < 0.03


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A base of transformers with two adapters of PEFT on different modules, of different rank."""
    root = tmp_path_factory.mktemp("pair")
    base = tiny_hf("llama")
    base.save_pretrained(root / "base")
    kinds = {"a": (3, ["q_proj", "down_proj"]), "b": (2, ["q_proj", "o_proj"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for seed, (name, (rank, modules)) in enumerate(kinds.items()):
            made = get_peft_model(
                copy.deepcopy(base), LoraConfig(r=rank, lora_alpha=5, target_modules=modules)
            )
            draws = torch.Generator().manual_seed(seed)
            with torch.no_grad():
                for key, weight in made.named_parameters():
                    if "lora_" in key:
                        weight.copy_(torch.randn(weight.shape, generator=draws) * 0.2)
            save(made, root / name)
    return root


@pytest.mark.parametrize(("method", "theirs"), [("linear", "svd"), ("ties", "ties_svd")])
def test_folded_adapters_are_pefts_weighted_adapter(pair, method, theirs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(tiny_hf("llama"), pair / "a", adapter_name="a")
        model.load_adapter(pair / "b", adapter_name="b")
        # The singular values of whole matrices: what PEFT makes of the deltas is then not cut.
        model.add_weighted_adapter(
            ["a", "b"], [0.7, -0.3], "both", theirs, svd_rank=32, density=0.4
        )
        model.set_adapter("both")
    ours = load(pair / "base")
    load_adapter(ours, pair / "b", "b")
    load_adapter(ours, pair / "a", "a")
    activate_adapters(ours, ["a", "b"])
    fold_adapters(ours, CombineArgs(method, density=0.4), {"a": 0.7, "b": -0.3})
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert far(logits_of(ours, ids), model.eval()(ids).logits) < 2e-5


def drawn(**adapters):
    model = random_model(tiny_args())
    for seed, (name, fields) in enumerate(adapters.items()):
        apply_lora(model, LoraArgs(**{"rank": 3, **fields}), name)
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, weight in model.named_parameters():
                if f".lora.{name}." in key:
                    weight.add_(torch.randn(weight.shape, generator=draws) * 0.1)
    activate_adapters(model, list(adapters))
    return model


@pytest.mark.parametrize("fields", [{}, {"dora": True}, {"modules_to_save": ("output", "norm")}])
def test_folding_leaves_a_plain_model_that_says_the_same(fields):
    model = drawn(one=fields)
    expected, merged = logits_of(model, TOKENS), copy.deepcopy(model)
    fold_adapters(model)
    assert far(logits_of(model, TOKENS), expected) < 2e-5
    assert adapter_names(model) == () and set(model.state_dict()) == set(
        random_model(tiny_args()).state_dict()
    )
    merge_adapter(merged)
    kept = plain_weights(merged)
    assert all(torch.equal(weight, kept[name]) for name, weight in model.named_parameters())


def test_the_draws_of_dare_are_those_of_its_seed():
    made = []
    for seed in (1, 1, 2):
        model = drawn(one={}, two={})
        fold_adapters(model, CombineArgs("dare", seed=seed))
        made.append(model.layers[0].attention.wq.weight)
    assert torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: CombineArgs("tie"), "method: got 'tie'; expected linear, ties, dare"),
        (lambda: CombineArgs(density=0.0), "density: got 0.0"),
        (lambda: CombineArgs(weights=(1.0, math.nan)), "finite"),
        (
            lambda: CombineArgs(weights=(1.0,)).weights_of(2),
            "expected one for each of 2 adapters",
        ),
        (lambda: fold_adapters(drawn(one={"dora": True}), CombineArgs("ties")), "DoRA"),
        (
            lambda: fold_adapters(drawn(one={"dora": True}), weights={"one": 0.5}),
            "weight: got 0.5.*'one'",
        ),
        (
            lambda: fold_adapters(drawn(one={"modules_to_save": ("norm",)}), weights={"one": 2.0}),
            "replaces norm",
        ),
    ],
)
def test_wrong_requests_are_one_sentence(act, words):
    with pytest.raises(RequestError, match=words) as error:
        act()
    assert "\n" not in str(error.value)
