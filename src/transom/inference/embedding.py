"""One vector per text, from a language model or a model with a head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import WorkError, expect, notice
from transom.base.files import writing
from transom.base.runtime import dtype_name, evaluating
from transom.checkpoints.files.pooling import stated_pooling, tell_other_modules
from transom.checkpoints.files.safetensors_files import write_tensors
from transom.checkpoints.open_model import OpenedModel
from transom.config.layer_args import BASE_HEAD
from transom.layers.inputs import TransformerInput, batches_by_length, pad_rows
from transom.models.llm import LLM, pool
from transom.tokenizers.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # tokens of one forward call, padding included


@dataclass(frozen=True)
class Embeddings:
    """The vectors of a list of texts.

    Attributes:
        vectors_RD: float32 [texts, D] on the CPU.
        logits_RL: [texts, labels] of a model with a classification head, otherwise None.
        pooling: How the tokens of a text were pooled.
        tokens: Number of tokens of all texts.
    """

    vectors_RD: Tensor
    logits_RL: Tensor | None
    pooling: Literal["mean", "last"]
    tokens: int

    def best_labels(self, names: Sequence[str] | None) -> list[dict[str, Any]]:
        """Return the most likely label of each text and its probability.

        `names` are those of the labels; without them the label is its number.
        """
        expect(self.logits_RL is not None, "labels", None, "a classification head")
        assert self.logits_RL is not None, "checked in the line before"
        best = self.logits_RL.double().softmax(1).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [
            {"label": str(i) if names is None else names[i], "probability": p} for i, p in pairs
        ]

    def save(self, file: str | Path) -> None:
        """Write the vectors as the tensor `embeddings` of a .safetensors, or as an .npy array."""
        path = Path(file)
        if path.suffix == ".safetensors":
            write_tensors(path, {"embeddings": self.vectors_RD})
            return
        with writing(path):
            np.save(path, self.vectors_RD.numpy())


def embed(
    opened: OpenedModel,
    texts: Sequence[str],
    *,
    pooling: Literal["mean", "last"] | None = None,
    normalize: bool = False,
) -> Embeddings:
    """Compute one vector per text.

    Args:
        opened: What `open_model` returned.
        texts: Texts of one character or more. Longer ones than `max_seq_len` are cut, and a notice
            counts them.
        pooling: `mean` over the tokens of a text, or its `last` token; None for what the folder
            states, or else the mean.
        normalize: Scale vectors to length 1.

    Raises:
        RequestError: A text is empty, or the model's head has another pooling.
        WorkError: A vector is NaN or infinite.
    """
    model, folder = opened.model, opened.location.model
    for number, text in enumerate(texts, start=1):
        expect(bool(text), f"text {number} of {len(texts)}", text, "1 character or more")
    _tell_spelled(opened.tokenizer, texts)
    rows = encode_texts(opened.tokenizer, texts, model.args.max_seq_len)
    head = model.args.head
    stated = stated_pooling(folder) if head is None or head == BASE_HEAD else head.pooling
    chosen: Literal["mean", "last"] = pooling or stated or "mean"
    tell_other_modules(folder, normalize)
    vectors_RD, logits_RL = run_rows(model, rows, chosen)
    vectors_RD = vectors_RD.float().cpu()
    finite = vectors_RD.isfinite().all(1).tolist()
    if not all(finite):
        raise WorkError(
            f"text {finite.index(False) + 1} of {len(texts)}: got a NaN or infinite vector, as for "
            f"{finite.count(False)} texts in all; expected finite ones: a weight is not finite, or "
            f"values are too large for {dtype_name(model.dtype)}"
        )
    if normalize:
        vectors_RD = vectors_RD / vectors_RD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Embeddings(vectors_RD, logits_RL, chosen, sum(map(len, rows)))


def _tell_spelled(tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Print one notice about texts that spell control tokens, which are read as plain text."""
    found = [spelled for text in texts if (spelled := tokenizer.spelled_in(text))]
    if found:
        example = f"such as {found[0][0]}, which are read as plain text"
        notice(f"{len(found)} of {len(texts)} texts spell control tokens, {example}")


def encode_texts(tokenizer: Tokenizer, texts: Sequence[str], most: int) -> list[list[int]]:
    """Return at most `most` token ids of each text, with the tokens that the tokenizer adds.

    A token that the tokenizer puts after a text stays when the text is cut, because models that are
    pooled at the last token were trained with it. A notice counts the texts that are cut.
    """
    begin, end = tokenizer.begin, tokenizer.end
    rows = tokenizer.encode_batch(texts)
    for text, row in zip(texts, rows, strict=True):
        expect(len(begin) + len(row) > 0, "text", text, "one of 1 token or more")
    added = len(begin) + len(end)
    room = most - added
    expect(room > 0, "max_seq_len", most, f"more than the {added} tokens around a text")
    cut = sum(len(row) > room for row in rows)
    if cut:
        notice(f"{cut} of {len(rows)} texts are longer than {most} tokens: their ends are left out")
    return [[*begin, *row[:room], *end] for row in rows]


class Vectors(NamedTuple):
    """Pooled vectors [R, D] of rows, and logits [R, L] if the model has labels."""

    vectors: Tensor
    logits: Tensor | None


@torch.no_grad()
def run_rows(
    model: LLM, rows: Sequence[Sequence[int]], pooling: Literal["mean", "last"] | None = None
) -> Vectors:
    """Return one vector per row of token ids, in the order of the rows.

    Args:
        model: A language model, or a model with a head.
        rows: Token ids of each row.
        pooling: Needed for a language model, and used for the base of a folder without a head. It
            must otherwise be None or that of the head.

    Raises:
        RequestError: The pooling does not fit the model.
    """
    head, free = model.args.head, model.args.head in (None, BASE_HEAD)
    if head is None:
        expect(pooling is not None, "pooling", pooling, "mean or last")
    elif not free:
        expected = f"{head.pooling}, the pooling of the model's head"
        expect(pooling in (None, head.pooling), "pooling", pooling, expected)
    order, vectors, logits = [], [], []
    for batch in batches_by_length([len(row) for row in rows], BATCH_TOKENS):
        order += batch
        tokens_BT, lengths_B = (one.to(model.device) for one in pad_rows([rows[i] for i in batch]))
        with evaluating(model):
            output = model(TransformerInput(tokens_BT, lengths=lengths_B, logits="none"))
        pooled_BD = output.pooled_BD
        if pooled_BD is None or (free and pooling is not None):
            offsets_T = torch.arange(tokens_BT.size(1), device=model.device)
            positions_BT = torch.where(offsets_T < lengths_B[:, None], offsets_T, -1)
            pooled_BD = pool(output.hidden_BTD, positions_BT, pooling or "mean")
        vectors.append(pooled_BD)
        if head is not None and output.logits is not None:
            logits.append(output.logits)
    back_R = torch.tensor(order, device=model.device).argsort()
    return Vectors(torch.cat(vectors)[back_R], torch.cat(logits)[back_R] if logits else None)
