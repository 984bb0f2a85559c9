"""`transom demo`: the main job on text every machine has, the Python standard library's own
source.
"""

from __future__ import annotations

import argparse
import gzip
import lzma
import platform
import shlex
import sysconfig
from collections.abc import Iterable
from typing import Any

from transom.base.errors import WorkError, expect
from transom.base.interrupts import Background
from transom.cli.options import option
from transom.cli.runs import add_run_options, names_of, run_training
from transom.training.config import read_config
from transom.training.effects import check_effects

EXCLUDED = ("site-packages", "test", "tests", "idlelib", "lib2to3", "encodings")

# The beginnings of a function body, a class and a docstring.
PROMPTS = {
    "a function": "def get(self, key, default=None):\n    ",
    "a class": "class ConnectionError(Exception):\n",
    "a docstring": 'def parse_date(text):\n    """Return',
}

# The measurements of `compress` by name, as the table shows them.
COMPRESSORS = {
    "xz_primed": "xz -9e, training files in front",
    "xz": "xz -9e, all held-out files at once",
    "gzip": "gzip -9, all at once",
    "xz_per_file": "xz -9e, file by file",
    "gzip_per_file": "gzip -9, file by file",
}

# Tuned for two cores and less than three minutes, fixed by steps and seed so that it repeats; a
# plain Llama, so that its folder opens in other tools.
CONFIG: dict[str, Any] = {
    "out": "runs/demo",
    "model": {"preset": "demo"},
    "tokenizer": {"kind": "bpe", "vocab_size": 2048},
    "data": {"seq_len": 256, "batch_size": 8, "held_out": 0.08},
    "optimizer": {
        "name": "muon",
        "muon_lr": 0.015,
        "lr": 0.015,
        "output_lr": 0.006,
        "eps": 1e-10,
        "weight_decay": 0.0,
        "max_grad_norm": None,
    },
    "schedule": {"kind": "wsd", "warmup": 0.03, "decay": 0.7, "final": 0.02},
    "steps": 780,
    "short_rows": 0.6,
    "save_every": 195,
    "eval_every": 130,
    "eval_tokens": 20_000,
    "sample_every": 260,
    "sample_prompts": ["class ConnectionError(Exception):\n"],
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the verb."""
    what = "a field and its value, as for `transom train`"
    option(parser, "key=value", what, dest="overrides", nargs="*")
    add_run_options(parser)


def run(options: argparse.Namespace) -> dict[str, Any] | int:
    """Train, compare with compressors, show three completions and print the next commands."""
    config = {**CONFIG, "data": {**CONFIG["data"], "sources": [library()]}}
    args = read_config(None, options.overrides, base=config)
    check_effects(args, names_of(options.overrides))
    sources, share = args.data.source_list, args.data.held_out
    paths = [one.path for one in sources]
    expect(len(sources) == 1, "data.sources", paths, "one source in the demo")
    expect(share > 0, "data.held_out", share, "more than 0 in the demo")
    trainer, final, code = run_training(args, options)
    if trainer.stop.signal is not None:
        return code
    from transom.data.text.sources import held_out, read_split

    train_texts: list[bytes] = []
    held_texts: list[bytes] = []
    for document in read_split(sources[0], share):
        part = held_texts if held_out(document.id, share) else train_texts
        part.append(document.text.encode())
    if not held_texts:
        raise WorkError("no file was held out: nothing to compare; try a larger data.held_out")
    trainer.line.say("compressing the same files with xz and gzip ...")
    other = compress(train_texts, held_texts)
    print(comparison(final.bits_per_byte, other, len(held_texts), sum(map(len, held_texts))))
    show_completions(trainer.model, trainer.tokenizer)
    print(next_commands(args.out))
    p = trainer.progress
    return {
        "run": args.out,
        "parameters": sum(weight.numel() for weight in trainer.model.parameters()),
        "train_tokens": p.tokens,
        "train_seconds": round(p.seconds, 2),
        "tokens_per_second": round(p.tokens / p.seconds, 1),
        "val_bits_per_byte": round(final.bits_per_byte, 4),
        **{f"{name}_bits_per_byte": round(bits, 4) for name, bits in other.items()},
        "python_version": platform.python_version(),
        "corpus_sha256": trainer.data.hashes[sources[0].label],
    }


def library() -> dict[str, Any]:
    """Return the folder of the standard library as a data source."""
    path = sysconfig.get_paths()["stdlib"]
    name = "python-stdlib"
    return {"path": path, "name": name, "include": ["*.py"], "exclude": list(EXCLUDED)}


def compress(train_texts: list[bytes], held_texts: list[bytes]) -> dict[str, float]:
    """Return the bits per byte of the held-out files with general compressors at their strongest.

    The fair comparison is `xz_primed`: what the files add to the training files, which the model
    has seen, too.
    """
    train, held = b"".join(train_texts), b"".join(held_texts)
    # Compression releases the interpreter lock; in the background it does not delay a signal.
    alone = Background(lambda: xz_bytes([train]))
    together = Background(lambda: xz_bytes([train + held]))
    primed = together.result() - alone.result()
    rest = Background(lambda: (xz_bytes([held]), xz_bytes(held_texts)))
    xz, xz_per_file = rest.result()
    gzip_per_file = sum(len(gzip.compress(text, 9)) for text in held_texts)
    sizes = (primed, xz, len(gzip.compress(held, 9)), xz_per_file, gzip_per_file)
    return {name: 8.0 * size / len(held) for name, size in zip(COMPRESSORS, sizes, strict=True)}


def xz_bytes(texts: Iterable[bytes]) -> int:
    """Total size of texts compressed one by one by `xz -9e`, with the largest dictionary (64
    MiB).
    """
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return sum(len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=filters)) for text in texts)


def comparison(model_bits: float, other: dict[str, float], files: int, size: int) -> str:
    """Return the table of held-out bits per byte."""
    bits = {"this model": model_bits, **{COMPRESSORS[name]: one for name, one in other.items()}}
    title = f"\nbits per byte of {files:,} held-out files ({size:,} bytes), fewer is better:"
    return "\n".join([title, *(f"  {name:36} {one:6.3f}" for name, one in bits.items())])


def show_completions(model: Any, tokenizer: Any) -> None:
    """Print three completions."""
    from transom.inference.sampling import SamplingArgs
    from transom.inference.text import complete

    sampling = SamplingArgs(temperature=0.7, top_p=0.95, repetition_penalty=1.1, seed=1)
    prompts = list(PROMPTS.values())
    rows = complete(model, tokenizer, prompts, max_new_tokens=96, sampling=sampling)
    for (what, prompt), row in zip(PROMPTS.items(), rows, strict=True):
        text = "\n".join("    " + line for line in (prompt + row.text).rstrip().splitlines())
        print(f"\n{what}, as the model continues it:\n\n{text}")


def next_commands(run: str) -> str:
    """Return the commands to try now, ready for a shell."""
    report, run = f"{run}/report.html", shlex.quote(run)
    return f"""
next:
  transom finetune {run} --data stdlib-docs
  transom chat {run}
  transom generate {run} --prompt "import os"
  transom inspect {run}
  transom train data.sources=my_texts out=runs/mine
and look at {report}"""
