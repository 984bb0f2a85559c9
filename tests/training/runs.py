"""A tiny corpus and a tiny run, for tests of training."""

import json
from pathlib import Path

from transom.tokenizers.tokenizer import Tokenizer
from transom.tokenizers.training import byte_tokenizer
from transom.training.config import TrainArgs, read_config

MODEL = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64, "max_seq_len": 64}
WORDS = ["the ", "cat ", "sat ", "on ", "a ", "mat, ", "and ", "then ", "it ", "ran.\n"]


def write_corpus(folder: Path, documents: int = 24) -> Path:
    """Text files of unequal length with a pattern that a tiny model can learn."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(documents):
        words = [WORDS[(j * (i % 3 + 1)) % len(WORDS)] for j in range(20 + 7 * (i % 9))]
        path, text = folder / f"{i:02d}.txt", "".join(words)
        if (
            not path.exists()
        ):  # ranks come here at once: one must not cut a file while the other reads it
            path.write_text(text)
    return folder


def tiny_config(folder: Path, **changes) -> dict:
    """A config of a run that takes a second; `changes` replace top-level fields."""
    return {
        "out": str(folder / "run"),
        "model": dict(MODEL),
        "tokenizer": {"kind": "bytes"},
        "data": {
            "sources": [str(write_corpus(folder / "corpus"))],
            "seq_len": 32,
            "batch_size": 4,
            "held_out": 0.2,
            "cache_dir": str(folder / "cache"),
        },
        "optimizer": {"name": "muon", "lr": 0.01, "weight_decay": 0.0},
        "steps": 12,
        "save_every": 4,
        "threads": 1,
        "device": "cpu",
        "dtype": "float32",  # where the processor makes bfloat16 fast, auto would take it
        **changes,
    }


def tiny_args(folder: Path, *overrides: str, **changes) -> TrainArgs:
    """The same as `TrainArgs`."""
    return read_config(None, overrides, base=tiny_config(folder, **changes))


def losses(run: Path) -> list[float]:
    """The training losses a run has logged, in order of its steps."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if "loss" in row]
    assert steps == sorted(set(steps)), "a step was logged twice or out of order"
    return [row["loss"] for row in rows if "loss" in row]


def without_bos(folder: Path) -> Tokenizer:
    """Bytes with a BOS that the tokenizer never adds, as Qwen's have it; its files are written into
    `folder`.
    """
    byte_tokenizer().save(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    assert content.pop("post_processor")
    file.write_text(json.dumps(content))
    return Tokenizer.load(folder)
