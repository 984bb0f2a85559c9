"""Small training runs on a built-in corpus."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from transom.config.model_args import ModelArgs
from transom.training.config import TokenizerArgs, TrainArgs, read_config
from transom.verify.sample_models import small_copy

WORDS = ("the ", "cat ", "sat ", "on ", "a ", "mat, ", "and ", "then ", "it ", "ran.\n")
DOCUMENTS = 24
SEQ_LEN, ROWS = 32, 8  # tokens per row, rows per step
BYTE_VOCABULARY = 258  # bytes, BOS and EOS


def documents() -> dict[str, str]:
    """Return documents of unequal length by file name, with a pattern that a model can learn."""
    texts = {}
    for index in range(DOCUMENTS):
        step, count = index % 3 + 1, 1 + 5 * (index % 7)
        words = [WORDS[at * step % len(WORDS)] for at in range(count)]
        texts[f"{index:02d}.txt"] = "".join(words)
    return texts


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Give an empty folder, which is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="transom-verify-") as name:
        yield Path(name)


@contextlib.contextmanager
def temporary_corpus() -> Iterator[Path]:
    """Give a temporary folder with the documents in `corpus/`.

    Threads and random state are restored afterwards.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with temporary_folder() as folder:
        (folder / "corpus").mkdir()
        for file, text in documents().items():
            (folder / "corpus" / file).write_text(text, encoding="utf-8")
        try:
            yield folder
        finally:
            torch.set_num_threads(threads)
            torch.set_rng_state(state)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print no notices inside the context or, as a decorator, in a function.

    Checks open many models and runs.
    """
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def tiny_run(folder: Path, name: str, **changes: Any) -> TrainArgs:
    """Return the settings of a run of a two-layer model, with fields replaced by `changes`."""
    fields = {
        "model": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32, "max_seq_len": SEQ_LEN},
        "tokenizer": {"kind": "bytes"},
        "data": {
            "sources": str(folder / "corpus"),
            "seq_len": SEQ_LEN,
            "batch_size": ROWS,
            "held_out": 0.1,
        },
        "optimizer": {"name": "muon", "lr": 0.01},
        "steps": 6,
        "device": "cpu",
        "dtype": "float32",
    }
    return in_folder(read_config(None, base={**fields, **changes}), folder, name)


def in_folder(args: TrainArgs, folder: Path, name: str) -> TrainArgs:
    """Return the same run on one thread, written into `folder / name` with its cache beside it."""
    data = replace(args.data, cache_dir=str(folder / "cache"))
    return replace(args, out=str(folder / name), data=data, threads=1)


def small_run(args: TrainArgs, folder: Path, steps: int) -> TrainArgs:
    """Return the settings of a real run for a small copy of its model, bytes and the corpus."""
    small = small_copy(args.model_args(None), "model")
    fields = {**small.to_dict(), "vocab_size": BYTE_VOCABULARY, "max_seq_len": max(SEQ_LEN, 64)}
    rows = args.accumulate * max(2, ROWS // args.accumulate)
    sources = str(folder / "corpus")
    data = replace(args.data, sources=sources, held_out=0.1, seq_len=SEQ_LEN, batch_size=rows)
    return replace(
        args,
        model=ModelArgs.from_dict(fields).to_dict(),
        tokenizer=TokenizerArgs(kind="bytes"),
        data=data,
        steps=steps,
        eval_every=0,
        sample_every=0,
        compile=False,  # compilation would take longer than the run
        tensorboard=False,
    )
