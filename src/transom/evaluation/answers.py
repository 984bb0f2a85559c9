"""Exact match: whether what a model generates for a prompt is one of the accepted answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError
from transom.base.runtime import mixed_seed
from transom.chat.reasoning import find_markers, split
from transom.evaluation.eval_args import Matching
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.progress import shown
from transom.evaluation.task_data import AnswerRow
from transom.inference.loop import GREEDY
from transom.inference.sampling import SamplingArgs
from transom.inference.text import Completion, stream_text

CACHE_TOKENS = 1 << 15  # prompt and new tokens of all rows that are generated at a time


@dataclass(frozen=True, eq=False)
class AnswerScores:
    """What a model said; lists and arrays have an entry per row."""

    texts: list[str]  # the answers, without their reasoning
    reasoning: list[str]
    found: list[str | None]  # in each text, by `Matching.extract`
    right: NDArray[np.bool_]
    unfinished: int  # answers cut at the most tokens allowed
    tokens: int  # generated


def score_answers(
    subject: EvalModel,
    rows: Sequence[AnswerRow],
    *,
    max_new_tokens: int,
    matching: Matching,
    stop: Sequence[str] = (),
    progress: str = "",
) -> AnswerScores:
    """Generate greedily after every prompt, with the chat template for messages, and compare.

    The reasoning of an answer that is written with the template is not compared.
    """
    prompts = [_prompt_ids(subject, row) for row in rows]
    template = subject.template if any(row.messages for row in rows) else None
    ends = subject.stop_tokens
    if template is not None:
        ends = tuple(dict.fromkeys((*ends, *template.stop_tokens)))
    for row, ids in zip(rows, prompts, strict=True):
        if subject.longest is not None and len(ids) + max_new_tokens > subject.longest:
            raise RequestError(
                f"{row.id}: a prompt of {len(ids)} tokens and {max_new_tokens} new: expected "
                f"{subject.longest} together, the model's max_seq_len"
            )
    said = [Completion()] * len(rows)
    markers = None if template is None else find_markers(template)
    kept = () if markers is None else markers.control_ids(subject.tokenizer)
    done = generated(subject, prompts, max_new_tokens, stop, ends, kept=kept)
    for index, one in shown(done, progress, len(rows)):
        said[index] = one
    parts = [
        split(one.text, markers if row.messages else None)
        for row, one in zip(rows, said, strict=True)
    ]
    found = [matching.found(text) for _, text in parts]
    return AnswerScores(
        [text for _, text in parts],
        [reasoning for reasoning, _ in parts],
        found,
        np.array([matching.right(one, row.answers) for one, row in zip(found, rows, strict=True)]),
        unfinished=sum(one.finish_reason == "length" for one in said),
        tokens=sum(len(one.tokens) for one in said),
    )


def _prompt_ids(subject: EvalModel, row: AnswerRow) -> list[int]:
    if not row.messages:
        return subject.encode(row.prompt)
    if subject.template is None:
        raise RequestError(
            f'{row.id}: messages: this model has no chat template; expected "prompt"'
        )
    try:
        return subject.template.encode(row.messages)
    except RequestError as error:
        raise RequestError(f"{row.id}: {error}") from None


def generated(
    subject: EvalModel,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    stop: Sequence[str],
    stop_tokens: Sequence[int],
    *,
    sampling: SamplingArgs = GREEDY,
    batch_rows: int | None = None,
    kept: Sequence[int] = (),
) -> Iterator[tuple[int, Completion]]:
    """(index, completion) of each prompt as it comes, the longest first; greedy unless told.

    Control tokens that are `kept` are in the texts.

    Prompts of like length make a batch, which has `CACHE_TOKENS` tokens or one row, `batch_rows` at
    most. Every prompt has draws of its own, whatever batch it is in.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    while order:
        count = max(1, CACHE_TOKENS // (len(prompts[order[0]]) + max_new_tokens))
        count = count if batch_rows is None else min(count, batch_rows)
        batch, order = order[:count], order[count:]
        texts = stream_text(
            subject.model,
            subject.tokenizer,
            [prompts[index] for index in batch],
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[mixed_seed(sampling.seed, index) for index in batch],
            stop=stop,
            stop_tokens=stop_tokens,
            kept=kept,
        )
        yield from zip(batch, texts.run(), strict=True)
