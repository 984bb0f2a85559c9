"""GGUF files that `convert` and `save` write, read back by the package `gguf` and by Transom."""

import resource

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.checkpoints.families import random_ids, tiny_hf
from tests.checkpoints.gguf.files import random_blocks, write_gguf
from tests.checkpoints.gguf.test_families import CASES
from tests.checkpoints.gguf.vocabularies import byte_pairs
from transom.base.errors import RequestError, WorkError, collected_notices
from transom.checkpoints.convert import convert
from transom.checkpoints.load import load
from transom.checkpoints.open_model import load_tokenizer
from transom.checkpoints.save import save
from transom.cli.main import main


def fields(path):
    """The values of a file's metadata, as the package `gguf` reads them."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    """The type, the shape and the bytes of a file's tensors by their names."""
    return {
        one.name: (one.tensor_type.name, list(one.shape)[::-1], one.data.tobytes())
        for one in gguf.GGUFReader(path).tensors
    }


# Phi-3 that rotates complete heads is written as Llama.
@pytest.mark.parametrize("family", [family for family in CASES if family != "phi3"])
def test_a_file_has_the_tensors_and_settings_of_llama_cpp(family, tmp_path):
    model = tiny_hf(family, **CASES[family])
    theirs = write_gguf(model, tmp_path / "theirs.gguf", tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "ours.gguf")
    found, expected = tensors(tmp_path / "ours.gguf"), tensors(theirs)
    assert found.keys() == expected.keys()
    for name, one in expected.items():
        if name.startswith("rope_"):
            pair = (np.frombuffer(data, np.float32) for _, _, data in (found[name], one))
            np.testing.assert_allclose(*pair, rtol=1e-6)
        else:
            assert found[name] == one, name
    found, expected = fields(tmp_path / "ours.gguf"), fields(theirs)
    lost = [key for key, one in expected.items() if (found.get(key) or 0) != one]
    assert [key for key in lost if not key.startswith("GGUF.")] == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folder_to_file_to_folder_is_exact(dtype, tmp_path):
    tiny_hf("llama").to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "a.gguf")
    convert(tmp_path / "a.gguf", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "b.gguf")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("in", "out"))
    assert before.keys() == after.keys()
    for name, one in before.items():
        assert one.dtype == after[name].dtype and torch.equal(one, after[name]), name
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")


@pytest.mark.parametrize("dtype", ["q8_0", "q4_0", "q4_1"])
def test_codes_are_those_of_the_package(dtype, tmp_path):
    model = tiny_hf("mixtral", sliding_window=None, hidden_size=64)
    write_gguf(model, tmp_path / "wide.gguf", tmp_path / "hf")
    with collected_notices() as notices:
        convert(tmp_path / "hf", tmp_path / "codes.gguf", dtype=dtype)
    wide = {one.name: one.data for one in gguf.GGUFReader(tmp_path / "wide.gguf").tensors}
    for name, (kind, shape, data) in tensors(tmp_path / "codes.gguf").items():
        ends = name in ("token_embd.weight", "output.weight")
        expected = Type.Q8_0 if ends else Type[dtype.upper()]
        if len(shape) == 1 or "ffn_gate_inp" in name:
            expected = Type.F32
        elif shape[-1] % 32:
            expected = Type.F16
        assert kind == expected.name, name
        assert data == gguf.quants.quantize(wide[name], expected).tobytes(), name
    assert [one for one in notices if one.startswith("2 tensors are F16: their row length")]
    assert fields(tmp_path / "codes.gguf")["general.file_type"] == gguf.LlamaFileType[f"MOSTLY_{dtype.upper()}"]  # fmt: skip


@pytest.mark.parametrize(("kind", "dtype"), [("Q4_1", "q4_1"), ("Q6_K", None)])
def test_codes_of_a_file_are_copied(kind, dtype, tmp_path):
    """The codes are random, so quantizing their numbers would make others."""
    model = tiny_hf("qwen2", use_sliding_window=False, hidden_size=256, intermediate_size=256)
    write_gguf(model, tmp_path / "in.gguf", tmp_path / "hf", kind=Type[kind])
    content = bytearray((tmp_path / "in.gguf").read_bytes())
    for one in gguf.GGUFReader(tmp_path / "in.gguf").tensors:
        if one.tensor_type == Type[kind]:
            blocks = one.n_elements // gguf.GGML_QUANT_SIZES[Type[kind]][0]
            start, made = one.data_offset, random_blocks(Type[kind], (blocks,)).tobytes()
            content[start : start + len(made)] = made
    (tmp_path / "random.gguf").write_bytes(content)
    convert(tmp_path / "random.gguf", tmp_path / "out.gguf", dtype=dtype)
    before, after = tensors(tmp_path / "random.gguf"), tensors(tmp_path / "out.gguf")
    ends = () if dtype is None else ("token_embd.weight", "output.weight")
    assert {name: after[name] for name in before if name not in ends} == {
        name: one for name, one in before.items() if name not in ends
    }


def test_a_written_file_has_the_tokenizer_of_its_folder(tmp_path):
    tiny_hf("llama-tied", vocab_size=700).save_pretrained(tmp_path / "hf")
    byte_pairs().save(str(tmp_path / "hf" / "tokenizer.json"))
    (tmp_path / "hf" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / "a.gguf")]) == 0
    stated, text = fields(tmp_path / "a.gguf"), "Some words, 123 and <|turn|>"
    assert stated["tokenizer.chat_template"] == "{{ messages[0].content }}"
    assert len(stated["tokenizer.ggml.tokens"]) == 700
    own, read = load_tokenizer(tmp_path / "hf"), load_tokenizer(tmp_path / "a.gguf")
    assert own.encode_prompt(text) == read.encode_prompt(text)


def test_save_writes_the_file_that_convert_writes(tmp_path):
    tiny_hf("qwen3", attention_bias=False, vocab_size=450).save_pretrained(tmp_path / "hf")
    byte_pairs().save(str(tmp_path / "hf" / "tokenizer.json"))
    convert(tmp_path / "hf", tmp_path / "a.gguf", dtype="q8_0")
    tokenizer = load_tokenizer(tmp_path / "hf")
    save(load(tmp_path / "hf"), tmp_path / "b.gguf", "gguf", tokenizer, "q8_0")
    assert tensors(tmp_path / "a.gguf") == tensors(tmp_path / "b.gguf")
    assert fields(tmp_path / "a.gguf") == fields(tmp_path / "b.gguf")


def test_transformers_reads_a_written_file(tmp_path):
    model = tiny_hf("llama-tied")
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "a.gguf")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")
    ids = random_ids()
    assert torch.allclose(read(ids).logits, model(ids).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "fields", "named"),
    [
        ("llama-dynamic", {}, "dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 20}, "softmax_scale"),
        ("qwen3_moe-raw", {"use_sliding_window": False}, "moe_args"),
        ("deepseek_v3", {}, "a model of llama, qwen2"),
    ],
)
def test_what_gguf_cannot_state_is_named(family, fields, named, tmp_path):
    tiny_hf(family, **fields).save_pretrained(tmp_path / "hf")
    with pytest.raises(RequestError, match=named):
        convert(tmp_path / "hf", tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_a_window_that_llama_cpp_ignores_is_reported(tmp_path):
    tiny_hf("mistral").save_pretrained(tmp_path / "hf")
    with collected_notices() as notices:
        convert(tmp_path / "hf", tmp_path / "a.gguf")
    assert "llama.cpp ignores sliding_window = 7 of the family llama" in notices
    assert load(tmp_path / "a.gguf").args.sliding_window == 7


def test_an_existing_file_is_replaced_completely_or_not_at_all(tmp_path, capsys):
    tiny_hf("llama-tied").save_pretrained(tmp_path / "hf")
    file, words = tmp_path / "a.gguf", ["convert", str(tmp_path / "hf"), str(tmp_path / "a.gguf")]
    file.write_bytes(b"mine")
    assert main(words) == 2
    assert "which exists; expected a new file, or --overwrite" in capsys.readouterr().err
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(WorkError, match="could not be written"):
            convert(tmp_path / "hf", file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == b"mine"
    assert main([*words, "--overwrite"]) == 0 and load(file)
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "a.gguf"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a.gguf", "--format", "hf"], "format: got 'hf'; expected gguf, as OUT ends in .gguf"),
        (["a.gguf", "--dtype", "float64"], "dtype: got 'float64'; expected f32, f16, bf16"),
        (["out", "--dtype", "q8_0"], "dtype: got 'q8_0'; expected float32"),
        (["a.gguf", "--max-shard-size", "1GB"], "format gguf is one file"),
        (["hf", "--format", "gguf"], "a folder; expected a new file"),
    ],
)
def test_wrong_requests_are_one_sentence(words, said, tmp_path, capsys):
    tiny_hf("llama-tied").save_pretrained(tmp_path / "hf")
    out, *options = words
    capsys.readouterr()
    assert main(["convert", str(tmp_path / "hf"), str(tmp_path / out), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"hf"}
