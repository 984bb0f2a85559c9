"""A loaded model lives in its files' memory maps, and nobody can tell but by the clock and the
memory.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoints.families import tiny_hf
from tests.helpers import random_model, random_tokens, run_python, tiny_args
from transom.checkpoints.files.consolidated import read_pickled
from transom.checkpoints.files.safetensors_files import ALIGNMENT, read_safetensors
from transom.checkpoints.load import load
from transom.checkpoints.save import save
from transom.layers.inputs import TransformerInput

FORMATS = ("native", "hf", "mistral", "meta")
WEIGHTS = "model.safetensors"


def folder_of(at, format="native", dtype=torch.float32, seed=0, **changes):
    save(random_model(tiny_args(**changes), seed).to(dtype), at, format=format)
    return at


def values(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def same(model, expected):
    return all(torch.equal(weight, expected[name]) for name, weight in model.named_parameters())


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def mapped_ranges(folder):
    lines = (line.split() for line in Path("/proc/self/maps").read_text().splitlines())
    ends = [
        line[0].split("-") for line in lines if len(line) > 5 and line[5].startswith(str(folder))
    ]
    return [(int(start, 16), int(end, 16)) for start, end in ends]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's maps from /proc")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", FORMATS)
def test_weights_stay_in_their_files_map(tmp_path, format, dtype):
    model = load(folder_of(tmp_path / "m", format, dtype))
    ranges = mapped_ranges(tmp_path / "m")
    for name, weight in model.named_parameters():
        assert any(start <= weight.data_ptr() < end for start, end in ranges), name


@pytest.mark.parametrize("format", FORMATS)
def test_training_changes_neither_the_file_nor_another_model(tmp_path, format):
    at = folder_of(tmp_path / "m", format)
    before, first, second = digests(at), load(at), load(at)
    expected = values(second)
    optimizer = torch.optim.AdamW(first.parameters(), lr=0.1)
    F.cross_entropy(
        first(TransformerInput(random_tokens(1, 8))).logits[0], random_tokens(1, 8)[0]
    ).backward()
    optimizer.step()
    assert not same(first, expected), "trained"
    assert same(second, expected) and digests(at) == before and same(load(at), expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_model_outlives_the_folder_it_came_from(tmp_path, format):
    at = folder_of(tmp_path / "m", format)
    model = load(at)
    expected = values(model)
    folder_of(at, format, seed=1)  # another model takes its place
    assert not same(load(at), expected) and same(model, expected)
    shutil.rmtree(at)
    assert same(model, expected)


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_model_is_saved_into_the_folder_it_came_from(tmp_path, format):
    at = folder_of(tmp_path / "m", format)
    model = load(at)
    with torch.no_grad():
        model.layers[1].attention.wq.weight.neg_()
    expected = values(model)
    save(model, at, format=format)
    assert same(model, expected) and same(load(at), expected)


def shifted(source, to, by):
    """The folder again, its data `by` bytes behind a line of the cache, as files of other writers
    may have it.
    """
    shutil.copytree(source, to)
    raw = (source / WEIGHTS).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * by
    (to / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    return to


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_where_the_data_of_a_file_begins_changes_no_bit(tmp_path, dtype):
    """float32 is copied to where it should begin; that halves may stay where they are is the
    assumption here.
    """
    args = {
        "dim": 256,
        "hidden_dim": 368,
        "n_heads": 8,
        "n_kv_heads": 2,
    }  # large enough for kernels with an edge
    straight = folder_of(tmp_path / "straight", dtype=dtype, **args)
    askew = load(shifted(straight, tmp_path / "askew", 8))
    model = load(straight)
    for tokens in (random_tokens(1, 1), random_tokens(1, 5), random_tokens(2, 17)):
        logits = [one(TransformerInput(tokens)).logits for one in (model, askew)]
        assert torch.equal(*logits)
    begins = {weight.data_ptr() % ALIGNMENT for weight in askew.parameters()}
    assert begins == ({0} if dtype == torch.float32 else {8})


@pytest.mark.parametrize("family", ["phi3", "llama4"])
def test_weights_cut_out_of_fused_ones_are_whole_and_alone(tmp_path, family):
    """Queries that kept the memory of what they are a part of would keep keys and values a second
    time.
    """
    tiny_hf(family).bfloat16().save_pretrained(tmp_path)
    for name, weight in load(tmp_path).named_parameters():
        assert weight.is_contiguous() and weight.untyped_storage().nbytes() == weight.nbytes, name


def test_weights_that_share_memory_in_a_pickle_do_not_share_it_in_the_model(tmp_path):
    at = folder_of(tmp_path / "m", "meta")
    (path,) = at.glob("*.pth")
    state = {key: tensor.clone() for key, tensor in read_pickled(path).items()}
    torch.save({**state, "output.weight": state["tok_embeddings.weight"]}, path)
    model = load(at)
    with torch.no_grad():
        model.output.weight.zero_()
    assert torch.equal(model.tok_embeddings.weight, state["tok_embeddings.weight"])


def test_written_files_begin_every_tensor_at_a_line_but_behind_odd_sizes(tmp_path):
    model = random_model(tiny_args()).half()
    model.norm.weight = nn.Parameter(
        torch.ones(32, dtype=torch.float32)
    )  # wide, and first in the file
    model.layers[0].attention.wq.weight = nn.Parameter(torch.ones(3, 7).half())  # 42 bytes
    save(model, tmp_path)
    tensors = read_safetensors(tmp_path / WEIGHTS)
    assert tensors.keys() == load_file(tmp_path / WEIGHTS).keys()
    off = [name for name, tensor in tensors.items() if tensor.data_ptr() % ALIGNMENT]
    assert off == [] and tensors["layers.0.attention.wq.weight"].shape == (3, 7)
    places = sorted(tensors, key=lambda name: tensors[name].data_ptr())
    assert (places[0], places[-1]) == ("norm.weight", "layers.0.attention.wq.weight")


@pytest.mark.parametrize(
    ("kept", "value", "dtype", "said"),
    [
        (
            torch.bfloat16,
            float("nan"),
            "float32",
            "1 weights are NaN or infinite",
        ),  # looked for before the cast
        (
            torch.float32,
            1e5,
            "float16",
            "1 weights are NaN or infinite",
        ),  # which the cast makes infinite
        (torch.float32, 1e5, "float64", ""),
    ],
)
def test_bad_numbers_are_counted_as_the_model_has_them(tmp_path, capsys, kept, value, dtype, said):
    at = folder_of(tmp_path / "m", dtype=kept)
    state = load_file(at / WEIGHTS)
    state["output.weight"][3, 4] = value
    save_file(state, at / WEIGHTS)
    load(at, dtype=dtype)
    assert said in capsys.readouterr().err if said else capsys.readouterr().err == ""


def test_loading_and_converting_import_no_compiler(tmp_path):
    """`cat`, `stack` and others import torch's compiler for outlines on the meta device, which
    takes seconds.
    """
    moe = {"moe_args": {"num_experts": 4, "top_k": 2}, "rope_layout": "halves"}
    folder_of(tmp_path / "hf", "hf", **moe)
    out = run_python(f"""
import sys
from transom.checkpoints.convert import convert
from transom.checkpoints.load import load
load({os.fspath(tmp_path / "hf")!r})
for format in ("native", "mistral"):
    convert({os.fspath(tmp_path / "hf")!r}, {os.fspath(tmp_path)!r} + "/" + format, format)
convert({os.fspath(tmp_path / "mistral")!r}, {os.fspath(tmp_path / "back")!r}, "hf")
print([name for name in ("torch._dynamo", "sympy") if name in sys.modules])
""")
    assert out.splitlines()[-1] == "[]"
