"""Prompt states in a file: a second process continues with them, and refuses what isn't its own."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.helpers import random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.inference import prompt_cache
from transom.inference.decode_args import DEFAULT, DecodeArgs
from transom.inference.loop import generate, stream
from transom.inference.prompt_cache import PromptCache, weights_hash

PATTERNS = {
    "full": {},
    "window": {"sliding_window": 5},
    "hybrid": {
        "layer_pattern": "SCFf",
        "n_layers": 4,
        "sliding_window": 5,
        "attention_chunk_size": 6,
    },
}
PROMPT = random_tokens(1, 40)[0].tolist()
NEW = 8


def model_of(pattern="hybrid", **changes):
    return random_model(tiny_args(**PATTERNS[pattern], **changes)).double()


def decode(path, **changes):
    return DecodeArgs(prefill_step_size=16, prompt_cache_file=str(path), **changes)


def continued(model, prompts, args=DEFAULT):
    return list(stream(model, prompts, max_new_tokens=NEW, decode=args))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_second_process_runs_only_what_is_new(pattern, bits, tmp_path, capsys, ran):
    path, model = tmp_path / "prompt.safetensors", model_of(pattern)
    longer = [[*PROMPT, 1, 2, 3], PROMPT[:32] + [4] * 9]
    expected = continued(model, longer, DecodeArgs(kv_bits=bits))
    first = continued(model, [PROMPT], decode(path, kv_bits=bits))
    before = path.read_bytes()
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    ran.clear()
    assert continued(model_of(pattern), longer, decode(path, kv_bits=bits)) == expected
    assert ran[: -NEW + 1] == [9]
    assert "72 of 84 prompt tokens are reused" in capsys.readouterr().err
    assert continued(model_of(pattern), [PROMPT], decode(path, kv_bits=bits)) == first
    assert path.read_bytes() == before


def test_generate_has_the_same_argument(tmp_path):
    tokens, path = torch.tensor([PROMPT]), tmp_path / "file"
    expected = generate(model_of(), tokens, NEW)
    for _ in range(2):
        assert torch.equal(generate(model_of(), tokens, NEW, prompt_cache_file=path), expected)


def test_a_request_that_outgrows_its_frequencies_continues(tmp_path):
    scaling = {"kind": "dynamic", "factor": 4.0, "original_max_seq_len": 44}
    model, path = random_model(tiny_args(rope_scaling=scaling)).double(), tmp_path / "file"
    expected = continued(model, [PROMPT])
    assert continued(model, [PROMPT], decode(path)) == expected
    assert continued(model, [PROMPT], decode(path)) == expected


def rewritten(path, change):
    with safe_open(path, "pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
    content = json.loads(metadata["transom"])
    change(content)
    text = json.dumps(content)
    save_file(tensors, path, {"transom": text, "sha256": prompt_cache._sha256(text)})


def damage(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


REFUSED = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "complete file"),
    "damaged": (lambda path: damage(path, -9), "complete file"),
    "damaged metadata": (lambda path: damage(path, path.read_bytes().index(b"tokens") + 11), ""),
    "empty": (lambda path: path.write_bytes(b""), "complete file"),
    "of others": (lambda path: save_file({"x": torch.ones(2)}, path), "complete file"),
    "version": (
        lambda path: rewritten(path, lambda x: x["facts"].update(version=9)),
        "version: got 9",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_is_not_complete_is_refused_and_stays(name, tmp_path):
    path, model = tmp_path / "prompt", model_of()
    continued(model, [PROMPT], decode(path))
    change, words = REFUSED[name]
    change(path)
    before = path.read_bytes()
    with pytest.raises(RequestError, match=f"prompt_cache_file.*{words}"):
        continued(model, [PROMPT], decode(path))
    assert path.read_bytes() == before


def test_a_file_of_other_weights_or_settings_is_refused(tmp_path):
    path, model = tmp_path / "prompt", model_of()
    continued(model, [PROMPT], decode(path))
    with torch.no_grad():
        model.layers[1].attention.wk.weight[3, 4] += 1e-9
    for other, args, words in (
        (model, decode(path), "weights: got"),
        (model_of(rope_theta=300.0), decode(path), "weights: got"),
        (model_of().float(), decode(path), "dtype: got 'float64'; expected 'float32'"),
        (model_of(), decode(path, kv_bits=8), "kv_bits: got 16; expected 8"),
    ):
        with pytest.raises(RequestError, match=words):
            continued(other, [PROMPT], args)


def test_a_folder_that_can_not_be_written_is_told_before_the_model_runs(tmp_path, ran):
    (tmp_path / "file").touch()
    for folder in ("missing", "file"):
        with pytest.raises(RequestError, match=r"prompt_cache_file: got .*; expected a file in a"):
            continued(model_of(), [PROMPT], decode(tmp_path / folder / "prompt"))
    assert ran == []


def test_states_of_broken_logits_are_not_written(tmp_path):
    model = model_of()
    with torch.no_grad():
        model.layers[0].attention.wo.weight[0, 0] = float("nan")
    with pytest.raises(WorkError, match=r"layers\.0\.attention\.wo\.weight"):
        continued(model, [PROMPT], decode(tmp_path / "prompt"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(RequestError, match="expected a file, not a folder"):
        continued(model_of(), [PROMPT], decode(tmp_path))


def test_a_write_that_fails_costs_no_answer(tmp_path, monkeypatch, capsys):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prompt_cache, "save_file", full)
    expected = continued(model_of(), [PROMPT])
    assert continued(model_of(), [PROMPT], decode(tmp_path / "prompt")) == expected
    assert "could not be written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_hash_sees_one_number_and_the_order_of_rows():
    model = model_of()
    before = weights_hash(model)
    weight = model.layers[0].feed_forward.w_out.weight
    with torch.no_grad():
        weight.copy_(weight.flip(0))
    assert weights_hash(model) != before
    assert weights_hash(model_of()) == before


def test_adapters_have_states_of_their_own(tmp_path):
    from transom.lora.adapters import activate_adapters
    from transom.lora.apply import apply_lora
    from transom.lora.args import LoraArgs

    path, model = tmp_path / "prompt", model_of()
    apply_lora(model, LoraArgs(rank=2), "one")
    continued(model, [PROMPT], decode(path))
    cache = PromptCache(model, decode(path))
    assert cache.match(PROMPT, model.make_cache(1, 64))[1] == 40
    activate_adapters(model, ())
    cache = PromptCache(model, decode(path))
    assert cache.match(PROMPT, model.make_cache(1, 64))[1] == 0
