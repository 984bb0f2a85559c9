"""Equal numbers with PEFT: adapters of every kind on tiny twins, loaded, trained, merged and saved
back.
"""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from tests.checkpoints import families
from tests.checkpoints.adapters.twins import ADAPTERS, far, logits_of, read_back, save, twin
from tests.checkpoints.families import VOCAB, random_ids, tiny_hf
from transom.base.errors import RequestError
from transom.checkpoints.adapters.read import load_adapter
from transom.checkpoints.adapters.write import save_adapter
from transom.checkpoints.load import load
from transom.inference.loop import generate
from transom.layers.inputs import TransformerInput
from transom.lora.adapters import active_adapters, adapted_modules, plain_weights, remove_adapter
from transom.lora.merge import merge_adapter, unmerge_adapter
from transom.models.llm import LLM


@pytest.fixture(scope="module", params=ADAPTERS)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    return request.param, twin(request.param, folder), folder


def adapted(folder, **options) -> LLM:
    return load_adapter(load(folder / "base"), folder / "adapter", **options)


def test_logits_equal(pair):
    _, theirs, folder = pair
    base = logits_of(load(folder / "base"))
    expected = theirs(random_ids(2, 12)).logits
    assert far(expected, base) > 0.5, "the adapter does something"
    assert far(logits_of(adapted(folder)), expected) < 2e-5


def test_every_gradient_of_the_adapter_is_equal(pair, tmp_path):
    _, theirs, folder = pair
    mine, ids = adapted(folder, trainable=True), random_ids(2, 12)
    weight = torch.randn(*ids.shape, VOCAB, generator=torch.Generator().manual_seed(2))
    grads = copy.deepcopy(theirs)
    for key, parameter in grads.named_parameters():
        parameter.requires_grad_("lora_" in key or "modules_to_save" in key)
    (grads(ids).logits * weight).sum().backward()
    with torch.no_grad():  # a folder of gradients goes the way of a folder of adapters
        for parameter in grads.parameters():
            if parameter.requires_grad:
                # Text alone reaches no image encoder.
                parameter.copy_(torch.zeros(()) if parameter.grad is None else parameter.grad)
    save(grads, tmp_path)
    expected = dict(load_adapter(load(folder / "base"), tmp_path).named_parameters())
    (logits_of(mine) * weight).sum().backward()
    trained = {name: p for name, p in mine.named_parameters() if p.grad is not None}
    assert trained and all(
        ".lora." in name or name.endswith(("output.weight", "norm.weight")) or "feed_" in name
        for name in trained
    )
    for name, parameter in trained.items():
        scale = float(expected[name].abs().max())
        assert far(parameter.grad, expected[name]) < 2e-5 * scale + 1e-6, name


def test_greedy_tokens_equal(pair):
    _, theirs, folder = pair
    prompt = random_ids(1, 5)
    expected = theirs.generate(prompt, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert generate(adapted(folder), prompt, max_new_tokens=10).tolist() == expected.tolist()


def test_saved_adapters_load_in_peft(pair, tmp_path):
    name, theirs, folder = pair
    save_adapter(adapted(folder), tmp_path)
    assert (
        far(read_back(name, tmp_path)(random_ids(2, 12)).logits, theirs(random_ids(2, 12)).logits)
        < 1e-5
    )
    before, after = (
        load_file(at / "adapter_model.safetensors") for at in (folder / "adapter", tmp_path)
    )
    before = {
        key: tensor for key, tensor in before.items() if not key.endswith("base_layer.weight")
    }
    assert set(after) == set(before)
    assert all(torch.equal(after[key], before[key]) for key in after)
    again = load_adapter(load(folder / "base"), tmp_path)
    assert far(logits_of(again), logits_of(adapted(folder))) == 0


def test_merged_weights_do_the_same_and_come_out_bit_for_bit(pair):
    name, theirs, folder = pair
    mine = adapted(folder)
    before = {key: tensor.clone() for key, tensor in mine.state_dict().items()}
    if name in ("tied embeddings", "DoRA on scaled embeddings"):
        with pytest.raises(RequestError, match="tok_embeddings, which is the output too"):
            merge_adapter(mine)
        return
    assert far(logits_of(merge_adapter(mine)), theirs(random_ids(2, 12)).logits) < 2e-5
    plain = LLM(mine.args)  # what is merged needs no adapter any more
    plain.load_state_dict(plain_weights(mine))
    assert far(logits_of(plain.eval()), logits_of(mine)) == 0
    unmerge_adapter(mine)
    assert all(torch.equal(tensor, before[key]) for key, tensor in mine.state_dict().items())


def test_without_its_adapter_the_model_is_the_base(pair):
    _, _, folder = pair
    mine, base = adapted(folder), load(folder / "base")
    remove_adapter(mine, "default")
    assert far(logits_of(mine), logits_of(base)) == 0
    assert list(mine.state_dict()) == list(base.state_dict())
    assert not list(adapted_modules(mine)) and active_adapters(mine) == ()


@pytest.mark.parametrize(
    "name", ["all linear", "fused", "experts, inputs first", "experts, columns by turns"]
)
def test_a_corrupted_tensor_is_seen(name, tmp_path):
    theirs = twin(name, tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    state = load_file(path)
    key = next(
        k
        for k in state
        if k.endswith(("k_proj.lora_B.weight", "qkv_proj.lora_B.weight", "experts.lora_B.weight"))
    )
    state[key] = state[key].roll(1, 0)
    save_file(state, path)
    assert far(logits_of(adapted(tmp_path)), theirs(random_ids(2, 12)).logits) > 1e-3


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_falls_on_the_same_inputs(dora, tmp_path, monkeypatch):
    kind = {
        "target_modules": ["model.layers.0.self_attn.o_proj"],
        "lora_dropout": 0.4,
        "use_dora": dora,
    }
    monkeypatch.setitem(ADAPTERS, "dropout", ("qwen2", kind))
    theirs, mine = twin("dropout", tmp_path).train(), adapted(tmp_path).train()
    torch.manual_seed(5)
    expected = theirs(random_ids(2, 12)).logits
    torch.manual_seed(5)
    got = logits_of(mine)
    assert far(got, expected) < 2e-5
    assert far(got, logits_of(mine.eval())) > 1e-2


def test_experts_of_older_folders_one_by_one(tmp_path):
    """transformers 4 held every expert's matrices apart; PEFT turns such adapters into those of two
    parameters.
    """
    theirs_base = tiny_hf("mixtral")
    theirs_base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    state = {}
    for layer in range(2):
        for expert in range(4):
            for leaf, inputs, outputs in (("w1", 32, 48), ("w3", 32, 48), ("w2", 48, 32)):
                at = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                state[f"{at}.lora_A.weight"] = torch.randn(2, inputs, generator=generator) * 0.2
                state[f"{at}.lora_B.weight"] = torch.randn(outputs, 2, generator=generator) * 0.2
    (tmp_path / "adapter").mkdir()
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    config = '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["w1", "w2", "w3"]}'
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    expected = read_back("experts", tmp_path / "adapter")(random_ids(2, 12)).logits
    mine = adapted(tmp_path)
    assert far(logits_of(mine), expected) < 2e-5
    save_adapter(mine, tmp_path / "again")
    assert far(read_back("experts", tmp_path / "again")(random_ids(2, 12)).logits, expected) < 1e-5


@pytest.mark.parametrize("where", ["outputs", "inputs"])
def test_experts_whose_parameters_are_read_either_way(where, tmp_path):
    """PEFT took a Llama 4 expert's rows for inputs at first, for outputs now: the shapes tell
    which.
    """
    theirs = tiny_hf("llama4_text")
    theirs.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    first, last = (96, 32) if where == "outputs" else (32, 96)
    A = torch.randn(4 * 2, first, generator=generator) * 0.2
    B = torch.randn(last, 2 * 4, generator=generator) * 0.2
    A_eri, B_ore = A.view(4, 2, first), B.view(last, 2, 4)
    with torch.no_grad():
        form = "ore,eri->eoi" if where == "outputs" else "ore,eri->eio"
        theirs.model.layers[1].feed_forward.experts.gate_up_proj += 1.5 * torch.einsum(
            form, B_ore, A_eri
        )
    at = "base_model.model.model.layers.1.feed_forward.experts"
    (tmp_path / "adapter").mkdir()
    state = {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}
    save_file(state, tmp_path / "adapter" / "adapter_model.safetensors")
    config = (
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_parameters": '
        '["experts.gate_up_proj"]}'
    )
    (tmp_path / "adapter" / "adapter_config.json").write_text(config)
    assert far(logits_of(adapted(tmp_path)), theirs(random_ids(2, 12)).logits) < 2e-5


def test_square_experts_are_read_as_peft_reads_them(tmp_path, monkeypatch):
    module, prefix, fields = families._VARIANTS["llama4_text"]
    square = (module, prefix, {**fields, "intermediate_size": 16})  # 2 x 16 columns over 32 rows
    monkeypatch.setitem(families._VARIANTS, "llama4_text", square)
    theirs = twin("experts, inputs first", tmp_path)
    assert far(logits_of(adapted(tmp_path)), theirs(random_ids(2, 12)).logits) < 2e-5


def test_cached_decoding_sees_the_adapter_of_a_latent(tmp_path):
    theirs = twin("latent attention", tmp_path)
    mine, ids = adapted(tmp_path), random_ids(1, 12)
    cache = mine.make_cache(batch_size=1, capacity=16)
    mine(TransformerInput(ids[:, :11]), cache)
    last = mine(TransformerInput(ids[:, 11:]), cache).logits
    assert far(last[:, 0], theirs(ids).logits[:, -1]) < 2e-5


def test_trained_biases_are_written_with_the_modules_they_are_part_of(tmp_path):
    """PEFT reads whole modules or none: a bias alone under modules_to_save is a KeyError there."""
    base = tiny_hf("qwen2")
    base.save_pretrained(tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig(r=2, target_modules=["o_proj"], bias="all")).eval()
    with torch.no_grad():
        for key, weight in theirs.named_parameters():
            if weight.requires_grad:
                weight.add_(
                    torch.randn(weight.shape, generator=torch.Generator().manual_seed(len(key)))
                    * 0.2
                )
    save(theirs, tmp_path / "adapter")
    mine = load_adapter(load(tmp_path / "base"), tmp_path / "adapter")
    expected = theirs(random_ids(2, 12)).logits
    assert far(logits_of(mine), expected) < 2e-5
    save_adapter(mine, tmp_path / "again", base=str(tmp_path / "base"))
    again = PeftModel.from_pretrained(tiny_hf("qwen2"), tmp_path / "again").eval()
    assert far(again(random_ids(2, 12)).logits, expected) < 2e-5
    assert far(logits_of(load(tmp_path / "again")), expected) < 2e-5
