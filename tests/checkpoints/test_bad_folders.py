"""Folders that cannot be read: one sentence with the file and the key, whatever is wrong."""

import io
import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.consolidated import MISTRAL_PARAMS, PARAMS, cut, meta_state, twin, write_meta
from tests.checkpoints.families import tiny_hf
from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.tokenizers.training import byte_tokenizer


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One folder of each kind; tests change copies."""
    at = tmp_path_factory.mktemp("whole")
    tiny_hf("llama-tied").save_pretrained(at / "hf")
    save(random_model(tiny_args()), at / "native", max_shard_size="9KB")
    write_meta(
        at / "meta", PARAMS["llama3"], cut("llama3", meta_state("llama3", twin("llama3")), 2)
    )
    save(random_model(tiny_args()), at / "mistral", format="mistral")
    return at


@pytest.fixture
def folder(whole, tmp_path):
    def copy(kind):
        return shutil.copytree(whole / kind, tmp_path / kind)

    return copy


def sentence(call, *said):
    with pytest.raises(RequestError) as error:
        call()
    text = str(error.value)
    assert "\n" not in text and all(part in text for part in said), text


def edit(path, **changes):
    data = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))


def cut_in_half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_no_config(folder):
    at = folder("hf")
    (at / "config.json").unlink()
    sentence(lambda: load(at), str(at), "no config.json, no params.json")


def test_a_config_without_weights_names_what_is_there(folder):
    at = folder("hf")
    (at / "model.safetensors").rename(at / "pytorch_model.bin")
    sentence(lambda: load(at), "pytorch_model.bin is there; expected model.safetensors")


def test_an_unknown_model_type(folder):
    at = folder("hf")
    edit(at / "config.json", model_type="falcon")
    sentence(lambda: load(at), "config.json: model_type: got 'falcon'; expected transom, llama")


def test_a_missing_shard(folder):
    at = folder("native")
    gone = sorted(at.glob("model-*.safetensors"))[1]
    gone.unlink()
    sentence(lambda: load(at), f"{gone}: missing; model.safetensors.index.json names it for")


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        ("hf", "model.safetensors", "not a complete safetensors file"),
        ("mistral", "consolidated.safetensors", "not a complete safetensors file"),
        ("meta", "consolidated.01.pth", "cannot be read"),
    ],
)
def test_a_cut_file(folder, kind, name, said):
    at = folder(kind)
    cut_in_half(at / name)
    sentence(lambda: load(at), str(at / name), said)


@pytest.mark.parametrize("junk", [b"", b"\xff" * 40, b"\x10\0\0\0\0\0\0\0{not json at all"])
@pytest.mark.parametrize(
    ("kind", "name"), [("hf", "model.safetensors"), ("meta", "consolidated.00.pth")]
)
def test_a_bad_header(folder, kind, name, junk):
    at = folder(kind)
    (at / name).write_bytes(junk)
    sentence(lambda: load(at), str(at / name), "complete")


@pytest.mark.parametrize(
    "entry", ["../elsewhere.safetensors", "/etc/model.safetensors", "..", 7, None]
)
def test_an_index_does_not_reach_beyond_its_folder(folder, entry):
    at = folder("native")
    index = json.loads((at / "model.safetensors.index.json").read_text())
    edit(at / "model.safetensors.index.json", weight_map=dict.fromkeys(index["weight_map"], entry))
    sentence(lambda: load(at), "model.safetensors.index.json: weight_map")


@pytest.mark.parametrize("kind", ["hf", "native", "meta", "mistral"])
def test_all_wrong_keys_and_shapes_are_in_one_sentence(folder, kind):
    at = folder(kind)
    if kind == "meta":
        for rank in (0, 1):
            path = at / f"consolidated.{rank:02d}.pth"
            state = torch.load(path, weights_only=True)
            state["odd.weight"] = torch.ones(2)
            state["layers.0.feed_forward.w2.weight"] = state["layers.0.feed_forward.w2.weight"][1:]
            del state["layers.1.attention.wq.weight"]
            torch.save(state, path)
        sentence(
            lambda: load(at), "missing layers.1.attention.wq.weight; left over odd.weight; ",
            "layers.0.feed_forward.w2.weight has shape (31, 112)",
        )  # fmt: skip
        return
    if kind == "native":
        save(load(at), at)  # in one file
    (path,) = at.glob("*.safetensors")
    state = load_file(path)
    names = [
        key
        for key in state
        if ("layers.1" in key and "q" in key.split(".")[-2]) or "down_proj" in key
    ]
    lost, short = (
        names[0],
        next(key for key in state if key.endswith(("o_proj.weight", "wo.weight"))),
    )
    del state[lost]
    state[short] = state[short][1:].clone()
    save_file({**state, "odd.weight": torch.ones(2)}, path)
    sentence(
        lambda: load(at), f"missing {lost}", "left over odd.weight", f"{short} has shape (31, 32)"
    )


def test_two_spellings_of_one_key(folder):
    at = folder("hf")
    path = at / "model.safetensors"
    state = load_file(path)
    save_file({**state, "norm.weight": state["model.norm.weight"] + 1}, path)
    sentence(lambda: load(at), "model.norm.weight", " norm.weight", "spellings of one key")


def test_bad_numbers_are_counted_and_said(folder, capsys):
    at = folder("hf")
    state = load_file(at / "model.safetensors")
    state["model.norm.weight"][3:5] = torch.nan
    state["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.inf
    save_file(state, at / "model.safetensors")
    load(at)
    assert "3 weights are NaN or infinite, in 2 tensors, first in" in capsys.readouterr().err
    load(folder("mistral"))
    assert capsys.readouterr().err == ""


def test_large_numbers_of_half_precision_are_no_bad_numbers(tmp_path, capsys):
    model = random_model(tiny_args()).to(torch.float16)
    with torch.no_grad():
        model.output.weight.fill_(60000.0)  # whose sum is beyond the range of the dtype
    save(model, tmp_path)
    load(tmp_path)
    assert capsys.readouterr().err == ""


class Evil:
    """What a pickle can do to the one who opens it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_wants_code(folder, tmp_path, zipped):
    at, ran = folder("meta"), tmp_path / "ran"
    torch.save({"a": torch.ones(1), "b": Evil(str(ran))}, at / "consolidated.00.pth",
               _use_new_zipfile_serialization=zipped)  # fmt: skip
    sentence(lambda: load(at), "consolidated.00.pth: would run posix.mkdir")
    (at / "consolidated.00.pth").write_bytes(pickle.dumps(Evil(str(ran)), protocol=2))
    sentence(lambda: load(at), "consolidated.00.pth")
    assert not ran.exists()


def test_a_pickle_of_the_old_layout_is_read_whole_and_said(folder, capsys):
    at = folder("meta")
    for path in at.glob("*.pth"):
        torch.save(torch.load(path, weights_only=True), path, _use_new_zipfile_serialization=False)
    load(at)
    assert "cannot be mapped" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": {"nested": torch.ones(1)}}, "x: got 'dict'"),
        ({"x": 3}, "x: got 'int'"),
        (
            {"extra": torch.ones(1)},
            "extra is in consolidated.00.pth or in this file, not in both",
        ),
    ],
)
def test_a_state_that_is_not_tensors(folder, change, said):
    at = folder("meta")
    state = torch.load(at / "consolidated.01.pth", weights_only=True)
    torch.save({**state, **change}, at / "consolidated.01.pth")
    sentence(lambda: load(at), "consolidated.01.pth", said)


def test_extra_states_are_tolerated(folder):
    at = folder("meta")
    for path in at.glob("*.pth"):
        state = torch.load(path, weights_only=True)
        torch.save({**state, "layers.0.attention.wo._extra_state": io.BytesIO(b"x")}, path)
    load(at)


def test_a_missing_rank(folder):
    at = folder("meta")
    (at / "consolidated.00.pth").unlink()
    sentence(lambda: load(at), "consolidated.00.pth: missing, consolidated.01.pth is there")
    (at / "consolidated.01.pth").rename(at / "consolidated.00.pth")  # as if there were one rank
    sentence(lambda: load(at), "has shape")


PARAMS_REFUSED = [
    ("meta", {"dim": ...}, "params.json: dim: missing; expected a value"),
    ("meta", {"dim": "x"}, "params.json: dim"),
    ("meta", {"n_heads": 5}, "n_heads: got 5"),
    ("meta", {"vision_chunk_size": 448}, "images by cross-attention"),
    (
        "meta",
        {"quantization_args": {"scheme": "int4_weight_int8_dynamic_activation"}},
        "int4_weight_int8",
    ),
    ("meta", {"lora_args": {"rank": 4}}, "lora_args"),
    (
        "meta",
        {"moe_args": {"top_k": 1}},
        "params.json: moe_args: num_experts: missing; expected a value",
    ),
    ("mistral", {"n_heads": ...}, "params.json: n_heads: missing; expected a value"),
    ("mistral", {"sliding_window": [4, 8]}, "sliding_window: got [4, 8]; expected one size"),
    ("mistral", {"model_type": "mamba"}, "model_type: got 'mamba'"),
    ("mistral", {"quantization": {"qformat_weight": "fp8_e4m3"}}, "quantization: got 'fp8_e4m3'"),
    (
        "meta",
        {"use_scaled_rope": "yes"},
        "params.json: use_scaled_rope: got 'yes'; expected true or false",
    ),
    ("mistral", {"rope_theta": "large"}, "params.json: rope_theta: got 'large'; expected a number"),
    ("mistral", {"tied_embeddings": True}, "output.weight'; it differs from the embeddings"),
    ("mistral", {"yarn": {"factor": 2}}, "yarn: got {'factor': 2}"),
    ("mistral", {"moe": {"num_experts": 4}}, "moe: got {'num_experts': 4}"),
    (
        "mistral",
        {"moe": {"num_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}},
        "moe: got ",
    ),
]


@pytest.mark.parametrize(("kind", "changes", "said"), PARAMS_REFUSED)
def test_params_that_are_refused(folder, kind, changes, said):
    at = folder(kind)
    edit(at / "params.json", **changes)
    sentence(lambda: load(at), said)


@pytest.mark.parametrize("kind", ["meta", "mistral"])
def test_unknown_params_are_said(folder, capsys, kind):
    at = folder(kind)
    edit(at / "params.json", surprise=1)
    read_args(find_model(at).model)
    assert "params.json: keys not read: surprise" in capsys.readouterr().err


QUANTIZED = [
    ("model.layers.0.self_attn.q_proj.qweight", torch.int32),  # GPTQ and AWQ
    ("model.layers.0.mlp.experts.down_proj_blocks", torch.uint8),  # MXFP4
    ("a.weight", torch.uint8),  # bitsandbytes
    ("a.weight", torch.float8_e4m3fn),
    ("a.weight", torch.int32),  # MLX
]


@pytest.mark.parametrize(("key", "dtype"), QUANTIZED)
def test_quantized_weights_are_refused(folder, key, dtype):
    at = folder("hf")
    tensors = {key: torch.ones(4, 4).to(dtype), "a.scales": torch.ones(4)}
    save_file(load_file(at / "model.safetensors") | tensors, at / "model.safetensors")
    sentence(lambda: load(at), f"{at}: {key}: dtype: got {dtype}", "not quantized")


def test_a_tokenizer_beyond_the_embeddings(tmp_path):
    tokenizer = byte_tokenizer()
    for name, size in (("fits", tokenizer.vocab_size), ("short", 200)):
        save(random_model(tiny_args(vocab_size=size)), tmp_path / name, tokenizer=tokenizer)
    assert load_tokenizer(tmp_path / "fits").vocab_size == tokenizer.vocab_size
    sentence(lambda: load_tokenizer(tmp_path / "short"), "expected ids below 200")


def test_special_tokens_beyond_the_embeddings_are_said(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    last = tokenizer.vocab_size - 1
    save(random_model(tiny_args(vocab_size=last)), tmp_path, tokenizer=tokenizer)
    if last in tokenizer.special_ids:
        load_tokenizer(tmp_path)
        assert f"special tokens from id {last} on have no embedding" in capsys.readouterr().err
    else:
        sentence(lambda: load_tokenizer(tmp_path), f"id {last}")


def test_two_mistral_files_side_by_side_are_said(folder, capsys):
    at = folder("mistral")
    torch.save({}, at / "consolidated.00.pth")
    load(at)
    said = "weights are read from consolidated.safetensors; ignored: consolidated.00.pth"
    assert said in capsys.readouterr().err


def test_params_without_weights(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps(MISTRAL_PARAMS["dense"]))
    sentence(
        lambda: load(tmp_path),
        "no weights; expected consolidated.safetensors",
    )
