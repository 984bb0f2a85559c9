"""Modules trained whole beside a LoRA: wide copies in a narrow model, tied embeddings, and their
files.
"""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints.adapters.twins import far, logits_of
from tests.checkpoints.families import VOCAB, random_ids, tiny_hf
from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.load import load
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import activate_adapters, adapted_modules, plain_weights, remove_adapter
from transom.lora.apply import apply_lora
from transom.lora.args import LoraArgs
from transom.lora.vocabulary import resize_vocabulary
from transom.models.llm import LLM

MOE = {"num_experts": 3, "top_k": 2, "hidden_dim": 20, "router_bias": True}
TOKENS = random_tokens(2, 9)
WHOLE = {
    "router": ({"moe_args": MOE}, ("router",)),
    "norms": ({}, ("norm", "attention_norm")),
    "LayerNorm": ({"norm": "layer"}, ("norm",)),
    "embeddings": ({}, ("tok_embeddings",)),
    "output": ({}, ("output",)),
    "leaves": ({"qkv_bias": True, "moe_args": MOE}, ("wq", "w_out")),
    "sinks": ({"attn_sinks": True}, ("attention",)),
}


def drawn(model: LLM) -> LLM:
    """Every parameter that trains moved by a tenth of a normal draw."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    return model.eval()


def narrow(fields, whole) -> LLM:
    """A bfloat16 model with a LoRA and whole modules, all drawn."""
    model = random_model(tiny_args(**fields)).bfloat16()
    targets = ("wk",) if "wq" in whole or "attention" in whole else ("wq",)
    return drawn(apply_lora(model, LoraArgs(rank=2, targets=targets, modules_to_save=whole)))


@pytest.mark.parametrize(("fields", "whole"), WHOLE.values(), ids=WHOLE)
def test_a_narrow_model_computes_with_wide_copies_outside_autocast(fields, whole):
    model = narrow(fields, whole)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    out = model(TransformerInput(TOKENS))
    assert out.logits.dtype == out.hidden_BTD.dtype == torch.bfloat16
    generate(model, TOKENS[:1], max_new_tokens=2)
    exact = logits_of(narrow(fields, whole).float(), TOKENS)
    assert (out.logits.float() - exact).std() < 0.03 * exact.std()


def test_small_steps_move_whole_modules_of_a_narrow_model():
    model = apply_lora(
        random_model(tiny_args(moe_args=MOE)).bfloat16(),
        LoraArgs(rank=1, modules_to_save=("router",)),
    )
    weight = model.layers[0].feed_forward.router.weight
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    torch.optim.SGD([weight], lr=1e-4).step()
    assert not (weight == before).any()


def test_the_base_keeps_its_dtype_beside_wide_copies():
    model = random_model(tiny_args()).bfloat16()
    base = logits_of(model, TOKENS)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    drawn(apply_lora(model, LoraArgs(rank=1, targets=("wq",), modules_to_save=("output",))))
    activate_adapters(model, ())
    assert model.output.weight.dtype == torch.bfloat16 and far(logits_of(model, TOKENS), base) == 0
    activate_adapters(model, ("default",))
    model.double()
    activate_adapters(model, ())
    assert model.output.weight.dtype == torch.float64
    remove_adapter(model.bfloat16(), "default")
    assert not model.output._forward_hooks and not model.output._forward_pre_hooks
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_an_adapter_whose_base_was_dropped_stays_on():
    model = apply_lora(random_model(tiny_args()), LoraArgs(rank=1, modules_to_save=("norm",)))
    logits = logits_of(model, TOKENS)
    for _, _, adapters in adapted_modules(model):
        adapters.drop_replaced()
    with pytest.raises(RequestError, match="modules_to_save: got 'norm'; expected"):
        activate_adapters(model, ())
    assert far(logits_of(model, TOKENS), logits) == 0


def test_a_saved_model_has_one_dtype():
    model = apply_lora(
        random_model(tiny_args()).bfloat16(), LoraArgs(rank=1, modules_to_save=("output",))
    )
    for _, _, adapters in adapted_modules(model):
        adapters.merged = adapters.lora("default") is not None
    assert {weight.dtype for weight in plain_weights(model).values()} == {torch.bfloat16}


def test_peft_computes_with_wide_copies_of_a_narrow_model(tmp_path):
    tiny_hf("qwen3").bfloat16().save_pretrained(tmp_path / "base")
    mine = load(tmp_path / "base")
    assert mine.output.weight.dtype == torch.bfloat16
    drawn(apply_lora(mine, LoraArgs(rank=2, targets=("wk",), modules_to_save=("output", "norm"))))
    save_adapter(mine, tmp_path / "a", base=str(tmp_path / "base"))
    assert {
        tensor.dtype for tensor in load_file(tmp_path / "a" / "adapter_model.safetensors").values()
    } == {torch.float32}
    read = load_adapter(load(tmp_path / "base", dtype="float32"), tmp_path / "a")
    theirs = in_peft(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32), tmp_path / "a"
    )
    assert far(theirs(random_ids(2, 12)).logits, logits_of(read)) < 2e-5
    short = load_adapter(load(tmp_path / "base"), tmp_path / "a")
    assert short.output.weight.dtype == torch.bfloat16
    assert (logits_of(short).float() - logits_of(read)).std() < 0.03 * logits_of(read).std()


def in_peft(base, folder) -> PeftModel:
    """The adapter on `base` as PEFT reads it; a key unread is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys")
        return PeftModel.from_pretrained(base, folder).eval()


@pytest.mark.parametrize("family", ["llama-tied", "gemma2"])
@pytest.mark.parametrize("more", [0, 5])
def test_tied_embeddings_are_written_as_both_and_stay_tied(family, more, tmp_path):
    base = tiny_hf(family)
    base.save_pretrained(tmp_path / "base")
    mine = load(tmp_path / "base")
    if more:
        resize_vocabulary(mine, VOCAB + more)
    drawn(apply_lora(mine, LoraArgs(rank=2, targets=("wq",), modules_to_save=("tok_embeddings",))))
    save_adapter(mine, tmp_path / "a", base=str(tmp_path / "base"))
    assert (
        json.loads((tmp_path / "a" / "adapter_config.json").read_text())["ensure_weight_tying"]
        is True
    )
    state = load_file(tmp_path / "a" / "adapter_model.safetensors")
    own = mine.tok_embeddings.weight
    for key in ("model.embed_tokens", "lm_head"):
        assert torch.equal(state[f"base_model.model.{key}.weight"], own)
    again = load_adapter(load(tmp_path / "base"), tmp_path / "a")
    assert torch.equal(again.tok_embeddings.weight, own)
    assert far(logits_of(again), logits_of(mine)) == 0
    if more:
        base.resize_token_embeddings(VOCAB + more)
    theirs = in_peft(base, tmp_path / "a")
    assert far(theirs(random_ids(2, 12)).logits, logits_of(mine)) < 2e-5
    assert theirs.get_output_embeddings().weight is theirs.get_input_embeddings().weight


def test_a_fused_weight_gets_an_adapter_or_one_of_its_own(tmp_path):
    tiny_hf("phi3").save_pretrained(tmp_path / "base")
    mine = load(tmp_path / "base")
    apply_lora(mine, LoraArgs(rank=1, targets=("wq",), modules_to_save=("wv",)))
    with pytest.raises(
        RequestError, match="qkv_proj of phi3: got an adapter and a weight of its own"
    ):
        save_adapter(mine, tmp_path / "a", family="phi3")
