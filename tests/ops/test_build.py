"""Compiling the C++ files: once, by several processes at a time, and what happens if it fails."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.helpers import random_model, tiny_args
from transom.base.errors import RequestError, collected_notices
from transom.cli.main import main
from transom.inference.loop import generate
from transom.layers.linear import Linear
from transom.ops import build
from transom.quantize.args import QuantizeArgs
from transom.quantize.methods import quantize_model


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has not asked for the library yet, with an empty cache folder."""
    monkeypatch.setenv("TRANSOM_CACHE", str(tmp_path / "cache"))
    build.loaded.cache_clear()
    yield tmp_path
    build.loaded.cache_clear()


def compiler(folder, script, monkeypatch):
    """Make a shell script the only compiler on PATH."""
    tools = folder / "tools"
    tools.mkdir()
    for name in ("sh", "sleep", "cat"):
        (tools / name).symlink_to(shutil.which(name))
    (tools / "c++").write_text(f"#!{shutil.which('sh')}\n{script}\n")
    (tools / "c++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))


# Copies a library in place of compiling: `-o FILE` are the last words.
COPIES = (
    'for out; do :; done; case "$*" in *-dM*) echo macros;; *) sleep 0.2; cat {} > "$out";; esac'
)


def told(folder) -> str:
    """Multiply by a quantized leaf, and return the notice about the ops."""
    torch.manual_seed(0)
    with collected_notices() as notices, torch.no_grad():
        leaf = quantize_model(torch.nn.ModuleDict({"one": Linear(64, 24)}), QuantizeArgs())["one"]
        x = torch.randn(2, 64)
        for _ in range(2):
            torch.testing.assert_close(leaf(x), x @ leaf.weight.t(), rtol=1e-5, atol=1e-5)
    (line,) = {notice for notice in notices if notice.startswith("ops: ")}
    assert "\n" not in line
    return line


def test_without_a_compiler_a_line_says_so(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert told(fresh) == (
        "ops: found no C++ compiler on PATH (c++, g++, clang++); few rows take the slower path "
        "of PyTorch"
    )


def test_a_compiler_that_fails_is_quoted(fresh, monkeypatch):
    compiler(fresh, "echo 'products.cpp:1: error: no vectors' >&2; exit 3", monkeypatch)
    line = told(fresh)
    assert "failed with exit code 3: products.cpp:1: error: no vectors; " in line
    assert not list(fresh.glob("cache/ops/*"))


def test_a_cache_folder_that_cannot_be_written_is_named(fresh, monkeypatch):
    (fresh / "file").touch()
    monkeypatch.setenv("TRANSOM_CACHE", str(fresh / "file" / "cache"))
    compiler(fresh, "echo macros", monkeypatch)
    folder = fresh / "file" / "cache" / "ops"
    assert told(fresh).startswith(
        f"ops: {folder}: could not be written (Not a directory); few rows"
    )


def test_a_damaged_library_is_named(fresh, monkeypatch):
    compiler(fresh, COPIES.format("/dev/null"), monkeypatch)
    with collected_notices():
        path = build.built()
    assert str(path) in told(fresh)


@pytest.mark.parametrize("script", [None, "exit 3", "echo macros"])
def test_generating_goes_on_without_the_library(fresh, monkeypatch, script):
    """Without a compiler, with one that fails, and with a cache folder that can't be written."""
    (fresh / "file").touch()
    monkeypatch.setenv("TRANSOM_CACHE", str(fresh / "file" / "cache"))
    if script is None:
        monkeypatch.setenv("PATH", str(fresh))
    else:
        compiler(fresh, script, monkeypatch)
    model = random_model(tiny_args())
    with collected_notices() as notices:
        tokens = generate(model, [[1, 2, 3]], 6)
    assert [line.partition(":")[0] for line in notices] == ["ops"]
    monkeypatch.setenv(build.SWITCH, "0")
    assert torch.equal(tokens, generate(model, [[1, 2, 3]], 6))


def test_the_library_is_compiled_once(fresh, monkeypatch):
    compiler(fresh, COPIES.format(build.__file__), monkeypatch)
    with ThreadPoolExecutor(3) as executor:  # at the same time, as processes do
        (path,) = set(executor.map(lambda _: build.built(), range(3)))
    assert path.read_bytes() == Path(build.__file__).read_bytes()
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    with collected_notices() as notices:
        assert build.built() == path
    assert notices == []


def test_what_another_process_compiles_is_waited_for(fresh, monkeypatch):
    compiler(fresh, 'case "$*" in *-dM*) echo macros;; *) exit 3;; esac', monkeypatch)

    @contextmanager
    def other(path, *, wait):
        assert wait
        path.write_text("compiled")
        yield

    monkeypatch.setattr(build, "FolderLock", other)
    assert build.built().read_text() == "compiled"


def test_another_processor_or_compiler_or_flag_gets_its_own_library(fresh, monkeypatch):
    compiler(fresh, COPIES.format(build.__file__), monkeypatch)
    first = build.built()
    script = fresh / "tools" / "c++"
    script.write_text(script.read_text().replace("macros", "other-macros"))
    second = build.built()
    assert second != first
    monkeypatch.setattr(build, "FLAGS", ("-O2",))  # it defines the same macros as -O3
    assert build.built() not in (first, second)


def test_the_ops_can_be_turned_off(fresh, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert build.library() is None and not (fresh / "cache").exists()
    monkeypatch.setenv(build.SWITCH, "no")
    with pytest.raises(RequestError, match="TRANSOM_OPS: got 'no'; expected 0 or 1"):
        build.library()


def test_verify_ops_without_a_library_is_an_error(fresh, capsys, monkeypatch):
    monkeypatch.setenv(build.SWITCH, "0")
    assert main(["verify", "ops"]) == 1
    assert "no products in C++ to compare" in capsys.readouterr().err
