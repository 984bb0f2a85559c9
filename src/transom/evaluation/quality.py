"""How much of a model other forms of it keep on held-out text: bits per byte, KL, first choices.

All models read the same rows, and the logits of one row are in memory.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from transom.base.errors import RequestError, WorkError, notice
from transom.data.cache import with_progress
from transom.evaluation.agreement import agreement, logits_of, next_tokens
from transom.evaluation.intervals import Ratio
from transom.evaluation.token_rows import TokenRows
from transom.models.llm import LLM
from transom.planning.tables import counted
from transom.tokenizers.tokenizer import Tokenizer

ORIGINAL = "original"
SHARED = 32  # neighbouring tokens that held-out text may not share with other text


def unseen(rows: TokenRows, seen: Sequence[Tensor]) -> TokenRows:
    """Return the rows that share no 32 neighbouring tokens with those of other text.

    Raises:
        RequestError: There is no such row.
    """
    known = {run for row in seen for run in _runs(row)}
    kept = tuple(row for row in rows.rows if known.isdisjoint(_runs(row)))
    if not kept:
        expected = "text that the calibration has read; expected other text"
        raise RequestError(f"held_out: got {rows.source!r}, {expected}")
    if len(kept) < len(rows.rows):
        left_out = counted(len(rows.rows) - len(kept), "row")
        notice(f"{rows.source}: {left_out} left out of it, which the calibration has read")
    return replace(
        rows, rows=kept, sha256=hashlib.sha256(torch.cat(kept).numpy().tobytes()).hexdigest()
    )


def _runs(row: Tensor) -> set[bytes]:
    windows = row.unfold(0, SHARED, 1) if len(row) >= SHARED else row.unsqueeze(0)
    return {window.numpy().tobytes() for window in windows}


def text_bytes(tokenizer: Tokenizer, row: Tensor) -> int:
    """Return the bytes of UTF-8 that the tokens of a row after its first one stand for."""
    every, first = (tokenizer.decode(ids.tolist()) for ids in (row, row[:1]))
    return len(every.encode()) - len(first.encode())


def measure_quality(
    original: LLM,
    others: Mapping[str, LLM],
    rows: Sequence[Tensor],
    tokenizer: Tokenizer,
    *,
    progress: bool = False,
) -> dict[str, dict[str, Ratio]]:
    """Compare models with their original on the same rows.

    Returns:
        Scores by name for each model, the `original` first, whose units are the rows:
        `bits_per_byte` of all tokens but the first of each row; for the others also `kl`, the KL
        divergence from the original in nats per token, and `top1_agreement`, the share of tokens
        after which the most likely token is the same.

    Raises:
        WorkError: A model computes NaN or infinite logits.
    """
    models = {ORIGINAL: original, **others}
    sums: dict[str, list[tuple[float, float, float]]] = {name: [] for name in models}
    for row in with_progress(rows, "measuring", len(rows), progress):
        expected = list(logits_of(original, [row]))
        for name, model in models.items():
            logits = expected if model is original else logits_of(model, [row])
            found = agreement(expected, logits, next_tokens([row]))
            assert found.nats is not None, "there are targets"
            same = found.tokens - found.flips
            sums[name].append((found.nats * (len(row) - 1), found.kl * found.tokens, same))
    sizes = np.array([float(text_bytes(tokenizer, row)) for row in rows])
    tokens, out = np.array([float(len(row)) for row in rows]), {}
    for name, of_rows in sums.items():
        nats, kl, same = np.array(of_rows).T
        if not math.isfinite(nats.sum() + kl.sum()):
            raise WorkError(f"{name} model: logits are NaN or infinite; nothing was written")
        out[name] = {"bits_per_byte": Ratio(nats / math.log(2), sizes)}
        if name != ORIGINAL:
            out[name] |= {"kl": Ratio(kl, tokens), "top1_agreement": Ratio(same, tokens)}
    return out
