"""New special tokens: a larger vocabulary, and rows for it in the embeddings and the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from transom.base.errors import notice, require
from transom.models.llm import LLM
from transom.tokenizers.tokenizer import Tokenizer


def add_tokens(
    model: LLM, tokenizer: Tokenizer, tokens: Sequence[str], multiple: int = 1
) -> Tokenizer:
    """The tokenizer with `tokens` as control tokens, and rows for all of it in the model, in place.

    Rows are rounded up to a `multiple` where rows are added. A token that is there already is a
    `RequestError`.
    """
    if not tokens:
        return tokenizer
    for token in tokens:
        known = tokenizer.token_to_id(token) is not None
        require(not known, "new_tokens", token, "expected words that are no token yet")
    larger = tokenizer.with_special(tokens)
    if larger.vocab_size > model.args.vocab_size:
        rows = -(-larger.vocab_size // multiple) * multiple
        notice(
            f"{len(tokens)} new tokens: the vocabulary grows from {model.args.vocab_size} to "
            f"{rows} rows"
        )
        resize_vocabulary(model, rows)
    return larger


@torch.no_grad()
def resize_vocabulary(model: LLM, rows: int) -> None:
    """Give embeddings and output `rows` rows, more than they have; new ones are the mean of the
    old, in place.

    The mean starts a new token where the others are: its logit is near theirs, and no other one
    moves.
    """
    before = model.args.vocab_size
    require(
        rows > before,
        "rows of the vocabulary",
        rows,
        f"expected more than the {before} there are",
    )
    for leaf in (model.tok_embeddings, model.output):
        if leaf is None:
            continue
        old = leaf.weight
        more = old.float().mean(0, keepdim=True).to(old.dtype).expand(rows - len(old), -1)
        leaf.weight = nn.Parameter(torch.cat([old, more]), requires_grad=old.requires_grad)
    model.tok_embeddings.num_embeddings = rows
    if model.output is not None:
        model.output.out_features = rows
        if model.output.bias is not None:
            bias = model.output.bias
            model.output.bias = nn.Parameter(torch.cat([bias, bias.mean().expand(rows - before)]))
    model.args = replace(model.args, vocab_size=rows)
