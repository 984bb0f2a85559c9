"""New special tokens: a larger vocabulary, and rows for it in the embeddings and the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from transom.base.errors import RequestError, expect, notice
from transom.models.llm import LLM
from transom.quantize.leaves import Quantized
from transom.tokenizers.tokenizer import Tokenizer


def add_tokens(
    model: LLM, tokenizer: Tokenizer, tokens: Sequence[str], multiple: int = 1
) -> Tokenizer:
    """Add control tokens to a tokenizer, and rows for them to a model that has too few.

    Args:
        model: the model, changed in place.
        tokenizer: its tokenizer, which stays as it is.
        tokens: the new tokens.
        multiple: added rows are rounded up to a multiple of this.

    Returns:
        The tokenizer with the new tokens.

    Raises:
        RequestError: the tokenizer has one of the tokens already.
    """
    if not tokens:
        return tokenizer
    for token in tokens:
        expect(
            tokenizer.token_to_id(token) is None,
            "new_tokens",
            token,
            "words that are no token yet",
        )
    larger = tokenizer.with_special(tokens)
    if larger.vocab_size > model.args.vocab_size:
        rows = -(-larger.vocab_size // multiple) * multiple
        notice(
            f"{len(tokens)} new tokens: the vocabulary grows from "
            f"{model.args.vocab_size} to {rows} rows"
        )
        resize_vocabulary(model, rows)
    return larger


def with_rows(weight: Tensor, rows: int) -> Tensor:
    """Return a weight [V, D] as [rows, D]; rows that are new are the mean of the others."""
    if rows == len(weight):
        return weight
    more = weight.float().mean(0, keepdim=True).to(weight.dtype).expand(rows - len(weight), -1)
    return torch.cat([weight, more])


@torch.no_grad()
def resize_vocabulary(model: LLM, rows: int) -> None:
    """Enlarge embeddings and output to `rows` rows, in place. New rows are the mean of the old
    ones.

    With the mean, the logit of a new token is near those of the others, and no other logit changes.
    Raise `RequestError` unless `rows` is more than the model has, and the two are not quantized.
    """
    before = model.args.vocab_size
    expect(rows > before, "rows of the vocabulary", rows, f"more than {before}")
    if isinstance(model.tok_embeddings, Quantized) or isinstance(model.output, Quantized):
        raise RequestError("vocabulary: got quantized embeddings or output; expected dense ones")
    for leaf in (model.tok_embeddings, model.output):
        if leaf is None:
            continue
        old = leaf.weight
        leaf.weight = nn.Parameter(with_rows(old, rows), requires_grad=old.requires_grad)
    model.tok_embeddings.num_embeddings = rows
    if model.output is not None:
        model.output.out_features = rows
    model.args = replace(model.args, vocab_size=rows)
