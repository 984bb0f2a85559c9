"""Files that do not open as models are refused in one sentence with their name and the reason."""

import re
import struct

import gguf
import numpy as np
import pytest

from tests.checkpoints.families import tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from transom.base.errors import RequestError
from transom.checkpoints.files.location import find_model
from transom.checkpoints.load import load
from transom.checkpoints.read_args import read_args

VALUES = {
    "context_length": 16,
    "embedding_length": 4,
    "block_count": 1,
    "feed_forward_length": 8,
    "attention.head_count": 2,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def text(value):
    return struct.pack("<Q", len(value)) + value.encode()


def entry(key, kind, content):
    return text(key) + struct.pack("<I", kind) + content


def tensor(name, shape=(4,), kind=0, offset=0):
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(*parts, tensors=0, entries=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, entries) + b"".join(parts)


ARCHITECTURE = entry("general.architecture", 8, text("llama"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return write_gguf(tiny_hf("llama-tied"), folder / "tiny.gguf", folder / "hf")


# What a file contains, and the message after its path.
CONTENTS = {
    "not GGUF": (b"PK\3\4 a zip file", "got b'PK"),
    "empty": (b"", "got b''; expected a GGUF file"),
    "version 1": (header(version=1), "version 1; expected version 2 or 3"),
    "later version": (header(version=4), "version 4; expected version 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "version 3 in big-endian order"),
    "cut counts": (header()[:20], "cut: the file ends within the counts"),
    "2^60 tensors": (header(tensors=2**60), "cut: the file ends within the list of tensors"),
    "2^60 entries": (header(entries=2**60), "cut: the file ends within the metadata"),
    "2^60 numbers": (
        header(entry("a", 9, struct.pack("<IQ", 0, 2**60)), entries=1),
        "cut: the file ends within a",
    ),
    "2^60 strings": (
        header(entry("a", 9, struct.pack("<IQ", 8, 2**60)), entries=1),
        "cut: the file ends within a",
    ),
    "long string": (
        header(entry("a", 8, struct.pack("<Q", 2**63) + b"b"), entries=1),
        "cut: the file ends within a",
    ),
    "type of value": (header(entry("a", 13, bytes(9)), entries=1), "a: got 13; expected the type"),
    "lists in a list": (
        header(entry("a", 9, struct.pack("<IQ", 9, 1)), entries=1),
        "a: got 9; expected the type",
    ),
    "not UTF-8": (
        header(entry("a", 8, struct.pack("<Q", 2) + b"\xff\xfe"), entries=1),
        "a: not UTF-8",
    ),
    "a key twice": (header(ARCHITECTURE, ARCHITECTURE, entries=2), "'general.architecture'; expected each"),
    "a tensor twice": (header(tensor("t"), tensor("t"), tensors=2), "tensors: got 't'; expected each"),
    "dimensions": (header(tensor("t", (1,) * 5), tensors=1), "t: dimensions: got 5; expected at"),
    "unknown type": (header(tensor("t", kind=99), tensors=1), "t: type: got 99; expected F32,"),
    "removed type": (header(tensor("t", kind=4), tensors=1), "t: type: got 4; expected F32,"),
    "half a block": (header(tensor("t", (48,), kind=2), tensors=1), "t: shape: got (48,); expected"),
    "beyond the end": (
        header(tensor("t", (2**40, 2**40)), tensors=1),
        "cut: tensor t ends at byte",
    ),
    "not aligned": (
        header(tensor("t", (1,), offset=4), bytes(64), tensors=1),
        "t: offset: got 4; expected a multiple of the alignment, 32",
    ),
    "alignment": (
        header(entry("general.alignment", 4, struct.pack("<I", 0)), entries=1),
        "general.alignment: got 0; expected a multiple of 8",
    ),
    "no architecture": (header(bytes(64)), "general.architecture: got None; expected llama"),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        "got a Git LFS pointer",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), CONTENTS.values(), ids=CONTENTS)
def test_a_damaged_container(content, message, tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(RequestError) as error:
        find_model(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.9, 0.999])
def test_a_file_cut_anywhere(whole, share, tmp_path):
    path = tmp_path / "cut.gguf"
    content = whole.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RequestError, match=re.escape(f"{path}: cut: ")):
        find_model(path)


def made(path, changes=None, tensors=None, **general):
    """A file of one small layer, with values changed or left out (None)."""
    writer = gguf.GGUFWriter(path, general.pop("architecture", "llama"))
    for key, value in general.items():
        writer.add_string(f"general.{key}", value)
    for key, value in {**VALUES, **(changes or {})}.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if isinstance(value, list):
            writer.add_array(f"llama.{key}", value)
        elif value is not None:
            add[type(value)](f"llama.{key}", value)
    for name, shape in (tensors or {"token_embd.weight": (9, 4)}).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "mamba"}, "general.architecture: got 'mamba'; expected llama, qwen2"),
        ({"architecture": "clip"}, "got the image or audio encoder of a model (mmproj)"),
        ({"type": "adapter"}, "got a LoRA adapter; expected a language model"),
        ({"type": "mmproj"}, "got the image or audio encoder of a model (mmproj)"),
        ({"changes": {"block_count": None}}, "llama.block_count: missing; expected a number"),
        (
            {"changes": {"block_count": 10**9}},
            "llama.block_count: got 1000000000; expected at most 1, the number of tensors",
        ),
        ({"changes": {"block_count": "1"}}, "llama.block_count: got '1'; expected a whole number"),
        ({"changes": {"block_count": 1.5}}, "llama.block_count: got 1.5; expected a whole number"),
        (
            {"changes": {"feed_forward_length": [8, 9]}},
            "llama.feed_forward_length: got [8, 9]; expected a whole number of at least 0, the same",
        ),
        ({"changes": {"attention.head_count": 0}}, "llama.attention.head_count: got 0; expected 1"),
        ({"changes": {"rope.freq_base": float("nan")}}, "llama.rope.freq_base: got nan; expected"),
        (
            {"changes": {"rope.scaling.type": "spiral"}},
            "llama.rope.scaling.type: got 'spiral'; expected none, linear, yarn",
        ),
        (
            {"changes": {"rope.dimension_count": 1}},
            "llama.rope.dimension_count: got 1; expected 2, the size of a head",
        ),
        ({"tensors": {"output.weight": (9, 4)}}, "token_embd.weight: missing; expected a tensor"),
    ],
)
def test_metadata_that_describes_no_model(changes, message, tmp_path):
    path = made(tmp_path / "bad.gguf", **changes)
    with pytest.raises(RequestError) as error:
        find_model(path)
    assert str(error.value).startswith(f"{path}: ") and message in str(error.value)


@pytest.mark.parametrize(
    ("changes", "factor"),
    [
        ({"rope.scale_linear": 4.0}, 4.0),
        ({"rope.scaling.factor": 4.0}, 4.0),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
    ],
)
def test_linear_scaling_is_that_of_llama_cpp_if_keys_are_missing_or_old(changes, factor, tmp_path):
    scaling = read_args(find_model(made(tmp_path / "old.gguf", changes)).model).scaling
    assert (None if scaling is None else (scaling.kind, scaling.factor)) == (
        factor and ("linear", factor)
    )


def test_keys_that_are_not_read_are_named_each_time(tmp_path, capsys):
    path = made(tmp_path / "more.gguf", {"attention.causal": 0})
    for _ in range(2):
        find_model(path)
    assert "keys that are not read: llama.attention.causal" in capsys.readouterr().err


def test_tensors_that_do_not_add_up_are_named_together(tmp_path):
    names = {
        "token_embd.weight": (9, 4),
        "output_norm.weight": (4,),
        "blk.0.attn_q.weight": (4, 5),
        "blk.0.extra": (4,),
    }
    path = made(tmp_path / "bad.gguf", tensors=names)
    with pytest.raises(RequestError) as error:
        load(path)
    for words in (
        f"{path}: keys do not add up: missing blk.0.attn_norm.weight",
        "left over blk.0.extra",
        "blk.0.attn_q.weight has shape (4, 5), which does not make",
    ):
        assert words in str(error.value)
