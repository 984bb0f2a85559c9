"""Rows of tokens to compare models on: a file's texts, what a run held out, or texts that are
everywhere.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transom.base.errors import RequestError, notice, require
from transom.base.yaml_files import read_yaml
from transom.chat.template import ChatTemplate
from transom.checkpoints.files.layout import holds_tokenizer
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.open_model import open_tokenizer
from transom.config.model_args import ModelArgs
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_examples, read_splits
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.chat.rows import encode_examples, prompt_ids, template_for
from transom.data.file_formats import row_format
from transom.data.text.sources import SourceArgs, read_documents
from transom.inference.loop import keeps_every_token
from transom.tokenizers.tokenizer import Tokenizer

TOKENS, LENGTH = 4096, 512  # compared in all, and in one row
LOGITS = 2**28  # kept at a time: 1 GB of float32, which shortens the rows of large vocabularies
EXAMPLES = 256  # written at most: far more than `TOKENS` need
# Where rows come from that no file is named for.
RANDOM, BUILT_IN, HELD_OUT = "random tokens", "built-in texts", "held out of "
# Prose and code that every Python brings along: modules of the standard library with long
# documentation.
MODULES = ("argparse", "statistics", "textwrap", "heapq", "bisect", "fractions")


@dataclass(frozen=True)
class TokenRows:
    """Rows [T] of token ids, where they are from, and the SHA-256 of all ids."""

    source: str
    sha256: str
    rows: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """In all rows."""
        return sum(map(len, self.rows))


def token_rows(
    found: ModelLocation,
    args: ModelArgs,
    data: str | None = None,
    run: Path | None = None,
    tokens: int = TOKENS,
) -> TokenRows:
    """At most `tokens` tokens of `data`, else of the examples that the fine-tuning run held out,
    else built in.

    `data` is text (a file, folder or glob), or a file of examples as for fine-tuning, written by
    the model's chat template. A folder without a tokenizer gets random tokens, which is said.
    """
    most = min(tokens, max(2, LOGITS // args.vocab_size))
    length = min(LENGTH, args.max_seq_len) if keeps_every_token(args) else LENGTH
    if not any(map(holds_tokenizer, found.folders)):
        require(data is None, "data", data, f"{found} has no tokenizer for it; expected none")
        notice(f"{found}: no tokenizer, so models are compared on random tokens")
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(args.vocab_size, (most,), generator=draws).tolist()
        return _rows(RANDOM, [ids], length, most)
    tokenizer = open_tokenizer(found)
    if data is not None:
        if data == STDLIB or (row_format(data) is not None and Path(data).is_file()):
            return _rows(
                data, _written(read_examples(data), found, tokenizer, length), length, most
            )
        texts: Iterable[str] = (document.text for document in read_documents(SourceArgs(data)))
        return _rows(data, (_encoded(tokenizer, text) for text in texts), length, most)
    held = [] if run is None else held_out_examples(run)
    if held:
        return _rows(f"{HELD_OUT}{run}", _written(held, found, tokenizer, length), length, most)
    texts = (inspect.getsource(importlib.import_module(name)) for name in MODULES)
    return _rows(BUILT_IN, (_encoded(tokenizer, text) for text in texts), length, most)


def held_out_examples(run: Path) -> list[ChatExample]:
    """Return what a fine-tuning run measured with, by its `config.yaml`.

    If its data is missing, the list is empty and a notice gives the reason.
    """
    path = run / "config.yaml"
    config = read_yaml(path) if path.exists() else {}
    if not config.get("finetune"):
        return []
    sources, fraction = config["data"]["sources"], float(config["data"]["held_out"])
    out: list[ChatExample] = []
    try:
        for source in [sources] if isinstance(sources, str) else sources:
            name = str(source["path"] if isinstance(source, dict) else source)
            out += read_splits(name, fraction)[1]
    except RequestError as error:
        notice(f"{run}: its data is not to be had ({error}), so models are compared on {BUILT_IN}")
        return []
    return out


def _written(
    examples: list[ChatExample], found: ModelLocation, tokenizer: Tokenizer, length: int
) -> Iterator[list[int]]:
    """Ids of the rows that examples make, as in training; of a prompt without an answer, its
    own.
    """
    template = template_for(examples, tokenizer, ChatTemplate.find(found.folders, tokenizer))
    few = examples[:EXAMPLES]
    for example in few:
        if example.kind == "answer":
            yield prompt_ids(example, tokenizer, template)
    answered = [example for example in few if example.kind != "answer"]
    rows = encode_examples(answered, tokenizer, template, seq_len=length).items if answered else []
    for item in rows:
        for row in item:
            yield row.ids.tolist()


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode_prompt(text)


def _rows(source: str, documents: Iterable[Sequence[int]], length: int, at_most: int) -> TokenRows:
    """Rows of 2 to `length` tokens, cut from one document after the other until they hold
    `at_most`.
    """
    out: list[Tensor] = []
    left = at_most
    for ids in documents:
        for start in range(0, len(ids), length):
            row = torch.tensor(ids[start : start + min(length, left)])
            if len(row) > 1:
                out.append(row)
                left -= len(row)
            if left < 2:
                break
        if left < 2:
            break
    if not out:
        raise RequestError(
            f"data: got {source!r}; less than two tokens in it; expected text to compare models on"
        )
    digest = hashlib.sha256(torch.cat(out).numpy().tobytes()).hexdigest()
    return TokenRows(source, digest, tuple(out))
