"""Adapters of models that no family of transformers can hold: PEFT's files with our own parameter
names.

PEFT itself writes and reads them around our model, which is a module of `nn.Linear`s like any
other.
"""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from tests.checkpoints.adapters.twins import far
from tests.helpers import random_model, random_tokens, tiny_args
from transom.checkpoints.adapters.foreign_leaves import OWN, namings
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import adapted_modules
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs

FILE = "adapter_model.safetensors"
NATIVE = {
    "layer norms": {"norm": "layer"},
    "halves": {"norm": "layer", "rope_layout": "halves", "qkv_bias": True},
    "tied": {"norm": "layer", "tie_embeddings": True},
    "context": {"context_dim": 8},
}


def inputs(args):
    context = None if args.context_dim is None else torch.randn(2, 5, args.context_dim)
    return TransformerInput(random_tokens(2, 12), context=context)


def drawn(model, marks):
    """The model with every part of its adapters drawn."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for key, weight in model.named_parameters():
            if any(mark in key for mark in marks):
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.mark.parametrize("fields", NATIVE.values(), ids=NATIVE)
@pytest.mark.parametrize("dora", [False, True])
def test_peft_reads_what_is_written_and_the_other_way(fields, dora, tmp_path, capsys):
    args = tiny_args(**fields)
    names = ["wq", "wk", "w_out", "tok_embeddings"]
    config = LoraConfig(
        r=3, lora_alpha=7, target_modules=names, modules_to_save=["norm"], use_dora=dora
    )
    theirs = drawn(get_peft_model(random_model(args), config), ("lora_", "modules_to_save"))
    theirs.save_pretrained(tmp_path / "theirs")
    mine = load_adapter(random_model(args), tmp_path / "theirs")
    expected = theirs(given := inputs(args)).logits
    assert (
        far(mine(given).logits, expected) < 1e-5 < far(random_model(args)(given).logits, expected)
    )
    save_adapter(mine, tmp_path / "mine")
    assert "has Transom's own names" in capsys.readouterr().err
    before, after = (load_file(tmp_path / at / FILE) for at in ("theirs", "mine"))
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in after)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        again = PeftModel.from_pretrained(random_model(args), tmp_path / "mine").eval()
    assert far(again(given).logits, expected) == 0


@pytest.mark.parametrize("dora", [False, True])
def test_experts_stay_as_they_are(dora, tmp_path):
    args = tiny_args(
        norm="layer", moe_args={"num_experts": 3, "top_k": 2, "hidden_dim": 20}, ffn_gated=False
    )
    mine = random_model(args)
    rank = {"rank": 2, "alpha": 3.0, "dora": dora, "targets": ("all-linear",)}
    drawn(apply_lora(mine, LoraArgs(**rank)), (".A", ".B"))
    save_adapter(mine, tmp_path)
    key = "base_model.model.layers.1.feed_forward.experts.w_out.lora_B.weight"
    assert load_file(tmp_path / FILE)[key].shape == (3, 32, 2)
    again = load_adapter(random_model(args), tmp_path)
    given = inputs(args)
    assert torch.equal(again(given).logits, mine(given).logits)
    assert len(list(adapted_modules(again))) == len(list(adapted_modules(mine)))


def test_own_names_come_last():
    assert [naming.family for naming in namings(random_model(tiny_args(norm="layer")))] == [OWN]
    families = [naming.family for naming in namings(random_model(tiny_args()))]
    assert families[0] == "llama" and families[-1] == OWN


def test_own_names_are_read_on_any_model_and_kept(tmp_path, capsys):
    model = drawn(apply_lora(random_model(tiny_args()), LoraArgs(rank=2)), (".A", ".B"))
    save_adapter(model, tmp_path / "a", family=OWN)
    again = load_adapter(random_model(tiny_args()), tmp_path / "a")
    given = inputs(model.args)
    assert torch.equal(again(given).logits, model(given).logits)
    save_adapter(again, tmp_path / "b")
    assert set(load_file(tmp_path / "a" / FILE)) == set(load_file(tmp_path / "b" / FILE))
