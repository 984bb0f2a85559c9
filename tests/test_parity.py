"""Equal numbers with transformers: tiny random twins, loaded through `names.py`."""

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from transom.checkpoints.load import load, save
from transom.errors import RequestError
from transom.generation.loop import generate
from transom.model import TransformerInput

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
    "initializer_range": 0.2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def twin(family):
    if family == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3))
    if family == "llama-tied":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, tie_word_embeddings=True))
    if family == "mistral":
        return transformers.MistralForCausalLM(transformers.MistralConfig(**SMALL, sliding_window=7))
    if family == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**SMALL, num_local_experts=4))
    config = transformers.Llama4TextConfig(
        **{**SMALL, "num_hidden_layers": 4},
        intermediate_size_mlp=80,
        head_dim=16,
        num_local_experts=4,
        interleave_moe_layer_step=2,
        attention_chunk_size=8,
        floor_scale=4,
    )
    return transformers.Llama4ForCausalLM(config)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "mistral", "mixtral", "llama4"])
def pair(request, tmp_path_factory):
    torch.manual_seed(0)
    model = twin(request.param).eval()
    folder = tmp_path_factory.mktemp("hf") / request.param
    model.save_pretrained(folder)
    return model, folder


def tokens(rows=2, length=21):
    return torch.randint(1, 99, (rows, length), generator=torch.Generator().manual_seed(1))


def test_logits_equal(pair):
    theirs, folder = pair
    ours = load(folder)(TransformerInput(tokens()), inference=True).logits
    assert torch.allclose(ours, theirs(tokens()).logits, atol=1e-4, rtol=1e-4)


def test_gradients_equal(pair):
    theirs, folder = pair
    mine = load(folder)
    weight = torch.randn(2, 21, 99, generator=torch.Generator().manual_seed(2))
    theirs.zero_grad()
    (theirs(tokens()).logits * weight).sum().backward()
    (mine(TransformerInput(tokens())).logits * weight).sum().backward()
    expected = theirs.model.layers[0].self_attn.q_proj.weight.grad
    got = mine.layers[0].attention.wq.weight.grad
    assert torch.allclose(got, expected, atol=1e-3 * expected.abs().max())
    expected = theirs.model.embed_tokens.weight.grad
    assert torch.allclose(mine.tok_embeddings.weight.grad, expected, atol=1e-3 * expected.abs().max())


def test_greedy_tokens_equal(pair):
    theirs, folder = pair
    prompt = tokens(rows=1, length=5)
    expected = theirs.generate(prompt, max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert generate(load(folder), prompt, max_new_tokens=32).tolist() == expected.tolist()


def test_older_config_spelling(pair, tmp_path):
    _, folder = pair
    config = json.loads((folder / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "model.safetensors"), tmp_path / "model.safetensors")
    old = load(tmp_path)(TransformerInput(tokens()), inference=True).logits
    assert torch.equal(old, load(folder)(TransformerInput(tokens()), inference=True).logits)


def test_a_corrupted_tensor_is_seen(pair, tmp_path):
    theirs, folder = pair
    state = load_file(folder / "model.safetensors")
    key = "model.layers.1.self_attn.k_proj.weight"
    state[key] = state[key].roll(1, 0)
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    ours = load(tmp_path)(TransformerInput(tokens()), inference=True).logits
    assert not torch.allclose(ours, theirs(tokens()).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("change", ["extra", "missing"])
def test_every_key_is_accounted_for(pair, tmp_path, change):
    _, folder = pair
    state = load_file(folder / "model.safetensors")
    if change == "extra":
        state["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    else:
        del state["model.layers.0.input_layernorm.weight"]
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(RequestError, match=r"q_proj\.bias" if change == "extra" else "input_layernorm"):
        load(tmp_path)


def test_export_opens_in_transformers(pair, tmp_path):
    theirs, folder = pair
    mine = load(folder)
    if "llama4" in str(folder):
        with pytest.raises(RequestError, match="native"):
            save(mine, tmp_path, format="hf")
        return
    save(mine, tmp_path, format="hf")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(tokens()).logits, theirs(tokens()).logits)


def test_export_permutes_interleaved_weights(tmp_path):
    from tests.helpers import random_model, tiny_args

    mine = random_model(tiny_args(rope_layout="interleaved"))
    save(mine, tmp_path, format="hf")
    ids = torch.randint(0, mine.args.vocab_size, (2, 17))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    assert torch.allclose(mine(TransformerInput(ids)).logits, theirs, atol=1e-4, rtol=1e-4)


def test_native_round_trip_is_byte_identical(pair, tmp_path):
    _, folder = pair
    first = load(folder)
    save(first, tmp_path / "a")
    save(load(tmp_path / "a"), tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
