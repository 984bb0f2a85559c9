"""Tiny training runs on a built-in corpus, for the checks of data and training."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from transom.base.errors import notice
from transom.config.model_args import ModelArgs
from transom.training.config import TokenizerArgs, TrainArgs, read_config
from transom.verify.sample_models import small_copy

WORDS = ("the ", "cat ", "sat ", "on ", "a ", "mat, ", "and ", "then ", "it ", "ran.\n")
DOCUMENTS = 24
SEQ_LEN, ROWS = 32, 8  # tokens per row, rows per step
BYTE_VOCABULARY = 258  # bytes, BOS and EOS


def documents() -> dict[str, str]:
    """Documents of unequal length, by file name, with a pattern that a tiny model can learn."""
    return {
        f"{i:02d}.txt": "".join(
            WORDS[(j * (i % 3 + 1)) % len(WORDS)] for j in range(1 + 5 * (i % 7))
        )
        for i in range(DOCUMENTS)
    }


@contextlib.contextmanager
def temporary_corpus() -> Iterator[Path]:
    """A temporary folder with the corpus in `corpus/`; threads and random state are as before
    afterwards.
    """
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    with tempfile.TemporaryDirectory(prefix="transom-verify-") as name:
        folder = Path(name)
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
    """No notices: a check that opens many runs says itself what it found."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def tiny_run(folder: Path, name: str, **changes: Any) -> TrainArgs:
    """A run of a two-layer model in `folder / name`, with top-level fields replaced by
    `changes`.
    """
    base = {
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
    args = read_config(None, base={**base, **changes})
    return in_folder(args, folder, name)


def in_folder(args: TrainArgs, folder: Path, name: str) -> TrainArgs:
    """The same run written into `folder / name`, tokenised shards beside it, on one thread."""
    data = replace(args.data, cache_dir=str(folder / "cache"))
    return replace(args, out=str(folder / name), data=data, threads=1)


def small_run(args: TrainArgs, folder: Path, steps: int) -> TrainArgs:
    """A real run's settings around a shrunken model, bytes and the built-in corpus; says what was
    left out.
    """
    model = args.model_args(None)
    copy = small_copy(model)
    for line in copy.left_out:
        notice(line)
    fields = {**copy.args.to_dict(), "vocab_size": BYTE_VOCABULARY, "max_seq_len": max(SEQ_LEN, 64)}
    rows = args.accumulate * max(2, ROWS // args.accumulate)
    data = replace(
        args.data, sources=str(folder / "corpus"), held_out=0.1, seq_len=SEQ_LEN, batch_size=rows
    )
    return replace(
        args,
        model=ModelArgs.from_dict(fields).to_dict(),
        tokenizer=TokenizerArgs(kind="bytes"),
        data=data,
        steps=steps,
        eval_every=0,
        sample_every=0,
        compile=False,  # of a model this small it is all that one would wait for
        tensorboard=False,
    )
