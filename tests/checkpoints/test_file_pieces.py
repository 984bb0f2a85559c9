"""Bytes are read where they are, past the page cache or not."""

import pytest
import torch

from transom.checkpoints.files import file_pieces
from transom.checkpoints.files.file_pieces import PAGE, SourceFile

SIZE = 6 * PAGE + 700


@pytest.fixture
def source(tmp_path):
    """An open file of random bytes, and these."""
    content = torch.randint(256, (SIZE,), dtype=torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    return SourceFile(tmp_path / "file"), content


@pytest.mark.parametrize("shift", [0, 64])  # 64: address and place differ in their pages
@pytest.mark.parametrize(
    ("start", "end"), [(0, SIZE), (100, 4 * PAGE), (PAGE, PAGE + 64), (300, 2 * PAGE + 5)]
)
def test_places_within_pages_do_not_matter(source, start, end, shift, monkeypatch):
    file, content = source
    monkeypatch.setattr(file_pieces, "PIECE", 2 * PAGE)
    memory = torch.zeros(SIZE + 2 * PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE + start % PAGE + shift
    file.read_into(memory[first : first + end - start], start)
    expected = torch.zeros_like(memory)
    expected[first : first + end - start] = content[start:end]
    assert torch.equal(memory, expected)


def test_a_file_system_may_refuse_direct_reads(source, monkeypatch):
    file, content = source
    given = file_pieces.os.preadv

    def refuse(descriptor, *rest):
        if descriptor == file._direct:
            raise OSError(22, "Invalid argument")
        return given(descriptor, *rest)

    monkeypatch.setattr(file_pieces.os, "preadv", refuse)
    memory = torch.zeros(SIZE + PAGE, dtype=torch.uint8)
    out = memory[-memory.data_ptr() % PAGE :][:SIZE]
    file.read_into(out, 0)
    assert torch.equal(out, content)
