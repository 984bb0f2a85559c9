"""Rows of tokens to compare models on.

They come from a file, from what a fine-tuning run held out, or from Python's language reference.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from transom.base.errors import RequestError, expect, notice
from transom.base.yaml_files import read_yaml
from transom.checkpoints.files.layout import holds_tokenizer
from transom.checkpoints.files.location import ModelLocation
from transom.checkpoints.open_model import OpenedText, open_text
from transom.config.model_args import ModelArgs
from transom.data.chat.conversations import ChatExample
from transom.data.chat.finetune_sets import read_examples, split_examples
from transom.data.chat.instructions import NAME as STDLIB
from transom.data.chat.rows import ChatEncoder, prompt_ids, template_for
from transom.data.data_sets import NAME
from transom.data.file_formats import row_format
from transom.data.text.sources import Document, SourceArgs, read_documents
from transom.inference.room import keeps_every_token

TOKENS, LENGTH = 4096, 512  # compared in total, and of one row
LOGITS = 2**28  # kept at the same time: 1 GB of float32; large vocabularies get fewer tokens
EXAMPLES = 256  # encoded at a time, far more than `TOKENS` need
# Sources of rows without a file.
RANDOM, BUILT_IN, HELD_OUT = "random tokens", "Python's language reference", "held out of "


@dataclass(frozen=True)
class TokenRows:
    """Rows of token ids, each int64 [T], with their source and the SHA-256 of all ids."""

    source: str
    sha256: str
    rows: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(map(len, self.rows))

    def facts(self) -> dict[str, str | int]:
        """Return the source and the size as plain data."""
        size = {"rows": len(self.rows), "tokens": self.tokens}
        return {"source": self.source, "sha256": self.sha256, **size}


def token_rows(
    found: ModelLocation,
    args: ModelArgs,
    data: str | None = None,
    run: Path | None = None,
    tokens: int = TOKENS,
    joined: bool = False,
) -> TokenRows:
    """Return at most `tokens` tokens to compare models on, or to calibrate with.

    Args:
        found: The model, whose tokenizer and chat template are used. Without a tokenizer the
            tokens are random, with a notice.
        args: The arguments of the model.
        data: Text (a file, folder or glob), or examples as for fine-tuning (a file, `stdlib-docs`,
            or a name of the `datasets` library). None takes what `run` held out, or else Python's
            language reference.
        run: The fine-tuning run of the model.
        tokens: The most tokens. Without `joined` there are fewer if the vocabulary is large.
        joined: Texts follow one another, so that all rows but the last have the same length.

    Raises:
        RequestError: There is no such data, or it has fewer than two tokens.
    """
    most = tokens if joined else min(tokens, max(2, LOGITS // args.vocab_size))
    length = min(LENGTH, args.max_seq_len) if keeps_every_token(args) else LENGTH
    if not any(map(holds_tokenizer, found.folders)):
        expect(data is None, "data", data, f"none, because {found} has no tokenizer")
        notice(f"{found}: no tokenizer, so models are compared on random tokens")
        draws = torch.Generator().manual_seed(0)
        ids = torch.randint(args.vocab_size, (most,), generator=draws).tolist()
        return _rows(RANDOM, [ids], length, most)
    text = open_text(found)
    examples: list[ChatExample] = []
    source = BUILT_IN if data is None else data
    if data is None and run is not None:
        examples = held_out_examples(run)
        source = f"{HELD_OUT}{run}" if examples else BUILT_IN
    elif data is not None and _has_examples(data):
        examples = list(read_examples(data))
    documents: Iterable[Sequence[int]] = ()
    if examples:
        documents = _encoded(examples, text, length)
    else:
        texts = _reference() if data is None else read_documents(SourceArgs(data))
        documents = (text.tokenizer.encode_prompt(one.text) for one in texts)
    if joined:
        documents = [list(itertools.islice(itertools.chain.from_iterable(documents), most))]
    return _rows(source, documents, length, most)


def _reference() -> Iterator[Document]:
    """Yield the topics of Python's language reference, in English, which every Python has."""
    from pydoc_data import topics

    yield from (Document(*item) for item in sorted(topics.topics.items()))


def _has_examples(data: str) -> bool:
    """Return whether a source is a file of rows, or the name of a data set and no path."""
    path = Path(data)
    if path.exists():
        return path.is_file() and row_format(path) is not None
    return data == STDLIB or (NAME.fullmatch(data) is not None and row_format(path) is None)


def held_out_examples(run: Path) -> list[ChatExample]:
    """Return the examples that a fine-tuning run held out, by its `config.yaml`.

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
            out += split_examples(name, fraction)[1]
    except RequestError as error:
        notice(f"{run}: its data is missing ({error}), so models are compared on {BUILT_IN}")
        return []
    return out


def _encoded(examples: list[ChatExample], text: OpenedText, length: int) -> Iterator[list[int]]:
    """Yield the ids of the rows of examples, as in training; of a question, those of its prompt."""
    tokenizer = text.tokenizer
    template = template_for(examples, tokenizer, text.template)
    encoder = ChatEncoder(tokenizer, template, length)
    for start in range(0, len(examples), EXAMPLES):
        few = examples[start : start + EXAMPLES]
        for example in few:
            if example.kind == "answer":
                yield prompt_ids(example, tokenizer, template)
        answered = [example for example in few if example.kind != "answer"]
        for item in encoder.encode(answered).items:
            for row in item:
                yield row.ids.tolist()


def _rows(source: str, documents: Iterable[Sequence[int]], length: int, most: int) -> TokenRows:
    """Cut documents one after the other into rows of 2 to `length` tokens, `most` in total."""
    pieces = (ids[at : at + length] for ids in documents for at in range(0, len(ids), length))
    out: list[Tensor] = []
    left = most
    for piece in pieces:
        row = torch.tensor(piece[:left])
        if len(row) > 1:
            out.append(row)
            left -= len(row)
        if left < 2:
            break
    expect(bool(out), "data", source, "a text of two tokens or more")
    digest = hashlib.sha256(torch.cat(out).numpy().tobytes()).hexdigest()
    return TokenRows(source, digest, tuple(out))
