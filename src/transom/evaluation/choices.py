"""Multiple choice: which continuation of a prompt a model finds most likely, as
lm-evaluation-harness counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from transom.base.errors import RequestError, WorkError
from transom.evaluation.bits import Window, score_windows
from transom.evaluation.eval_model import EvalModel
from transom.evaluation.task_data import ChoiceRow

DELIMITER = " "  # between prompt and choice; the harness's `target_delimiter`


@dataclass(frozen=True, eq=False)
class ChoiceScores:
    """What a model chose; every array is [rows], every list has an entry per row."""

    logprobs: list[list[float]]  # nats of each choice
    chosen: dict[str, NDArray[np.int64]]  # index by measure: acc, acc_norm, acc_bytes
    right: dict[str, NDArray[np.bool_]]
    ties: int  # rows whose best choices are equally likely: the first counts
    cut: int  # sequences that lost their beginning
    tokens: int  # of the continuations


def score_choices(
    subject: EvalModel, rows: Sequence[ChoiceRow], batch_tokens: int = 4096, progress: str = ""
) -> ChoiceScores:
    """Score every choice as a continuation of its prompt.

    `acc` takes the choice of the greatest log-probability; `acc_norm` divides by the characters of
    the choice and `acc_bytes` by its UTF-8 bytes, the space in front not counted
    (lm_eval/api/task.py, `process_results`).
    """
    pairs = [
        encode_pair(subject, row.prompt, DELIMITER + choice, row.id)
        for row in rows
        for choice in row.choices
    ]
    windows = [continuation_window(context, rest, subject.longest) for context, rest in pairs]
    found = iter(score_windows(subject.model, windows, batch_tokens, progress))
    logprobs = [[-next(found).nats for _ in row.choices] for row in rows]
    bad = next(
        (row.id for row, some in zip(rows, logprobs, strict=True) if any(map(math.isnan, some))),
        None,
    )
    if bad is not None:
        raise WorkError(
            f"{bad}: the log-probability of a choice is no number; `transom verify` may tell "
            f"what is wrong"
        )
    measures: dict[str, Callable[[str], int]] = {
        "acc": lambda choice: 1,
        "acc_norm": len,
        "acc_bytes": lambda choice: len(choice.encode()),
    }
    chosen: dict[str, np.ndarray] = {}
    for name, size in measures.items():
        best = []
        for some, row in zip(logprobs, rows, strict=True):
            scores = [logprob / size(text) for logprob, text in zip(some, row.choices, strict=True)]
            best.append(int(np.argmax(scores)))
        chosen[name] = np.array(best)
    answers = np.array([row.answer for row in rows])
    return ChoiceScores(
        logprobs,
        chosen,
        {name: indices == answers for name, indices in chosen.items()},
        ties=sum(some.count(max(some)) > 1 for some in logprobs),
        cut=sum(
            len(one.inputs) + 1 < sum(map(len, pair))
            for one, pair in zip(windows, pairs, strict=True)
        ),
        tokens=sum(len(rest) for _, rest in pairs),
    )


def encode_pair(
    subject: EvalModel, context: str, continuation: str, where: str
) -> tuple[list[int], list[int]]:
    """Ids of a context and of what continues it: both are encoded as one text, cut behind the
    context's own count.

    Where a token spans the boundary, the context alone has other tokens than it has in the whole,
    and what is scored is not exactly the continuation. The harness does so all the same
    (lm_eval/api/model.py, `_encode_pair`), with spaces at the end of the context moved in front of
    the continuation, and so do we.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        head = subject.encode(stripped)
        ids = subject.encode(stripped + continuation)
    else:
        head = [] if subject.prefix is None else [subject.prefix]
        ids = head + subject.tokenizer.encode(continuation)
    if not head or len(ids) <= len(head):
        raise RequestError(
            f"{where}: {continuation!r} adds no token behind the prompt's {len(head)}; expected "
            f"text that does"
        )
    return head, ids[len(head) :]


def continuation_window(
    context: Sequence[int], continuation: Sequence[int], longest: int | None
) -> Window:
    """One forward that scores a continuation; what `longest` tokens of input cannot hold is cut
    from the left.
    """
    ids = np.array([*context, *continuation], dtype=np.int64)
    if longest is not None:
        if len(continuation) > longest:
            raise RequestError(
                f"a continuation of {len(continuation)} tokens: expected {longest} or fewer"
            )
        ids = ids[-(longest + 1) :]
    return Window(ids[:-1], ids[1:], len(ids) - 1 - len(continuation))
