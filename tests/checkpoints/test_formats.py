"""Writing: every format that can hold a model gives every tensor back byte for byte, whole or not
at all.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints.consolidated import (
    PARAMS,
    cut,
    fuse,
    meta_state,
    mistral_state,
    mistral_twin,
    twin,
    write_meta,
)
from tests.checkpoints.families import tiny_hf
from tests.helpers import TINY_VISION, random_model, random_tokens, tiny_args
from transom.base.errors import RequestError, WorkError
from transom.checkpoints.convert import convert
from transom.checkpoints.files import safetensors_files
from transom.checkpoints.files.layout import folder_format
from transom.checkpoints.files.staging import staged
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args
from transom.checkpoints.save import save
from transom.checkpoints.state import open_parameters
from transom.layers.inputs import TransformerInput
from transom.models.llm import LLM

MOE = {"num_experts": 4, "top_k": 2, "hidden_dim": 24}
LLAMA4 = {
    "moe_args": {
        **MOE,
        "routing": "sigmoid",
        "shared_expert": True,
        "interleave_moe_layer_step": 2,
    },
    "n_layers": 4,
    "nope_layer_interval": 4,
    "attention_chunk_size": 8,
    "use_qk_norm": True,
    "attn_temperature_tuning": True,
}
MODELS = {
    "llama": ({}, ("native", "hf", "meta", "mistral")),
    "halves": ({"rope_layout": "halves"}, ("native", "hf", "meta", "mistral")),
    "scaled": ({"use_scaled_rope": True}, ("native", "hf", "meta")),
    "odd-width": ({"hidden_dim": 37}, ("native", "hf", "meta", "mistral")),
    "derived-width": (
        {"hidden_dim": None, "multiple_of": 16, "ffn_dim_multiplier": 1.3},
        ("meta",),
    ),
    "window": ({"sliding_window": 6}, ("native", "hf", "mistral")),
    "mixed": ({"sliding_window": 6, "layer_pattern": "SF"}, ("native", "mistral")),
    "wide-heads": ({"head_dim": 12}, ("native", "hf", "mistral")),
    "mixtral": ({"moe_args": MOE}, ("native", "hf", "mistral")),
    "llama4": (LLAMA4, ("native", "hf", "meta")),
    "llama4-vision": (
        {**LLAMA4, "vision_args": {**TINY_VISION, "image_token": 60}},
        ("native", "meta"),
    ),
    "biased": (
        {"moe_args": {**MOE, "routing": "biased_sigmoid"}, "tie_embeddings": True},
        ("native",),
    ),
}
HELD = [(name, format) for name, (_, formats) in MODELS.items() for format in formats]
NOT_HELD = [
    (name, format)
    for name, (_, formats) in MODELS.items()
    for format in ("meta", "mistral")
    if format not in formats and name != "derived-width"
]


def model_of(name, dtype=torch.float32):
    return random_model(tiny_args(**MODELS[name][0])).to(dtype)


def bytes_of(state):
    return {name: tensor.contiguous().view(torch.uint8).tolist() for name, tensor in state.items()}


def same(first, second):
    return bytes_of(dict(first.named_parameters())) == bytes_of(dict(second.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "format"), HELD)
def test_load_save_load_is_byte_identical(tmp_path, name, format, dtype, capsys):
    save(model_of(name, dtype), tmp_path / "a", format=format)
    first = load(tmp_path / "a")
    save(first, tmp_path / "b", format=format)
    assert folder_format(tmp_path / "b") == format
    again = load(tmp_path / "b")
    assert same(first, again) and again.args == first.args
    assert capsys.readouterr().err == "", "a key was written that no reader of ours knows"
    assert next(again.parameters()).dtype == dtype


@pytest.mark.parametrize(("name", "format"), HELD)
def test_a_written_model_computes_the_same(tmp_path, name, format):
    model, tokens = model_of(name), random_tokens(2, 19)
    save(model, tmp_path, format=format)
    again = load(tmp_path)(TransformerInput(tokens)).logits
    torch.testing.assert_close(again, model(TransformerInput(tokens)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "format"), NOT_HELD)
def test_a_shape_that_a_format_cannot_hold_is_refused(tmp_path, name, format):
    with pytest.raises(RequestError, match=f"format: got '{format}'"):
        save(model_of(name), tmp_path / "out", format=format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", ["meta", "mistral"])
def test_tied_embeddings_are_written_twice_and_said(tmp_path, format, capsys):
    model = random_model(tiny_args(tie_embeddings=True))
    save(model, tmp_path, format=format)
    assert "written twice" in capsys.readouterr().err
    again = load(tmp_path)
    assert torch.equal(again.output.weight, again.tok_embeddings.weight)
    tokens = random_tokens(1, 9)
    assert torch.equal(
        again(TransformerInput(tokens)).logits, model(TransformerInput(tokens)).logits
    )


@pytest.mark.parametrize("kind", ["meta", "mistral"])
def test_files_have_the_names_of_their_makers(tmp_path, kind):
    """What we write, keyed and shaped as the twin's makers would, tensor for tensor."""
    if kind == "meta":
        theirs = twin("llama4-vision")
        expected = meta_state("llama4-vision", theirs)
        source = write_meta(
            tmp_path / "in", PARAMS["llama4-vision"], cut("llama4-vision", expected, 2)
        )
    else:
        theirs = mistral_twin("moe")
        expected = mistral_state("moe", theirs, tmp_path / "hf")
        source = tmp_path / "hf"
    save(load(source), tmp_path / "out", format=kind)
    if kind == "meta":
        got = torch.load(tmp_path / "out" / "consolidated.00.pth", weights_only=True, mmap=True)
    else:
        got = load_file(tmp_path / "out" / "consolidated.safetensors")
    assert set(got) == set(expected)
    assert all(torch.equal(got[key], expected[key]) for key in expected)


@pytest.mark.parametrize("first", ["meta", "native", "mistral"])
def test_a_tour_through_all_formats_ends_where_it_began(tmp_path, first):
    theirs = twin("llama2")
    theirs.save_pretrained(tmp_path / "start")
    steps = {
        "meta": ("meta", "native"),
        "native": ("native", "mistral"),
        "mistral": ("mistral", "meta", "native"),
    }
    source = tmp_path / "start"
    for format in (*steps[first], "hf"):
        convert(source, tmp_path / format, format)
        source = tmp_path / format
    start, end = (
        load_file(tmp_path / "start" / "model.safetensors"),
        load_file(source / "model.safetensors"),
    )
    assert set(start) == set(end) and all(torch.equal(start[key], end[key]) for key in start)


@pytest.mark.parametrize(
    "family", ["mixtral", "phi3", "llama4_text", "gpt_oss", "deepseek_v3", "gemma3_text"]
)
@pytest.mark.parametrize("format", ["hf", "native"])
def test_conversion_is_what_loading_and_saving_does(tmp_path, family, format):
    tiny_hf(family).to(torch.bfloat16).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", format)
    model = load(tmp_path / "in")
    state = {
        name: one.read() for name, one in open_parameters(tmp_path / "out", model.args).items()
    }
    widened = {name: tensor.to(model.get_parameter(name).dtype) for name, tensor in state.items()}
    assert bytes_of(widened) == bytes_of(dict(model.named_parameters()))
    assert {t.dtype for t in state.values()} == {torch.bfloat16}, (
        "what was stored narrow is written narrow"
    )


def test_fused_ranks_convert(tmp_path):
    theirs = twin("llama4")
    states = [fuse(state) for state in cut("llama4", meta_state("llama4", theirs), 4)]
    convert(write_meta(tmp_path / "in", PARAMS["llama4"], states), tmp_path / "out", "hf")
    ids = random_tokens(2, 21)
    mine = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.allclose(mine(ids).logits, theirs(ids).logits, atol=2e-5, rtol=0)


@pytest.mark.parametrize("size", ["9KB", "1B"])
def test_shards_open_in_transformers_and_here(tmp_path, size):
    model = model_of("mixtral")
    save(model, tmp_path, format="hf", max_shard_size=size)
    files = sorted(tmp_path.glob("model-*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert len(files) > 3 and index["metadata"]["total_size"] == total
    assert {file.name for file in files} == set(index["weight_map"].values())
    for file in files:
        state = load_file(file)
        assert len(state) == 1 or sum(tensor.nbytes for tensor in state.values()) <= 9000
    ids = random_tokens(2, 11)
    ours = model(TransformerInput(ids)).logits
    assert torch.allclose(
        AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, ours, atol=1e-5, rtol=0
    )
    assert torch.allclose(load(tmp_path)(TransformerInput(ids)).logits, ours, atol=1e-5, rtol=0)


@pytest.mark.parametrize("format", ["native", "meta"])
def test_another_dtype_is_the_one_rounding(tmp_path, format):
    model = model_of("llama")
    save(model, tmp_path, format=format, dtype="bfloat16")
    for name, weight in load(tmp_path).named_parameters():
        assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16))


def test_choice_bias_stays_wide(tmp_path):
    tiny_hf("deepseek_v3").save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", "native", dtype="bfloat16")
    kinds = {
        name.endswith("choice_bias"): t.dtype
        for name, t in load(tmp_path / "out").named_parameters()
    }
    assert kinds == {True: torch.float32, False: torch.bfloat16}


def test_a_second_model_replaces_the_first(tmp_path):
    save(model_of("mixtral"), tmp_path, format="hf", max_shard_size="9KB")
    (tmp_path / "notes.txt").write_text("mine")
    save(model_of("llama"), tmp_path, format="mistral")
    kept = {path.name for path in tmp_path.iterdir()}
    assert {"notes.txt", "params.json", "consolidated.safetensors"} <= kept
    assert not any(name.startswith(("model", ".")) or name == "config.json" for name in kept)
    assert folder_format(tmp_path) == "mistral" and same(load(tmp_path), model_of("llama"))


class Full(OSError):
    """A disk without room."""


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("format", ["native", "hf", "meta", "mistral"])
def test_nothing_half_written_stays(tmp_path, monkeypatch, format, there):
    out = tmp_path / "out"
    if there:
        save(model_of("llama"), out)
    before = sorted(out.iterdir()) if there else None
    written = safetensors_files._write_tensor
    calls = iter(range(100))

    def fail(file, tensor):
        if next(calls) == 7:
            raise Full("No space left on device")
        written(file, tensor)

    monkeypatch.setattr(safetensors_files, "_write_tensor", fail)
    with pytest.raises(WorkError, match="could not be written"):
        save(model_of("halves"), out, format=format)
    assert (
        (sorted(out.iterdir()) == before and same(load(out), model_of("llama")))
        if there
        else not out.exists()
    )
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if there else [])


def test_an_interruption_leaves_nothing(tmp_path):
    def begin():
        with staged(tmp_path / "out") as folder:
            (folder / "model.safetensors").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"format": "onnx"}, "format: got 'onnx'; expected native, hf, meta, mistral, gguf"),
        ({"dtype": "int8"}, "dtype: got 'int8'"),
        (
            {"max_shard_size": "5 apples"},
            "max_shard_size: got '5 apples'; expected a size like 500MB",
        ),
        ({"max_shard_size": "0GB"}, "max_shard_size: got '0GB'"),
        ({"max_shard_size": "5GB", "format": "mistral"}, "format mistral is one file"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_written(tmp_path, changes, said):
    with pytest.raises(RequestError, match=said):
        save(model_of("llama"), tmp_path / "out", **changes)
    assert list(tmp_path.iterdir()) == []


def test_conversion_into_its_own_source_is_refused(tmp_path):
    save(model_of("llama"), tmp_path)
    with pytest.raises(RequestError, match="that is not read"):
        convert(tmp_path, tmp_path / "." / "")


def test_weights_of_a_read_model_begin_where_allocated_ones_do(tmp_path):
    """They stay in the file's map (test_mapped.py), and its alignment must not change the last bit
    of a product.
    """
    save(model_of("llama"), tmp_path)
    model = load(tmp_path)
    assert all(
        weight.data_ptr() % 64 == 0 and weight.is_contiguous() for weight in model.parameters()
    )
    assert isinstance(model, LLM) and read_args(tmp_path) == model.args
