"""What becomes of errors and signals that no verb has handled."""

import os
import signal

import pytest
import torch

from transom.base.runtime import is_out_of_memory
from transom.cli import main as cli
from transom.cli.main import main

OUT_OF_MEMORY = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:126] DefaultCPUAllocator: can't allocate memory: 1 bytes"
    ),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
)
BUGS = (
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("unsupported memory format option Preserve"),
    ValueError("can't allocate memory for less than one token"),
)


def failing(monkeypatch, error):
    def run(words):
        raise error

    monkeypatch.setattr(cli, "_run", run)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=repr)
def test_memory_that_has_run_out_is_one_sentence(monkeypatch, capsys, error):
    failing(monkeypatch, error)
    assert is_out_of_memory(error)
    assert main(["train"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_a_bug_that_speaks_of_memory_keeps_its_traceback(monkeypatch, error):
    failing(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["train"])


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("verb", ["generate", "eval", "demo"])
def test_every_verb_ends_by_a_signal_with_its_code(monkeypatch, capsys, verb, number, code):
    before = signal.getsignal(number)
    monkeypatch.setattr(cli, "_run", lambda words: os.kill(os.getpid(), number) or signal.pause())
    assert main([verb]) == code
    assert "interrupted" in capsys.readouterr().err
    assert signal.getsignal(number) == before


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["embed", "m", "--pooling", "max"], "--pooling: got 'max'; expected 'mean', 'last'"),
        (["generate", "m", "-p", "a", "-m", "x"], "-m/--max-tokens: got 'x'; expected an integer"),
        (["generate", "m", "-p", "a", "--top-p", "x"], "--top-p: got 'x'; expected a number"),
        (["generate", "m", "-p"], "-p/--prompt: got nothing; expected one argument"),
        (["generate", "m"], "-p/--prompt: got nothing; expected a value"),
        (
            ["train", "--resume", "--overwrite"],
            "--overwrite: got it beside --resume; expected only",
        ),
        (["convert", "a", "b", "--fast"], "arguments: got --fast; expected only known ones"),
        (["train", "optimizer.lr=-1"], "expected a finite number of more than 0.0"),
    ],
)
def test_wrong_command_lines_name_field_value_and_what_is_expected(capsys, words, sentence):
    assert main(words) == 2
    assert sentence in capsys.readouterr().err
