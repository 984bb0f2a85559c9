"""GGUF files that `convert` and `save` write, read back by the package `gguf` and by Transom."""

import gguf
import numpy as np
import pytest

from tests.checkpoints.families import tiny_hf
from tests.checkpoints.gguf.files import write_gguf
from tests.checkpoints.gguf.test_families import CASES
from transom.checkpoints.convert import convert


def fields(path):
    """The values of a file's metadata, as the package `gguf` reads them."""
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


def tensors(path):
    """The type, the shape and the bytes of a file's tensors by their names."""
    return {
        one.name: (one.tensor_type.name, list(one.shape)[::-1], one.data.tobytes())
        for one in gguf.GGUFReader(path).tensors
    }


@pytest.mark.parametrize("family", CASES)
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
    # Phi-3 without a window and without a scaling has these two, which change nothing.
    idle = {"phi3.attention.sliding_window": 0, "phi3.rope.scaling.original_context_length": 4096}
    lost = [key for key, one in expected.items() if found.get(key, idle.get(key)) != one]
    assert [key for key in lost if not key.startswith("GGUF.")] == []
